#!/usr/bin/env bash
# This node's ranks of a run on several nodes. Once, on any node that sees the shared folder:
#   python -m train prepare stage=align experiment=paper_7b hardware=a100x8_2nodes run=NAME ...
# then on every node i, in any order, with the folder and the hash that it printed:
#   HEAD_ADDR=<host of node 0> NODE_RANK=<i> launch/multinode.sh RUN_FOLDER CONFIG_HASH [--dry-run]
# Found out, unless they are set: HEAD_PORT (29400), NODE_ADDR (this node's address on the way to the head),
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (the interface that has it), JOB_ID (the same word on all nodes, another for
# each start).
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -ne 2 ]]; then
    usage >&2
    exit 2
fi
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
[[ -n ${HEAD_ADDR:-} ]] || fail "HEAD_ADDR is not set" "no HEAD_ADDR" \
    "the host name or address of node 0, the same on all nodes" "HEAD_ADDR=<host> NODE_RANK=<i> launch/multinode.sh $*"
[[ -n $NODE_RANK ]] || fail "NODE_RANK is not set" "no NODE_RANK" \
    "which of the nodes this is, 0 for the one that HEAD_ADDR names" "HEAD_ADDR=$HEAD_ADDR NODE_RANK=<i> launch/multinode.sh $*"
export HEAD_ADDR NODE_RANK
on_nodes

start=("$PYTHON" -m train start "$1" "$2")
say "${start[@]}"
# In place of this shell: Slurm signals every process of a task, and the agent would hear of it twice from one in between.
exec "${start[@]}" ${DRY_RUN:+--dry-run}
