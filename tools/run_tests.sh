#!/bin/sh
# All tests in two processes: those of several processes or of vLLM, and the unit tests beside them; then those that look at the memory of
# the whole machine, alone. Prints how many ran in each; the exit code is 0 where all passed. Argument: the Python to run.
set -u
PYTHON=${1:?usage: run_tests.sh PYTHON}
UNIT=$(mktemp)
trap 'kill "$BESIDE" 2>/dev/null; rm -f "$UNIT"; exit 1' INT TERM

"$PYTHON" -m pytest -q -m "not alone" tests/unit >"$UNIT" 2>&1 &
BESIDE=$!
code=0
"$PYTHON" -m pytest -q tests/distributed tests/pipeline tests/gpu || code=$?
wait "$BESIDE" || code=$?
echo "== tests/unit, which ran beside these"
cat "$UNIT"
rm -f "$UNIT"
echo "== Alone"
"$PYTHON" -m pytest -q -m alone tests/unit || code=$?
exit "$code"
