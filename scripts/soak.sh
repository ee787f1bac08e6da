#!/usr/bin/env bash
# A run on the tiny model that meets random faults (killed and stopped workers, a killed command, damaged checkpoints)
# and must end with the bits of a run that nothing happened to; half an hour on two cores.
#
#   scripts/soak.sh                                  fifty faults with ddp, fifty with zero2
#   scripts/soak.sh --faults 10 --strategy zero2     see --help
source "$(dirname "$0")/venv.sh"
[ -d data/tiny/prepared ] || sdxl-train make-tiny --out data/tiny
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then
    exec python benchmarks/soak.py "$@"
fi
python benchmarks/soak.py --strategy ddp --faults 50
python benchmarks/soak.py --strategy zero2 --faults 50
