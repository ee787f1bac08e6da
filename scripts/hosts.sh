#!/usr/bin/env bash
# Train on several hosts: the same command on each, with the host's number. After a fault it starts again by itself.
#
#   scripts/hosts.sh HOST HOSTS ADDRESS[:PORT] CONFIG.yaml [section.key=value ...]
#   scripts/hosts.sh 0 2 10.0.0.1 configs/2x4x3090.yaml        on the first host, whose address that is
#   scripts/hosts.sh 1 2 10.0.0.1 configs/2x4x3090.yaml        on the second
#
# Ctrl-C or SIGTERM on any host saves and ends the run on all of them; a second one ends at once, without a save.
# WORKERS=4: workers on this host, the same number on each; default: one for each GPU.
# TRIES=10: it gives up after as many starts in a row that failed within QUICK=300 seconds.
# Exit code: 0 done or stopped, 1 gave up, 2 a mistake that another start would meet again. docs/hosts.md has the rest.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
host=$1 hosts=$2 address=${3%:*} port=${3##*:}
[ "$port" != "$3" ] || port=29500
config=$(realpath -- "$4")
shift 4
# shellcheck source=scripts/venv.sh
command -v sdxl-train >/dev/null || source "$(dirname "$0")/venv.sh"
workers=${WORKERS:-$(python -c "from trainer.parallel import environment as e; print(e.choose_workers(None, e.detect_gpus())[0])")}
cores=$(($(nproc) / workers))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}

SDXL_TRAIN_ENDINGS=$(mktemp -d)
export SDXL_TRAIN_ENDINGS
trap 'rm -rf "$SDXL_TRAIN_ENDINGS"' EXIT
stops=0 pid='' interrupted=''

# Workers are told, and not torchrun: it would give them some seconds, and the other hosts' would wait for it in vain.
tell_workers() {
    local tasks=''
    tasks=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || pgrep -P "$pid") || true
    # shellcheck disable=SC2086
    kill -TERM ${tasks:-"$pid"} 2>/dev/null || true
}
stop() {
    interrupted=1 stops=$((stops + 1))
    [ -n "$pid" ] || return 0
    if [ "$stops" -eq 1 ]; then tell_workers; else kill -KILL -- "-$pid" 2>/dev/null || true; fi
}
trap stop INT TERM HUP

wait_for() { # the exit code of a child, in `code`, however many signals come
    while :; do
        interrupted='' code=0
        wait "$1" || code=$?
        [ -n "$interrupted" ] || return 0
    done
}

quick=0
while [ "$stops" -eq 0 ]; do
    begin=$SECONDS
    # In a session of its own: a terminal's Ctrl-C would reach torchrun too.
    setsid torchrun --nnodes "$hosts" --node-rank "$host" --nproc-per-node "$workers" --master-addr "$address" \
        --master-port "$port" --max-restarts 0 --shutdown-timeout 10 -m trainer "$config" "$@" &
    pid=$!
    wait_for "$pid"
    pid=''
    [ "$code" -ne 0 ] || exit 0
    if [ -e "$SDXL_TRAIN_ENDINGS/refused" ]; then
        echo "hosts.sh: the line above torchrun's report says what to mend; another start would end alike" >&2
        exit 2
    fi
    [ "$stops" -eq 0 ] || exit 1
    quick=$((SECONDS - begin < ${QUICK:-300} ? quick + 1 : 0))
    if [ "$quick" -ge "${TRIES:-10}" ]; then
        echo "hosts.sh: $quick starts in a row failed soon, the last with exit code $code; giving up" >&2
        exit 1
    fi
    pause=$((quick < 6 ? 5 * (quick + 1) : 30))
    echo "hosts.sh: host $host starts again in $pause s (exit code $code, $quick in a row failed soon)" >&2
    sleep "$pause" &
    wait_for "$!"
done
