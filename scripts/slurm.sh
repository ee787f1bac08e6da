#!/usr/bin/env bash
# Train under SLURM, one task for each GPU. From the repository's folder, which all nodes see:
#
#   sbatch scripts/slurm.sh configs/2x4x3090.yaml run.on_local_disks=false [section.key=value ...]
#   sbatch --nodes 4 --time 12:00:00 scripts/slurm.sh ...        what is written below, otherwise
#   scancel --signal=USR1 --batch JOB                            save now, and queue the job again
#   scancel --signal=TERM JOB                                    save and end
#
# Ten minutes before the time is up the run is saved and the job queued again; it goes on at the same image. A fault of a
# task starts all tasks again, a fault of a node is SLURM's to requeue. docs/hosts.md has the rest.
#
#SBATCH --job-name=sdxl-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sdxl-train-%j.log
set -euo pipefail
if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}" # the script itself is a copy, somewhere else
[ ! -x .venv/bin/sdxl-train ] || export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
SDXL_TRAIN_ENDINGS=$(mktemp -d "$PWD/.endings-$SLURM_JOB_ID-XXXXXX") # where tasks on all nodes can write
export SDXL_TRAIN_ENDINGS
trap 'rm -rf "$SDXL_TRAIN_ENDINGS"' EXIT
out_of_time='' interrupted=''
# Not by srun, which would end the tasks at once; and not SIGUSR1, of which they would die.
trap 'out_of_time=1 interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'interrupted=1' TERM # SLURM sends it to the tasks as well

wait_for() { # the exit code of a child, in `code`, however many signals come
    while :; do
        interrupted='' code=0
        wait "$1" || code=$?
        [ -n "$interrupted" ] || return 0
    done
}

quick=0
while :; do
    begin=$SECONDS
    srun --kill-on-bad-exit=1 python -m trainer "$@" &
    wait_for "$!"
    [ ! -e "$SDXL_TRAIN_ENDINGS/refused" ] || exit 2
    if [ -n "$out_of_time" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    if [ "$code" -eq 0 ]; then
        # Another job may have been given the nodes: SLURM queues only what it has to end itself.
        [ ! -e "$SDXL_TRAIN_ENDINGS/stopped" ] || { sleep "${LINGER:-120}" & wait_for "$!"; }
        exit 0
    fi
    quick=$((SECONDS - begin < ${QUICK:-300} ? quick + 1 : 0))
    if [ "$quick" -ge "${TRIES:-5}" ]; then
        echo "slurm.sh: $quick starts in a row failed soon, the last with exit code $code; giving up" >&2
        exit 1
    fi
    echo "slurm.sh: all tasks start again (exit code $code, $quick in a row failed soon)" >&2
    sleep 5 &
    wait_for "$!"
done
