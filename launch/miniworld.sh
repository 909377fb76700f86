#!/usr/bin/env bash
# The whole story on one CPU machine: launch/miniworld.sh smoke|train|full [--dry-run] [key=value ...]
# World and backbones, align, finetune, held-out evaluation, report; what is there already is used again.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

budget=${1:-}
case $budget in
    train) experiment=miniworld ;;
    full) experiment=miniworld_full ;;
    smoke) experiment=smoke ;;
    *) sed -n '2,3s/^# //p' launch/miniworld.sh >&2; exit 2 ;;
esac
shift

name=$experiment
root=checkpoints/$name
world=.cache/miniworld/$budget/world
conditions="conditions=[right,shuffled,none]"

run "$PYTHON" -m miniworld --budget "$budget" --out .cache/miniworld
run launch/two_stage.sh "$name" "experiment=$experiment" "$@"
run "$PYTHON" -m evals "model=$root/align" task=miniworld_caption "data.root=$world" "conditions=[right,shuffled]"
run "$PYTHON" -m evals "model=$root/finetune" "task=[miniworld_scene,miniworld_chart,miniworld_doc]" \
    "data.root=$world" "$conditions"
run "$PYTHON" -m evals.report "$root"
