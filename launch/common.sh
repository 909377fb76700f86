# shellcheck shell=bash
# Sourced by every script here: the repository's root, its interpreter, and --dry-run. What a run does is in conf/.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi

DRY_RUN=
arguments=()
for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then DRY_RUN=1; else arguments+=("$argument"); fi
done
set -- "${arguments[@]}"

# Prints the command, and runs it unless this is a dry run.
run() {
    printf '+ '
    printf '%q ' "$@"
    printf '\n'
    [[ -n $DRY_RUN ]] || "$@"
}

# `python -m train run` with the given overrides; a dry run prints the composed config and the ranks' command instead.
train() {
    run "$PYTHON" -m train run "$@"
    [[ -z $DRY_RUN ]] || "$PYTHON" -m train run --dry-run "$@"
}
