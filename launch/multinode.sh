#!/usr/bin/env bash
# This node's ranks of a run on several nodes. Once, on any node that sees the shared folder:
#   python -m train prepare stage=align experiment=paper_7b hardware=a100x8_2nodes run=NAME ...
# then on every node i, with the folder and the hash that it printed:
#   HEAD_ADDR=<host of node 0> NODE_RANK=<i> launch/multinode.sh RUN_FOLDER CONFIG_HASH [--dry-run]
# HEAD_PORT (29400), NODE_ADDR (this node's address, where its host name resolves to 127.0.0.1) and JOB_ID (the same word
# on all nodes, another for each start) may be set as well.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -ne 2 ]]; then
    usage >&2
    exit 2
fi
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
missing() {
    echo "error: $1 is not set: $2" >&2
    usage >&2
    exit 2
}
[[ -n ${HEAD_ADDR:-} ]] || missing HEAD_ADDR "the host name or address of node 0, the same on all nodes"
[[ -n $NODE_RANK ]] || missing NODE_RANK "which of the nodes this is, 0 for the one that HEAD_ADDR names"
export HEAD_ADDR NODE_RANK
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

run exec "$PYTHON" -m train start "$1" "$2"
