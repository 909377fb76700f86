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
    *) usage >&2; exit 2 ;;
esac
shift

output_root=checkpoints
for argument in "$@"; do
    [[ $argument != output_root=* ]] || output_root=${argument#output_root=}
done
runs=$output_root/$experiment
cache=.cache/miniworld
data_root=data.root=$cache/$budget/world
[[ -z $DRY_RUN ]] || set -- "$@" --dry-run

run "$PYTHON" -m miniworld --budget "$budget" --out "$cache"
run launch/two_stage.sh "$experiment" "experiment=$experiment" "$@"
run "$PYTHON" -m evals "model=$runs/align" task=miniworld_caption "$data_root" "conditions=[right,shuffled]"
run "$PYTHON" -m evals "model=$runs/finetune" "task=[miniworld_scene,miniworld_chart,miniworld_doc]" "$data_root" \
    "conditions=[right,shuffled,none]"
run "$PYTHON" -m evals.report "$runs" --seconds install=.venv/.installed \
    --seconds "mini world=$cache/$budget/manifest.json"
