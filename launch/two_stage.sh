#!/usr/bin/env bash
# Align, then finetune from it: launch/two_stage.sh NAME [--dry-run] [key=value ...] [align:key=value] [finetune:key=value]
# Runs are NAME/align and NAME/finetune; called again, a run continues from its newest checkpoint; what is done is skipped.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -lt 1 || $1 == *=* ]]; then
    usage >&2
    exit 2
fi
name=$1
shift

output_root=checkpoints
align=() finetune=()
for argument in "$@"; do
    case $argument in
        align:*) align+=("${argument#align:}") ;;
        finetune:*) finetune+=("${argument#finetune:}") ;;
        *) align+=("$argument") finetune+=("$argument") ;;
    esac
    [[ $argument != output_root=* ]] || output_root=${argument#output_root=}
done

on_cards
train stage=align run="$name/align" resume=auto "${align[@]}"
train stage=finetune run="$name/finetune" init_from="$output_root/$name/align" resume=auto "${finetune[@]}"
