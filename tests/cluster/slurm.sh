#!/usr/bin/env bash
# A training of two tasks under a SLURM of its own on this machine: signalled, requeued, and compared with an
# undisturbed one. Needs root and Debian; installs slurm-wlm and munge, and starts them from a temporary folder.
# shellcheck source=tests/cluster/common.sh
. "$(dirname "$0")/common.sh"
iterations=900
daemons=()
cleanup() {
    scancel --quiet --full --signal=KILL "${job:-0}" 2> /dev/null || true
    scancel --quiet "${job:-0}" 2> /dev/null || true
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        kill "${daemons[i]}" 2> /dev/null || true
        wait "${daemons[i]}" 2> /dev/null || true
    done
    pkill -KILL -f "$work" 2> /dev/null || true  # what a job may have left
    rm -rf "$work"
}
trap cleanup EXIT
fail() {  # as in common.sh, with what SLURM says of the job
    tail -n 15 "$work"/*/output >&2 || true
    scontrol --oneliner show job "${job:-0}" >&2 || true
    tail -n 5 "$work/slurmctld.log" >&2 || true
    echo "$test: FAILED: $1" >&2
    exit 1
}

install sbatch slurm-wlm munge
install slurmctld slurmctld
install slurmd slurmd
node=$(hostname -s)
export SLURM_CONF=$work/slurm.conf
mkdir "$work"/{state,spool,munge,calm,disturbed}
chmod 755 "$work" "$work/munge"
head -c 1024 /dev/urandom > "$work/munge.key"
chmod 400 "$work/munge.key"
cat > "$SLURM_CONF" << END
ClusterName=elan
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$((20000 + RANDOM % 5000))
SlurmdPort=$((25000 + RANDOM % 5000))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge/socket" --num-threads=2 \
    --pid-file="$work/munge/pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed" > /dev/null 2>&1 &
daemons+=($!)
within 20 "munge's socket" test -S "$work/munge/socket"
slurmctld -D > /dev/null 2>&1 &
daemons+=($!)
within 30 "an answer of slurmctld" sinfo
slurmd -D > /dev/null 2>&1 &
daemons+=($!)
idle() { sinfo --noheader --format=%t | grep -qx idle; }
within 60 "an idle node ($(tail -n 1 "$work/slurmctld.log"))" idle

"$PYTHON" "$root/tests/cluster/training.py" prepare "$work" "$iterations"
submit() {  # submit FOLDER: a job of two tasks in it; its number in $job
    job=$(cd "$work/$1" && sbatch --parsable --ntasks=2 --ntasks-per-node=2 --cpus-per-task=1 --output=output \
        "$root/tools/slurm_train.sh" "$work/run.yml") || fail "sbatch refused the job"
}
state() { scontrol --oneliner show job "$job" | grep -oE "$1=[^ ]+" | cut -d= -f2; }
failed() { [ "$(state JobState)" = FAILED ]; }
ended() { [ "$(state JobState)" = COMPLETED ]; }
pending() { [ "$(state Restarts) $(state JobState)" = "$1 PENDING" ]; }
running() { [ "$(state JobState)" = RUNNING ]; }
restarted() {  # restarted NUMBER WHY
    within 120 "a requeue after $2" pending "$1"
    # SLURM starts a requeued job after two minutes, because a node refuses it right after its end. Seconds will do.
    sleep 5
    scontrol update JobId="$job" StartTime=now
    within 60 "the restart after $2" running
}
submit calm
within 300 "the end of the undisturbed run" ended
output=$work/disturbed/output
submit disturbed
within 120 "iteration 30" reached "$output" 30
scancel --batch --signal=USR1 "$job"
restarted 1 "SIGUSR1"
grep -q 'SIGUSR1: stopped and saved at iteration' "$output" || fail "SIGUSR1 did not lead to a checkpoint"
stopped=$(grep -oE 'saved at iteration [0-9]+' "$output" | grep -oE '[0-9]+$')
within 120 "iteration $((stopped + 30))" reached "$output" $((stopped + 30))
scontrol requeue "$job"
restarted 2 "scontrol requeue"
within 120 "iteration $((stopped + 150))" reached "$output" $((stopped + 150))
pgrep -f "$work/run.yml" | xargs -r ps -o pid=,args= -p | awk '/-u -m elan_basicsr/ && !/srun/ {print $1}' | sort -n \
    | head -n 1 | xargs kill -KILL
restarted 3 "a task's death"
within 300 "the end of the requeued run" ended
[ ! -e "$work/disturbed/slurm-$job.failures" ] || fail "the count of failures was left behind"
grep -q "Start training from .*iter: $stopped\$" "$output" || fail "the job did not resume at iteration $stopped"
"$PYTHON" "$root/tests/cluster/training.py" compare "$work/calm" "$work/disturbed" || fail "the requeued run differs"
mkdir "$work/wrong"
(cd "$work/wrong" && sbatch --parsable --ntasks=2 --ntasks-per-node=2 --cpus-per-task=1 --output=output \
    "$root/tools/slurm_train.sh" absent.yml) > "$work/job"
job=$(cat "$work/job")
within 120 "the end of a job with wrong options" failed
[ "$(state ExitCode) $(state Restarts)" = '2:0 0' ] || fail "wrong options: $(state ExitCode), $(state Restarts) restarts"
echo "$test: passed: signalled at iteration $stopped, requeued three times, weights equal bit for bit"
