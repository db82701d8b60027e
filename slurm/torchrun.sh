#!/bin/bash
# One node's torchrun, started by srun with R1_LAUNCHER=torchrun: torchrun.sh RANKS_PER_NODE ARGUMENTS OF megatron-r1...
#
# Slurm signals every process here. torchrun would die of SIGUSR1, and at SIGTERM give its ranks half a minute, so it ignores both; the
# ranks get them, too, and save at their next step.
set -euo pipefail
RANKS=$1
shift
PORT=$((15000 + (SLURM_JOB_ID + 1009 * SLURM_STEP_ID + 4001 * ${SLURM_RESTART_COUNT:-0}) % 15000))
NODES=${SLURM_STEP_NUM_NODES:-$SLURM_JOB_NUM_NODES}
trap '' USR1 TERM
exec "${R1_PYTHON:?}" -m torch.distributed.run --nnodes="$NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS" \
    --master-addr="${MASTER_ADDR:?}" --master-port="$PORT" --log-dir="${MEGATRON_R1_JOB:?}/node_$SLURM_NODEID" --redirects=3 --tee=3 \
    --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m megatron_r1.cli "$@"
