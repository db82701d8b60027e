#!/bin/sh
# All tests, two groups at a time, each in a process of its own; then those that look at the memory of the whole machine, alone. A group's
# output is shown when it ends, with how many tests ran. The exit code is 0 where all passed. Argument: the Python to run.
set -u
PYTHON=${1:?usage: run_tests.sh PYTHON}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHON LOGS

run_group() {
    # The longest first, so that the two end at about the same time.
    printf '%s\n' "tests/pipeline tests/gpu" "tests/distributed" "tests/slurm" "tests/unit/rewards tests/unit/curation tests/unit/rollout" \
        "tests/unit --ignore=tests/unit/rewards --ignore=tests/unit/curation --ignore=tests/unit/rollout" |
        xargs -P 2 -I '{}' sh -c '
            log=$(mktemp "$LOGS/XXXXXX")
            echo "== {}: started"
            "$PYTHON" -m pytest -q -m "not alone" {} >"$log" 2>&1
            code=$?
            echo "== {}"
            cat "$log"
            exit "$code"'
}

code=0
run_group || code=1
echo "== Alone"
"$PYTHON" -m pytest -q -m alone tests/unit || code=1
exit "$code"
