#!/usr/bin/env bash
# Training on one or more nodes without a scheduler. On every node, in the folder where the recipe's paths begin:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC_PER_NODE=8 examples/torchrun.sh RECIPE.yaml [key=value ...]
# with NODE_RANK=1 on the second. The variables are those of torchrun and ms-swift; MASTER_PORT is 29500 if not set.
# `megavlm launch torchrun` checks recipe and layout first, and writes such a script with its settings (docs/gpu.md).
set -euo pipefail

nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:?processes on this node, one for each GPU}
if [ "$nnodes" = 1 ]; then
    node_rank=0
    master_addr=${MASTER_ADDR:-localhost}
else
    node_rank=${NODE_RANK:?0 on the first node, 1 on the next, ...}
    master_addr=${MASTER_ADDR:?the first node\'s host name}
fi
# The first node keeps the list of who is there. Told, not guessed: torchrun compares host names, which need not match.
is_host=$([ "$node_rank" = 0 ] && echo 1 || echo 0)

# Ranks get a store of their own for each start. With the agents' own, which torch takes by default, an agent that comes
# back waits in vain for an address that the others have kept (torch 2.13; github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# When a node is lost, the agents of the others wait for a new one and start again from the newest checkpoint.
exec torchrun \
    --nnodes "$nnodes" \
    --nproc-per-node "$nproc_per_node" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$master_addr:${MASTER_PORT:-29500}" \
    --rdzv-id "${RUN_ID:-megavlm}" \
    --rdzv-conf "is_host=$is_host${RDZV_CONF:+,$RDZV_CONF}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m megavlm train "$@"
