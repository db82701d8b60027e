# shellcheck shell=bash
# What every batch script here does besides asking for resources: look at the nodes, start the ranks, hand on signals, and start the
# job again where that helps. Read by bash, from the batch scripts alone; settings of the site are in slurm/site.env.
#
# A word in the job's folder says how the job ended (megatron_r1/runtime/job.py). Exit codes cannot: the first of hundreds of ranks to
# fail has the others killed. The words:
#
#   finished                 the job ends well
#   stopped                  a signal came and the run has saved: the job is requeued
#   stalled, retry, no word  a rank hung, an engine or a device broke, something was killed: the job is requeued, until it has failed
#                            R1_MAX_FAILURES times without a new checkpoint in between
#   failed                   bad input, a full disk: the job ends, since it would fail again

set -euo pipefail

R1_ROOT=${R1_ROOT:-${SLURM_SUBMIT_DIR:?is not set: submit this file with sbatch}}
cd "$R1_ROOT"
# shellcheck source=/dev/null
if [ -f "${R1_SITE:-slurm/site.env}" ]; then . "${R1_SITE:-slurm/site.env}"; fi

export R1_PYTHON=${R1_PYTHON:-$R1_ROOT/.venv/bin/python}
R1_LOGS=${R1_LOGS:-$R1_ROOT/slurm/logs}
R1_MAX_FAILURES=${R1_MAX_FAILURES:-3}
R1_LAUNCHER=${R1_LAUNCHER:-srun}
R1_PLAN=${R1_PLAN:-1}
R1_PREFLIGHT=${R1_PREFLIGHT:-1}
R1_PREFLIGHT_SLOWEST=${R1_PREFLIGHT_SLOWEST:-0.5}

r1_stage() { # FIRST LAST COMMAND CONFIG [SETTING...]: a stage by its own config, or, where RECIPE is set, stages of that recipe
    local first=$1 last=$2 command=$3 config=$4
    shift 4
    if [ -n "${RECIPE:-}" ]; then
        r1_run pipeline r1 --config "$RECIPE" --from "$first" --to "$last" "$@"
    else
        r1_run "$command" --config "${CONFIG:-$config}" "$@"
    fi
}

