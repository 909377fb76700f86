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

# fail WHAT FOUND EXPECTED REMEDY: ends as every command of this repository ends on a mistake.
fail() {
    printf 'error: %s\n  found:    %s\n  expected: %s\n  remedy:   %s\n' "$@" >&2
    exit 2
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

# say COMMAND...: prints it as it could be typed.
say() {
    printf '+ '
    printf '%q ' "$@"
    printf '\n'
}

# await PID: the exit code of what this shell has started. A signal that is trapped ends a wait, not what is waited for,
# and bash remembers the code of what has ended meanwhile.
await() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1"
}

# Prints the command, and runs it unless this is a dry run. A signal to this script is a signal to the command: bash by
# itself would end and leave it behind. (Ctrl-C is handed on as TERM, because what runs in the background ignores it.)
run() {
    say "$@"
    [[ -z $DRY_RUN ]] || return 0
    local code=0
    "$@" &
    child=$!
    for signal in TERM HUP USR1; do
        # shellcheck disable=SC2064
        trap "kill -$signal \$child" "$signal"
    done
    trap 'kill -TERM $child' INT
    await "$child" || code=$?
    trap - TERM HUP USR1 INT
    return "$code"
}

# `python -m train run` with the given overrides; a dry run prints the composed config, the ranks' command and the plan.
train() {
    run "$PYTHON" -m train run "$@"
    [[ -z $DRY_RUN ]] || "$PYTHON" -m train run --dry-run "$@"
}

# What CUDA and NCCL are told wherever ranks run on cards. What the user has set stays.
on_cards() {
    # Errors with their cause; without it NCCL says only "unhandled system error", with INFO it fills the log.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Cards have the numbers that nvidia-smi gives them, by their slots, and not by their speed: CUDA_VISIBLE_DEVICES,
    # nvidia-smi and the log then speak of the same card.
    export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
}

# What NCCL is told besides where the cards are on several nodes. Which interface it uses for its first contact
# (NCCL_SOCKET_IFNAME) and gloo for everything (GLOO_SOCKET_IFNAME) is found by `python -m train start`, on the way to the
# head; between the nodes NCCL takes InfiniBand by itself where there is any (NCCL_IB_HCA chooses among several adapters).
on_nodes() {
    on_cards
    # A link or switch that is away for a moment must not end the run: the adapter waits 4.096 us x 2^22 = 17 s for an
    # answer, 7 times, before NCCL hears of an error. Far below the watchdog's budget of a step, which remains the limit.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
}
