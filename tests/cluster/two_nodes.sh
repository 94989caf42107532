#!/usr/bin/env bash
# A training over two hosts, which are two network namespaces joined by a cable (veth): the processes of one host are
# killed, the job goes on, and its end is compared with an undisturbed one's. Needs root and iproute2.
# shellcheck source=tests/cluster/common.sh
. "$(dirname "$0")/common.sh"
iterations=300
hosts=(elan-a-$$ elan-b-$$)
cleanup() {
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2> /dev/null | xargs -r kill -KILL 2> /dev/null || true
        ip netns delete "$host" 2> /dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT

install ip iproute2
for host in "${hosts[@]}"; do
    ip netns add "$host" 2> "$work/error" || cannot "no network namespaces here: $(cat "$work/error")"
    ip -n "$host" link set lo up
done
ip link add wire0 netns "${hosts[0]}" type veth peer name wire0 netns "${hosts[1]}" 2> "$work/error" \
    || cannot "no veth devices here: $(cat "$work/error")"
for i in 0 1; do
    ip -n "${hosts[i]}" address add 10.77.0.$((i + 1))/24 dev wire0
    ip -n "${hosts[i]}" link set wire0 up
done
export GLOO_SOCKET_IFNAME=wire0
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # as the README says for restarts

"$PYTHON" "$root/tests/cluster/training.py" prepare "$work" "$iterations"
mkdir "$work"/{calm,disturbed}
start() {  # start HOST FOLDER TORCHRUN'S ARGUMENTS...: one process on a host; the other host's number is 1 - HOST
    local host=$1 folder=$work/$2 hosting=true
    [ "$host" = 0 ] || hosting=false
    shift 2
    # Both namespaces have the machine's host name, so the rendezvous has to be told who hosts it.
    (cd "$folder" && exec ip netns exec "${hosts[host]}" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
        --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --rdzv-id elan --rdzv-conf "is_host=$hosting" \
        --local-addr "10.77.0.$((host + 1))" "$@" -m elan_basicsr train -opt "$work/run.yml" --auto_resume \
        >> "$folder/output$host" 2>&1) &
    pids[host]=$!
}
together() {  # together FOLDER ARGUMENTS...: on both hosts
    start 0 "$@"
    start 1 "$@"
}
left() { ! kill -0 "$1" 2> /dev/null; }
finished() {
    for i in 0 1; do
        within 180 "the end on host $i" left "${pids[i]}"
        wait "${pids[i]}" || fail "$1: host $i ended with code $?"
    done
}

together calm
finished "the undisturbed run"

# A host is lost: its processes die at once. The other one's run ends by itself, and the job is started again on both.
together disturbed
within 120 "iteration 30" reached "$work/disturbed/output0" 30
ip netns pids "${hosts[1]}" | xargs kill -KILL
lost=$SECONDS
within 120 "the end of the host that was left" left "${pids[0]}"
wait "${pids[0]}" && fail "the host that was left ended as if all were well"
grep -q 'basicsr: error: process 0 of 2 lost the others' "$work/disturbed/output0" || fail "the loss was not named"
echo "$test: the host that was left ended $((SECONDS - lost)) s after the loss"

# A process dies: torchrun starts all again, on both hosts, and they resume by themselves.
: > "$work/disturbed/output0"
together disturbed --max-restarts 2
within 120 "iteration 100" reached "$work/disturbed/output0" 100
ip netns pids "${hosts[1]}" | xargs ps -o pid=,args= -p | grep -v torch.distributed | awk '/elan_basicsr/ {print $1}' \
    | sort -n | head -n 1 | xargs kill -KILL
finished "the resumed run"
[ "$(grep -c 'Start training from' "$work/disturbed/output0")" -ge 2 ] || fail "torchrun did not start it again"
"$PYTHON" "$root/tests/cluster/training.py" compare "$work/calm" "$work/disturbed" || fail "the resumed run differs"

# The same with the script, which takes a master address instead of a rendezvous.
mkdir "$work/script"
ln -s "$(dirname "$PYTHON")" "$work/bin"
for i in 0 1; do
    (cd "$work/script" && NNODES=2 NODE_RANK=$i MASTER_ADDR=10.77.0.1 PATH="$work/bin:$PATH" exec ip netns exec \
        "${hosts[i]}" "$root/tools/dist_train.sh" 1 "$work/run.yml" > "output$i" 2>&1) &
    pids[i]=$!
done
finished "tools/dist_train.sh"
"$PYTHON" "$root/tests/cluster/training.py" compare "$work/calm" "$work/script" || fail "dist_train.sh's run differs"
echo "$test: passed: a lost host and a lost process, resumed, weights equal bit for bit"
