"""Convert between Hugging Face folders and Megatron checkpoints: `megatron-r1 convert` as a script.

python tools/convert_hf.py import --hf Qwen2.5-7B --out qwen-megatron
torchrun --nproc-per-node 8 tools/convert_hf.py import --hf DeepSeek-V3-Base --out v3 --pp 16 --ep 64
python tools/convert_hf.py export --megatron runs/sft --out qwen-trained --verify
python tools/convert_hf.py verify --hf DeepSeek-V3-Base --megatron v3
python tools/convert_hf.py dry-run --config DeepSeek-V3-Base/config.json --pp 16 --ep 64
"""

from __future__ import annotations

import os
import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    code = main(["convert", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is on disk; taking down an interpreter with torch in it takes a second
