#!/bin/bash
# The whole R1 recipe as jobs that wait for each other: bash slurm/r1.sh [--dry-run] [SETTING...]
#
# Prints the jobs as a graph. What is finished is left out, what is queued already is waited for, so the same command goes on after a
# failure. RECIPE=FILE chooses the settings, by default the H800 preset; each SETTING (key=value) holds for all jobs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
if [ -f "${R1_SITE:-slurm/site.env}" ]; then . "${R1_SITE:-slurm/site.env}"; fi
export RECIPE=${RECIPE:-examples/v3_671b/r1.yaml}
PYTHON=${R1_PYTHON:-.venv/bin/python}

DRY=
if [ "${1:-}" = --dry-run ]; then
    DRY=1
    shift
fi
case "${1:-}" in -*)
    echo "slurm/r1.sh: unknown option $1; usage: bash slurm/r1.sh [--dry-run] [key=value ...]" >&2
    exit 2
    ;;
esac

# Also checks the settings of every stage, before anything is queued: one line and exit code 2 where one is wrong.
PLAN=$("$PYTHON" -m megatron_r1.cli pipeline r1 --config "$RECIPE" --dry-run "$@")
MARK="r1.sh $(printf '%s\n' "$RECIPE" "$PWD" "$@" | cksum | cut -d' ' -f1)" # marks the jobs of this recipe

is_finished() { # STAGE
    awk -v stage="$1" '$1 == stage && $2 == "finished" { found = 1 } END { exit !found }' <<<"$PLAN"
}

queued() { # JOB_NAME: the id of this recipe's job of that name
    local pause found
    for pause in ${R1_SLURM_PAUSES:-2 10 30} ''; do # a controller that starts anew or is busy answers a moment later
        if found=$(squeue --noheader --me --name="$1" --format='%i %k'); then
            awk -v mark="$MARK" '$2 " " $3 == mark { print $1; exit }' <<<"$found"
            return
        fi
        if [ -n "$pause" ]; then sleep "$pause"; fi
    done
    return 1
}

queue() { # JOB_NAME OPTION...: sbatch, again where it fails, unless the job is there in spite of it
    local name=$1 pause id
    shift
    for pause in ${R1_SLURM_PAUSES:-2 10 30} ''; do
        if id=$(sbatch --parsable --comment="$MARK" "$@"); then
            echo "${id%%;*}" # without the name of the cluster
            return
        fi
        if [ -z "$pause" ]; then return 1; fi
        sleep "$pause"
        id=$(queued "$name")
        if [ -n "$id" ]; then
            echo "$id"
            return
        fi
    done
}

declare -A JOBS=() # file -> job id, of those that others wait for

submit() { # FILE JOB_NAME AFTER STAGE...: queue FILE after the job of the file AFTER, unless its stages are finished
    local file=$1 name=$2 after=$3 stage todo='' id wait=()
    shift 3
    for stage in "$@"; do if ! is_finished "$stage"; then todo+=" $stage"; fi; done
    if [ -z "$todo" ]; then
        printf '%-10s %-10s %s\n' "$file" finished "$*"
        return
    fi
    local behind='' previous="${after:+${JOBS[$after]:-}}"
    if [ -n "$previous" ]; then
        behind=" after $previous ($after)"
        wait=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    fi
    if [ -n "$DRY" ]; then
        JOBS[$file]=$file
        printf '%-10s %-10s%s%s\n' "$file" "to do" "$todo" "${behind:+ after $after}"
        return
    fi
    id=$(queued "$name")
    if [ -n "$id" ]; then
        printf '%-10s %-10s%s%s\n' "$file" "is $id" "$todo" "$behind"
    else
        if [ "${R1_PLAN:-1}" = 1 ]; then
            local todo_nodes todo_tasks
            todo_nodes=$(sed -n 's/^#SBATCH --nodes=//p' "slurm/$file.sbatch")
            todo_tasks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "slurm/$file.sbatch")
            R1_ROOT=$PWD R1_PLAN_NODES=$todo_nodes R1_PLAN_TASKS=$todo_tasks bash "slurm/$file.sbatch" "${SETTINGS[@]}"
        fi
        # shellcheck disable=SC2086 # several options in one setting
        id=$(queue "$name" "${wait[@]}" ${R1_SBATCH_OPTIONS:-} "slurm/$file.sbatch" "${SETTINGS[@]}")
        printf '%-10s %-10s%s%s\n' "$file" "job $id" "$todo" "$behind"
    fi
    JOBS[$file]=$id
}

SETTINGS=("$@")
submit pretrain r1-pretrain '' base
submit r1_zero r1-zero pretrain zero
submit r1_stage1 r1-stage1 r1_zero stage1
submit r1_stage2 r1-stage2 r1_stage1 stage2
submit r1_stage3 r1-stage3 r1_stage2 helpful safety stage3
submit r1_stage4 r1-stage4 r1_stage3 stage4
submit distill r1-distill r1_stage3 student distill student_rl
