#!/bin/bash
# sbatch for a job that fits: bash slurm/submit.sh [SBATCH OPTION...] slurm/FILE.sbatch [SETTING...]
#
# Before the queue is entered, `megatron-r1 ... --dry-run` looks at the job's own settings on its nodes. What does not fit, in memory
# or otherwise, is one line and exit code 2, and nothing is queued. CONFIG, RECIPE and R1_GPU count as with sbatch.
set -euo pipefail
cd "$(dirname "$0")/.."
export R1_ROOT=$PWD

FILE='' NODES='' TASKS='' COMPONENTS=1
OPTIONS=()
while [ $# -gt 0 ] && [ -z "$FILE" ]; do
    case $1 in
        *.sbatch) FILE=$1 ;;
        :) COMPONENTS=2 ;; # of a heterogeneous job: the second one's nodes sample
        --nodes=*) NODES=${NODES:-${1#--nodes=}} ;;
        --ntasks-per-node=*) TASKS=${TASKS:-${1#--ntasks-per-node=}} ;;
    esac
    if [ -z "$FILE" ]; then OPTIONS+=("$1"); fi
    shift
done
if [ ! -f "$FILE" ]; then
    echo "slurm/submit.sh: ${FILE:-no file} is no batch script; usage: bash slurm/submit.sh [SBATCH OPTION...] slurm/FILE.sbatch [key=value ...]" >&2
    exit 2
fi
NODES=${NODES:-$(sed -n 's/^#SBATCH --nodes=//p' "$FILE")}
TASKS=${TASKS:-$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$FILE")}
R1_PLAN_NODES=${NODES%%-*} R1_PLAN_TASKS=$TASKS SLURM_HET_SIZE=$COMPONENTS bash "$FILE" "$@"
exec sbatch "${OPTIONS[@]}" "$FILE" "$@"
