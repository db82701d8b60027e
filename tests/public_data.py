"""Public data sets that some tests read, and small data in the same form, on which the same tests run without them.

The folder of the public files is that of the variable MEGATRON_R1_TEST_DATA, or ../shared/data beside the repository:

    math/gsm8k_train.jsonl                                     openai/grade-school-math
    code/{mbpp.jsonl,humaneval.jsonl.gz,leetcode.json}         google-research, openai/human-eval, LeetCode with its tests
    chat/{alpaca_en_demo,alpaca_zh_demo,identity}.json         the demonstration files of LLaMA-Factory
    preference/{dpo_en_demo,dpo_zh_demo}.json, hh_harmless.jsonl.gz    the same, and Anthropic's hh-rlhf
    language/*.txt, text/chinese.md                            sentences of eight languages, a Chinese text
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.paths import ROOT

VARIABLE = "MEGATRON_R1_TEST_DATA"
FOLDER = Path(os.environ.get(VARIABLE, ROOT.parent / "shared/data"))
GSM8K = "math/gsm8k_train.jsonl"
KINDS = ["made", "public"]  #: of data that a test runs on

_VOCABULARY = """
apple basket bridge brother candle carpet chair circle coin corner cousin cup day desk door farm field fish flower friend garden
glass group hat hill hour house island kitchen ladder lake lamp letter line market meadow meter minute morning mountain neighbour
night number orange page paper pencil picture plate price river road room school shelf shop sister song spoon station stone street
student summer table teacher ticket town train tree village wall water week wheel window winter yard year buys carries counts
draws fills finds gives keeps leaves loses makes opens paints pays reads sees sells sends shares takes walks washes writes before
after under beside between without every each many few some other new old small large red blue green white
"""
_WORDS = _VOCABULARY.split()


def public_file(name: str) -> Path:
    """A public file or folder; skips the test if it is not there."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is missing in {FOLDER}: put the public file there, or set {VARIABLE} to the folder that has it")
    return path


def math_records(kind: str) -> list[dict[str, str]]:
    """Problems in the form of GSM8K: 2,000 made ones, or the 7,473 of its training split."""
    if kind == "public":
        return [json.loads(line) for line in public_file(GSM8K).read_text(encoding="utf-8").splitlines()]
    return [_math_record(random.Random(f"math {number}"), number) for number in range(2000)]


def best_math_kind() -> str:
    """For a test too long to run on both: the public problems where they are."""
    return "public" if (FOLDER / GSM8K).exists() else "made"


def math_file(kind: str, folder: Path) -> Path:
    """A file of `math_records`: a made one is written into `folder`."""
    return public_file(GSM8K) if kind == "public" else write_records(folder / "math.jsonl", math_records(kind))


def write_records(path: Path, records: list[dict]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _math_record(generator: random.Random, number: int) -> dict[str, str]:
    counts = [generator.randrange(8, 16) for _ in range(generator.randrange(3, 6))]
    story = ". ".join(" ".join(generator.choices(_WORDS, k=count)).capitalize() for count in counts)
    first, second = generator.randrange(2, 90), generator.randrange(2, 90)
    total = first + second
    return {
        "question": f"{story}. How much are {first} and {second} in story {number}?",
        "answer": f"They make {first}+{second}=<<{first}+{second}={total}>>{total}.\n#### {total}",
    }
