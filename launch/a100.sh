#!/usr/bin/env bash
# Eight ranks on one node of A100s: launch/a100.sh stage=align experiment=paper_7b data.root=/data [--dry-run] [...]
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
train hardware=a100x8 "$@"
