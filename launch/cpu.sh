#!/usr/bin/env bash
# Two ranks on this machine's CPU: launch/cpu.sh stage=align experiment=miniworld [--dry-run] [key=value ...]
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train hardware=cpu "$@"
