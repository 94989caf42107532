#!/usr/bin/env bash
#SBATCH --job-name=elan
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Train under SLURM until it is done, over time limits, preemption and lost nodes.
#
# Usage: sbatch [sbatch's options] tools/slurm_train.sh OPTION_FILE [arguments of `basicsr train`]
#   sbatch --gres=gpu:1 tools/slurm_train.sh options/train_ELAN_light_x4.yml
#   sbatch --nodes=2 --ntasks-per-node=4 --gres=gpu:4 tools/slurm_train.sh options/train_ELAN_x4.yml \
#       --set datasets.train.batch_size_per_gpu=4
#
# One task is one process with one GPU. Submit from the folder that is to hold experiments/, with the environment that
# has elan-basicsr active, or with PYTHON=its python. Three minutes before the time limit the run is asked to save; the
# job then requeues itself and goes on from there (--auto_resume). A run whose process died is requeued MAX_RESTARTS
# times, 3 by default, which slurm-JOB.failures counts. A run that is done, cancelled, or whose options are wrong is not.
set -uo pipefail
if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch [options] tools/slurm_train.sh OPTION_FILE [arguments]" >&2
    exit 2
fi
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}  # jobs may share a node
failures=slurm-$SLURM_JOB_ID.failures
asked='' terminated=''
launcher=()
[ "${SLURM_NTASKS:-1}" -gt 1 ] && launcher=(--launcher slurm)

# SLURM gives this script alone the signal before the time limit; a cancelled or preempted job's tasks get theirs anyway.
trap 'asked=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'terminated=yes' TERM
# bash handles a signal when the command in the foreground ends: so srun runs in the background and is waited for.
# When a task ends, the others have a minute to end by themselves: killed at once, they would hide its exit code.
srun --kill-on-bad-exit=0 --wait=60 "${PYTHON:-python}" -u -m elan_basicsr train --auto_resume "${launcher[@]}" -opt "$@" &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2> /dev/null; do  # a signal ended the wait, not the run
    wait "$run"
    code=$?
done

requeue() {
    echo "slurm_train.sh: $1; the job is requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exec sleep 60  # until SLURM ends the script, which sleep lets it do at once
}
if [ -n "$terminated" ]; then
    exit "$code"  # cancelled, or preempted: then SLURM requeues it
elif [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
    rm -f "$failures"
elif [ "$code" -eq 75 ] || [ -n "$asked" ]; then  # srun may report another code of a task that it ended
    requeue "the run was asked to stop and has saved"
else
    echo "$code" >> "$failures"
    if [ "$(wc -l < "$failures")" -le "${MAX_RESTARTS:-3}" ]; then
        requeue "the run ended with code $code"
    fi
fi
exit "$code"
