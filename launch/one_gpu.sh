#!/usr/bin/env bash
# One rank on one GPU: launch/one_gpu.sh stage=align data.root=/data [--dry-run] [key=value ...]
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_cards
train hardware=one_gpu "$@"
