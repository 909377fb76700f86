#!/usr/bin/env bash
# What is missing of a sweep: launch/sweep.sh sweep=anchors_depth hardware=a100x8 data.root=/data [--dry-run] [key=value ...]
# On this machine's cards, or with executor=slurm as a job array (docs/sweeps.md).
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_cards
run "$PYTHON" -m train sweep "$@"
[[ -z $DRY_RUN ]] || "$PYTHON" -m train sweep "$@" dry_run=true