r1_run() { # ARGUMENTS: of megatron-r1, on every rank of the job
    if [ -n "${R1_PLAN_NODES:-}" ]; then # slurm/submit.sh: the planner alone, before there is a job
        r1_plan "$R1_PLAN_NODES" "$R1_PLAN_TASKS" "$@"
        exit 0
    fi
    r1_prepare
    if [ "$R1_PLAN" = 1 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
        r1_plan "${SLURM_JOB_NUM_NODES_HET_GROUP_0:-$SLURM_NNODES}" "${SLURM_NTASKS_PER_NODE:-1}" "$@"
    fi
    r1_preflight
    r1_serve_rollouts
    r1_train "$@"
    r1_end
}

r1_prepare() {
    export MEGATRON_R1_JOB="$R1_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    mkdir -p "$MEGATRON_R1_JOB"
    rm -f "$MEGATRON_R1_JOB/outcome" "$MEGATRON_R1_JOB/bad_nodes"
    export PYTHONPATH="$R1_ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    # srun hands on this shell's limits: ranks of a large job have thousands of connections.
    ulimit -S -n "$(ulimit -H -n)" || true
    # A rank on a GPU would otherwise start a thread for every core of the node.
    export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
    # From Slurm 22.05 on srun does not take this from the batch script by itself.
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    # The address under which Slurm itself reaches the first node; its name alone need not be known to the others.
    local first
    first=$(r1_slurm scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(r1_slurm scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR="${MASTER_ADDR:-$first}"
    r1_network
    # Not a function: in the background that would be a shell of its own, and the shell would get the signals meant for srun.
    # shellcheck disable=SC2206 # several options in one setting
    R1_STEP=(srun ${R1_SRUN_OPTIONS:-} --kill-on-bad-exit=1 --open-mode=append)
    R1_GROUP=()
    if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then R1_GROUP=(--het-group=0); fi
    echo "$SLURM_JOB_NAME, job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date -u +%FT%TZ): $SLURM_JOB_NODELIST;" \
        "logs in $MEGATRON_R1_JOB"
    trap 'r1_stop USR1' USR1
    trap 'r1_stop TERM' TERM
}

r1_plan() { # NODES TASKS_PER_NODE ARGUMENTS: exit with 2 and one line if the job's devices or nodes have not the memory
    local nodes=$1 tasks=$2 settings=()
    shift 2
    case $1 in
        pretrain | sft | reward-model | grpo | pipeline) ;;
        *) return 0 ;;
    esac
    if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then settings=(rollout.placement=disaggregated rollout.servers=engines); fi
    PYTHONPATH="$R1_ROOT${PYTHONPATH:+:$PYTHONPATH}" "$R1_PYTHON" -m megatron_r1.cli "$@" "${settings[@]}" --dry-run \
        --world-size "$((nodes * tasks))" --gpus-per-node "$tasks" --gpu "${R1_GPU:-H800}" >/dev/null || exit 2
}

r1_slurm() { # COMMAND...: ask Slurm, again if it refuses: a controller that starts anew or is busy answers a moment later
    local pause
    for pause in ${R1_SLURM_PAUSES:-2 10 30}; do
        if "$@"; then return 0; fi
        echo "${SLURM_JOB_NAME:-r1}: $1 ${2:-} failed, once more in $pause s" >&2
        sleep "$pause"
    done
    "$@"
}

r1_network() {
    # gloo carries objects and CPU tensors, NCCL finds its peers: both over the interface that all nodes share.
    if [ -n "${R1_NETWORK_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME="$R1_NETWORK_INTERFACE" NCCL_SOCKET_IFNAME="$R1_NETWORK_INTERFACE"
    fi
    # Which adapters carry the data: those beside the GPUs, not that of the storage or of the login network.
    if [ -n "${R1_IB_DEVICES:-}" ]; then export NCCL_IB_HCA="$R1_IB_DEVICES"; fi
    # RoCE v2 needs the index of its address; InfiniBand proper does not.
    if [ -n "${R1_ROCE_GID_INDEX:-}" ]; then export NCCL_IB_GID_INDEX="$R1_ROCE_GID_INDEX"; fi
    # 4.096 us * 2^22 = 17 s until a packet counts as lost: a switch that fails over takes longer than the default.
    export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
    # On rails (adapter i of every node on the same switch) a ring that changes the adapter would cross the spine.
    export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-0}"
    # A collective that fails ends the process, instead of leaving the GPU waiting; what was going on is then written down.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$MEGATRON_R1_JOB/nccl_trace_rank_"
    # Kernels in the order in which they are issued: what lets tensor-parallel communication run beside the product it belongs to.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Packed sequences change their length at every step, which splits memory into pieces of all sizes.
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
    # Compilers of kernels write into the home folder by default, which 512 ranks share.
    local scratch="${R1_SCRATCH:-/tmp}"
    scratch="${scratch%%/\{node\}*}"
    export TRITON_CACHE_DIR="$scratch/triton-$SLURM_JOB_ID" VLLM_CACHE_ROOT="$scratch/vllm-$SLURM_JOB_ID"
}

r1_preflight() { # Every node looks at itself and its neighbours. A bad one is named and excluded, and the job begins elsewhere.
    if [ "$R1_PREFLIGHT" != 1 ]; then return; fi
    local code=0 disk=("--disk=$R1_LOGS") log="$MEGATRON_R1_JOB/preflight-${SLURM_RESTART_COUNT:-0}"
    if [ -n "${R1_SCRATCH:-}" ]; then disk+=("--disk=$R1_SCRATCH"); fi
    "${R1_STEP[@]}" "${R1_GROUP[@]}" --output="$log-%4t.log" "$R1_PYTHON" -m megatron_r1.cli preflight "${disk[@]}" \
        --bad-nodes "$MEGATRON_R1_JOB/bad_nodes" --slowest "$R1_PREFLIGHT_SLOWEST" || code=$?
    grep '^preflight:' "$log-0000.log" || true
    rm -f "$MEGATRON_R1_JOB/outcome"
    if [ -s "$MEGATRON_R1_JOB/bad_nodes" ]; then
        R1_EXCLUDE=$(paste -sd, "$MEGATRON_R1_JOB/bad_nodes")
        r1_retry "preflight found bad nodes: $R1_EXCLUDE"
    elif [ "$code" != 0 ]; then
        r1_retry "preflight ended with code $code, see $log-*.log"
    fi
}

r1_serve_rollouts() { # In a heterogeneous job the second component's nodes sample: one engine a task.
    R1_SETTINGS=()
    if [ "${SLURM_HET_SIZE:-1}" = 1 ]; then return; fi
    local announced="$MEGATRON_R1_JOB/engines-${SLURM_RESTART_COUNT:-0}"
    "${R1_STEP[@]}" --het-group=1 --output="$MEGATRON_R1_JOB/engine_%4t.log" \
        "$R1_PYTHON" -m megatron_r1.cli serve-rollouts --announce "$announced" &
    R1_SERVERS=$!
    R1_SETTINGS=(rollout.placement=disaggregated "rollout.servers=$announced")
}

r1_train() {
    local log="$MEGATRON_R1_JOB/rank_0000.log" launch=("$R1_PYTHON" -m megatron_r1.cli)
    local shape=()
    if [ "$R1_LAUNCHER" = torchrun ]; then
        launch=(bash "$R1_ROOT/slurm/torchrun.sh" "${SLURM_NTASKS_PER_NODE:-1}")
        shape=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$((SRUN_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))")
    fi
    if [ -n "${R1_STOPPING:-}" ]; then r1_requeue "stopped by $R1_STOPPING before it began"; fi
    touch "$log"
    local begin=$(($(wc -l <"$log") + 1))
    "${R1_STEP[@]}" "${R1_GROUP[@]}" "${shape[@]}" --output="$MEGATRON_R1_JOB/rank_%4t.log" "${launch[@]}" "$@" "${R1_SETTINGS[@]}" &
    R1_SRUN=$!
    tail -n "+$begin" -F --pid="$R1_SRUN" "$log" 2>/dev/null &
    local tail=$!
    while :; do # a signal that the shell handles ends `wait` early
        R1_CODE=0
        wait "$R1_SRUN" || R1_CODE=$?
        kill -0 "$R1_SRUN" 2>/dev/null || break
    done
    R1_SRUN=
    wait "$tail" || true
    if [ -n "${R1_SERVERS:-}" ]; then kill "$R1_SERVERS" 2>/dev/null || true; fi
}

r1_stop() { # SIGNAL: have all ranks save at their next step. They may have got it themselves; once more does no harm.
    echo "$SLURM_JOB_NAME: $1: the ranks save at their next step, if there is time"
    R1_STOPPING=$1
    if [ -n "${R1_SRUN:-}" ]; then kill -USR1 "$R1_SRUN" 2>/dev/null || true; fi
}

r1_end() {
    local outcome=none why=
    if [ -s "$MEGATRON_R1_JOB/outcome" ]; then { read -r outcome; read -r why; } <"$MEGATRON_R1_JOB/outcome" || true; fi
    case $outcome in
        finished) exit 0 ;;
        failed)
            echo "$SLURM_JOB_NAME: failed: $why"
            exit 2
            ;;
        stopped) r1_requeue "$why" ;;
        *)
            if [ -n "${R1_STOPPING:-}" ]; then r1_requeue "stopped by $R1_STOPPING before there was anything to save"; fi
            r1_retry "${why:-killed, or ended without a word (srun: code $R1_CODE); see $MEGATRON_R1_JOB/rank_*.log}"
            ;;
    esac
}

