# shellcheck shell=bash
# Sourced by every script here: the repository's root, its interpreter, --help and --dry-run. What a run does is in conf/.
set -euo pipefail
script=$(realpath -- "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi

# The comment at the head of the script that was called.
usage() {
    sed -n '2,$ { /^#/!q; /^# shellcheck/d; /^#SBATCH/d; s/^# //p }' "$script"
}

DRY_RUN=
arguments=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        *) arguments+=("$argument") ;;
    esac
done
set -- "${arguments[@]}"

# Prints the command, and runs it unless this is a dry run. A signal to this script is a signal to the command: bash by
# itself would end and leave it behind. (Ctrl-C is handed on as TERM, because what runs in the background ignores it.)
run() {
    printf '+ '
    printf '%q ' "$@"
    printf '\n'
    [[ -z $DRY_RUN ]] || return 0
    local code=0
    "$@" &
    child=$!
    for signal in TERM HUP USR1; do
        # shellcheck disable=SC2064
        trap "kill -$signal \$child" "$signal"
    done
    trap 'kill -TERM $child' INT
    wait "$child" || code=$?
    # A trap ends the wait, not the command, which saves and ends by itself.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap - TERM HUP USR1 INT
    return "$code"
}

# `python -m train run` with the given overrides; a dry run prints the composed config and the ranks' command instead.
train() {
    run "$PYTHON" -m train run "$@"
    [[ -z $DRY_RUN ]] || "$PYTHON" -m train run --dry-run "$@"
}
