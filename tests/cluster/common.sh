# shellcheck shell=bash
# What the cluster tests share; sourced. Sets: root (the checkout), PYTHON, work (a temporary folder).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
test=$(basename "$0" .sh)

cannot() {  # what this machine forbids is no failure of the project, and no success either
    echo "$test: not run: $1" >&2
    exit 1
}
fail() {
    tail -n 15 "$work"/*/output* >&2 || true
    echo "$test: FAILED: $1" >&2
    exit 1
}
within() {  # within SECONDS WHAT COMMAND...: until COMMAND succeeds
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "$what did not come about in time"
        sleep 0.2
    done
}
install() {  # install PROGRAM PACKAGE...
    command -v "$1" > /dev/null && return
    shift
    # Debian's packages start their daemons where nothing forbids it.
    local policy=/usr/sbin/policy-rc.d
    [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f '"$policy" RETURN; }
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; } \
        > "$work/apt.log" 2>&1 || cannot "apt-get could not install $*: $(tail -n 1 "$work/apt.log")"
}
reached() {  # reached FILE ITERATION: whether a training's output tells of that iteration or a later one
    [ -e "$1" ] && [ "$(grep -aoE 'iter: *[0-9,]+' "$1" | tr -dc '0-9\n' | tail -n 1)" -ge "$2" ]
}

[ "$(id -u)" -eq 0 ] || cannot "needs root"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
PYTHON=$(command -v "$PYTHON") || cannot "there is no $PYTHON"
export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
"$PYTHON" -c 'import elan_basicsr, skimage' 2> /dev/null || cannot "$PYTHON lacks elan-basicsr or scikit-image; \
make venv, or PYTHON=…"
work=$(mktemp -d)
