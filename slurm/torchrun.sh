#!/bin/bash
# One node's torchrun, started by srun with R1_LAUNCHER=torchrun: torchrun.sh RANKS_PER_NODE ARGUMENTS OF megatron-r1...
#
# torchrun knows no SIGUSR1, and at SIGTERM gives its ranks half a minute. So it runs in a session of its own, where Slurm's signals do
# not reach it, and they are handed to the ranks as SIGUSR1: save at the next step.
set -euo pipefail
RANKS=$1
shift
PORT=$((15000 + (SLURM_JOB_ID + 1009 * SLURM_STEP_ID) % 15000))
NODES=${SLURM_STEP_NUM_NODES:-$SLURM_JOB_NUM_NODES}
setsid "${R1_PYTHON:?}" -m torch.distributed.run --nnodes="$NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS" \
    --master-addr="${MASTER_ADDR:?}" --master-port="$PORT" --log-dir="${MEGATRON_R1_JOB:?}/node_$SLURM_NODEID" --redirects=3 --tee=3 \
    -m megatron_r1.cli "$@" &
AGENT=$!
trap 'pkill -USR1 -P "$AGENT" || true' USR1 TERM
while :; do # a signal that the shell handles ends `wait` early
    CODE=0
    wait "$AGENT" || CODE=$?
    kill -0 "$AGENT" 2>/dev/null || exit "$CODE"
done
