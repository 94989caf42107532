#!/usr/bin/env bash
#SBATCH --job-name=elan-test
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.out
# Test under SLURM; the tasks share out the images, and the figures are those of one.
#
# Usage: sbatch [sbatch's options] tools/slurm_test.sh OPTION_FILE [arguments of `basicsr test`]
#   sbatch --gres=gpu:1 tools/slurm_test.sh options/test_ELAN_x4.yml --set path.pretrain_network_g=net_g_latest.pth
#   sbatch --ntasks-per-node=4 --gres=gpu:4 tools/slurm_test.sh options/test_ELAN_x4.yml
set -euo pipefail
if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch [options] tools/slurm_test.sh OPTION_FILE [arguments]" >&2
    exit 2
fi
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}  # jobs may share a node
exec srun --kill-on-bad-exit=0 --wait=60 "${PYTHON:-python}" -u -m elan_basicsr test -opt "$@"
