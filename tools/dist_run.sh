#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh have in common. Usage: tools/dist_run.sh train|test PROCESSES OPTION_FILE [...]
set -euo pipefail
if [ $# -lt 3 ] || ! [ "$2" -ge 1 ] 2> /dev/null; then
    echo "usage: tools/dist_$(basename "${1:-train}").sh PROCESSES OPTION_FILE [arguments]" >&2
    exit 2
fi
command=$1 processes=$2 options=$3
shift 3
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?is not set: the number of this machine, from 0}"
           --master_addr "${MASTER_ADDR:?is not set: the name of machine 0}" --master_port "${MASTER_PORT:-29500}")
fi
# torchrun passes these on, SIGUSR1 too, and gives the run two minutes to save instead of half a one.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# A round of processes meets at a store of its own: in a shared one it may find the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
exec torchrun "${where[@]}" --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-0}" \
    -m elan_basicsr "$command" -opt "$options" --launcher pytorch "$@"
