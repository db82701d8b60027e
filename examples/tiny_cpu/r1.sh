#!/bin/sh
# The whole R1 recipe on two CPU cores: makes the small world's files, starts the stand-in for a served model, runs the pipeline.
# Started again, it goes on where it was. Arguments are passed on, e.g. `sh examples/tiny_cpu/r1.sh --to stage2 seed=1`.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
PORT=8901

"$PYTHON" tools/make_tally_chat.py --out runs/r1/data
"$PYTHON" tools/serve_tally_rules.py --port "$PORT" &
RULES=$!
trap 'kill "$RULES" 2>/dev/null || true' EXIT INT TERM
"$PYTHON" -m megatron_r1.cli pipeline r1 --config examples/tiny_cpu/r1.yaml "$@"
