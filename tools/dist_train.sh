#!/usr/bin/env bash
# Train with several processes: one for each GPU of a machine, or on the CPU where there is none.
#
# Usage: tools/dist_train.sh PROCESSES OPTION_FILE [arguments of `basicsr train`]
#   tools/dist_train.sh 4 options/train_ELAN_x4.yml --auto_resume
#   tools/dist_train.sh 4 options/train_ELAN_x4.yml --set datasets.train.batch_size_per_gpu=16
#
# Several machines, each with the same line:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 tools/dist_train.sh 8 options/train_ELAN_x4.yml   # and 1
#
# MAX_RESTARTS=3 starts all processes again when one fails; with --auto_resume they go on from the last checkpoint.
# batch_size_per_gpu is each process's: divide it by their number to keep the total.
exec "$(dirname "$0")/dist_run.sh" train "$@"