r1_retry() { # WHY: start again, unless it has failed too often without getting further
    local failures=0 before='' progress='' file="$MEGATRON_R1_JOB/failures"
    if [ -s "$file" ]; then { read -r failures; read -r before; } <"$file" || true; fi
    if [ -s "$MEGATRON_R1_JOB/progress" ]; then progress=$(cat "$MEGATRON_R1_JOB/progress"); fi
    if [ "$progress" != "$before" ]; then failures=0; fi
    failures=$((failures + 1))
    printf '%s\n%s\n' "$failures" "$progress" >"$file"
    if [ "$failures" -ge "$R1_MAX_FAILURES" ]; then
        echo "$SLURM_JOB_NAME: $1"
        echo "$SLURM_JOB_NAME: failed $failures times without a new checkpoint: not started again"
        exit 1
    fi
    r1_requeue "$1 (failure $failures of $R1_MAX_FAILURES at this checkpoint)"
}

r1_requeue() { # WHY
    local state
    state=$(r1_slurm squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T | head -n 1)
    if [ "$state" != RUNNING ]; then # cancelled, out of time, or requeued by Slurm itself
        echo "$SLURM_JOB_NAME: $1; not requeued from here, the job is ${state:-gone}"
        exit 1
    fi
    echo "$SLURM_JOB_NAME: $1; requeued"
    trap '' USR1 TERM # requeueing ends this script, which must not end half-way
    if [ -n "${R1_EXCLUDE:-}" ]; then
        local known
        known=$(r1_slurm scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        if [ "$known" = "(null)" ]; then known=; fi
        r1_slurm scontrol requeuehold "$SLURM_JOB_ID"
        r1_slurm scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${known:+$known,}$R1_EXCLUDE"
        r1_slurm scontrol release "$SLURM_JOB_ID"
    else
        r1_slurm scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 0
}
