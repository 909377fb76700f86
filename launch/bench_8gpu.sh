#!/usr/bin/env bash
# Both stages under ZeRO-2 and ZeRO-3 on one node of eight cards, 30 steps each, 5 of them to warm up; the table at the end
# is written to bench/results/8gpu.json. Not run yet: no such machine was at hand.
# launch/bench_8gpu.sh data.root=/data [--dry-run] [key=value ...]
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_cards
short=(experiment=paper_7b stage.epochs=null stage.max_steps=30 checkpoint.every=null log.every=1)
folders=()
for zero in zero2 zero3; do
    train "${short[@]}" stage=align "zero=$zero" "run=bench-align-$zero" "$@"
    train "${short[@]}" stage=finetune "zero=$zero" "run=bench-finetune-$zero" \
        "init_from=checkpoints/bench-align-$zero" "$@"
    folders+=("checkpoints/bench-align-$zero" "checkpoints/bench-finetune-$zero")
done
run "$PYTHON" -m bench.gpu.run "${folders[@]}" --warm-up 5 --json bench/results/8gpu.json
