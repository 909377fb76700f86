#!/usr/bin/env bash
# A rank on each of this node's A100s, 1 to 8 of 40 or 80 GB: launch/a100.sh stage=align experiment=paper_7b data.root=/data
#   [--dry-run] [key=value ...]
# CUDA_VISIBLE_DEVICES chooses among the cards. On a machine without any, a dry run is told them: CARDS=4 MEMORY_GB=40.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_cards
if [[ -n $DRY_RUN && -n ${CARDS:-} && -n ${MEMORY_GB:-} ]]; then
    cards=$CARDS memory=$((MEMORY_GB * 1000))
else
    command -v nvidia-smi >/dev/null || fail "this machine has no NVIDIA driver" "no nvidia-smi on PATH" "A100s" \
        "launch/cpu.sh; a dry run is told its cards: CARDS=8 MEMORY_GB=80 launch/a100.sh --dry-run ..."
    listed=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits \
        ${CUDA_VISIBLE_DEVICES:+"--id=$CUDA_VISIBLE_DEVICES"}) ||
        fail "nvidia-smi does not list the cards" "$listed" "A100s" "correct CUDA_VISIBLE_DEVICES, or see to the driver"
    others=$(grep -v A100 <<<"$listed" || true)
    [[ -z $others ]] || fail "these cards are no A100s" "${others//$'\n'/; }" "A100s only" \
        "python -m train ... hardware=one_gpu hardware.ranks=N hardware.card=NAME, as train/plan/cards.py names them"
    cards=$(wc -l <<<"$listed")
    memory=$(awk -F', ' 'NR == 1 || $2 < least { least = $2 } END { print least }' <<<"$listed")  # MiB
fi
# Which of the two kinds it is; what a card of that kind has, and how it is used, is in conf/hardware.
if ((memory < 60000)); then hardware=a100_40gbx8; else hardware=a100x8; fi

train "hardware=$hardware" "hardware.ranks=$cards" "$@"
