#!/usr/bin/env bash
# Both stages under ZeRO-2 and ZeRO-3 on one node of eight cards, 30 steps each, 5 of them to warm up; the table at the end
# is written to bench/results/8gpu.json. Not run yet on eight A100s: no such machine was at hand.
# launch/bench_8gpu.sh data.root=/data [--dry-run] [key=value ...]
# STEPS, WARM_UP and OUT may be set, and experiment=paper_13b or any other given; two CPU ranks at toy shapes are
#   STEPS=4 WARM_UP=1 OUT=/tmp/8gpu.json launch/bench_8gpu.sh experiment=smoke output_root=/tmp/bench
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_cards
output_root=checkpoints
short=(stage.epochs=null "stage.max_steps=${STEPS:-30}" checkpoint.every=null log.every=1)
experiment=(experiment=paper_7b)
for argument in "$@"; do
    case $argument in
        output_root=*) output_root=${argument#output_root=} ;;
        experiment=*) experiment=() ;;
    esac
done

folders=()
for zero in zero2 zero3; do
    train "${short[@]}" "${experiment[@]}" stage=align "zero=$zero" "run=bench-align-$zero" "$@"
    train "${short[@]}" "${experiment[@]}" stage=finetune "zero=$zero" "run=bench-finetune-$zero" \
        "init_from=$output_root/bench-align-$zero" "$@"
    folders+=("$output_root/bench-align-$zero" "$output_root/bench-finetune-$zero")
done
run "$PYTHON" -m bench.gpu.run "${folders[@]}" --warm-up "${WARM_UP:-5}" --json "${OUT:-bench/results/8gpu.json}"
