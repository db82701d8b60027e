"""Tokenise text for pretraining: `megatron-r1 preprocess` as a script.

python tools/preprocess_data.py --input corpus/ --output-prefix tokens/corpus --tokenizer tokenizer --append-eod --workers 16
mpirun -n 64 python tools/preprocess_data.py --input corpus/ --output-prefix tokens/corpus --tokenizer tokenizer --append-eod
python tools/preprocess_data.py --input a.jsonl.gz b.parquet --text-field content --output-prefix tokens/code \\
    --tokenizer tokenizer --append-eod --skip-bad --dedup --decontaminate mbpp=mbpp.jsonl
"""

from __future__ import annotations

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
