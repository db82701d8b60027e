#!/bin/sh
# Tests in groups, each in a process of its own, two at a time; then those that look at the memory of the whole machine, with nothing
# beside them. A group's output is shown when it ends, with how many tests ran. The exit code is 0 if all passed, and every group had
# tests to run: a folder that is missing fails its group.
#
#   run_tests.sh PYTHON        every test (about 30 minutes on two cores)
#   run_tests.sh PYTHON fast   tests/unit without those marked `slow` and `alone` (under 3 minutes)
set -u
PYTHON=${1:?usage: run_tests.sh PYTHON [fast]}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHON LOGS MARKS
unset PYTHONDONTWRITEBYTECODE # the tests start a thousand processes, each of which would compile everything anew

# One group a line, the longest first, so that both processes end at about the same time. The last one of each list is whatever the
# others leave, so that a new folder is never forgotten.
groups() {
    if [ "$1" = fast ]; then
        rest tests/unit tests/unit/rewards tests/unit/weights tests/unit/data
        echo "tests/unit/rewards tests/unit/weights tests/unit/data"
    else
        rest tests/pipeline 'tests/pipeline/test_grpo*.py' tests/pipeline/test_gsm8k.py \
            'tests/pipeline/test_how_to*.py' tests/pipeline/test_own_loss.py tests/pipeline/test_commands.py \
            tests/pipeline/test_bad_input.py 'tests/pipeline/test_vllm*.py'
        echo "tests/distributed"
        echo "tests/pipeline/test_how_to*.py tests/pipeline/test_own_loss.py tests/pipeline/test_commands.py tests/pipeline/test_bad_input.py"
        echo "tests/pipeline/test_grpo*.py tests/pipeline/test_gsm8k.py"
        echo "tests/pipeline/test_vllm*.py"
        echo "tests/fuzz"
        echo "tests/slurm"
        echo "tests/unit/rewards tests/unit/curation tests/unit/rollout"
        rest tests tests/pipeline tests/distributed tests/fuzz tests/slurm tests/unit/rewards tests/unit/curation tests/unit/rollout
    fi
}

# All of a folder but some of its folders and files.
rest() {
    line=$1
    shift
    for part; do line="$line --ignore-glob=$part"; done
    echo "$line"
}

run_groups() {
    xargs -P 2 -I '{}' sh -c '
        log=$(mktemp "$LOGS/XXXXXX")
        echo "== {}: started"
        "$PYTHON" -m pytest -q -m "$MARKS" {} >"$log" 2>&1
        code=$?
        echo "== {}"
        cat "$log"
        exit "$code"'
}

code=0
case "${2:-all}" in
    all)
        MARKS="not alone"
        groups all | run_groups || code=1
        echo "== Alone"
        "$PYTHON" -m pytest -q -m alone tests/unit || code=1
        ;;
    fast)
        MARKS="not alone and not slow"
        groups fast | run_groups || code=1
        ;;
    *) echo "usage: run_tests.sh PYTHON [fast]" >&2; exit 2 ;;
esac
exit "$code"
