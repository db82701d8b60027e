"""The files of the small R1 pipeline: preference pairs, safety labels and conversations of the generated requests.

python tools/make_tally_chat.py --out runs/r1/data
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from megatron_r1.curation.outputs import write_json_lines
from megatron_r1.data.tally.requests import draw_request

COUNTS = {"pairs": 768, "labels": 1024, "conversations": 1024}


def make_files(folder: Path, seed: int, heldout_fraction: float) -> None:
    """Write helpful.jsonl, safety.jsonl and conversations.jsonl; training requests only."""
    rng = random.Random(f"tally chat files {seed}")

    def draw(preference: str | None = None):
        while True:
            request = draw_request(rng, False, heldout_fraction)
            if preference in (None, request.preference):
                return request

    pairs = [
        {"prompt": request.question, "chosen": rng.choice(request.good), "rejected": rng.choice(request.poor)}
        for request in (draw("helpful") for _ in range(COUNTS["pairs"]))
    ]
    labels = []
    for number in range(COUNTS["labels"]):
        request, safe = draw("safety"), number % 2 == 0
        labels.append({"prompt": request.question, "response": rng.choice(request.good if safe else request.poor), "safe": safe})
    conversations = []
    for number in range(COUNTS["conversations"]):
        request = draw()
        messages = [{"role": "user", "content": request.question}, {"role": "assistant", "content": rng.choice(request.good)}]
        conversations.append(
            {
                "id": f"request-{number}",
                "messages": messages,
                "domain": "general",
                "language": request.language,
                "source": "tally_chat",
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("helpful", pairs), ("safety", labels), ("conversations", conversations)):
        write_json_lines(folder / f"{name}.jsonl", records)


def main(argv: list[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout-fraction", type=float, default=0.1, help="as data.heldout_fraction")
    arguments = parser.parse_args(argv)
    make_files(arguments.out, arguments.seed, arguments.heldout_fraction)
    print(f"{arguments.out}: " + ", ".join(f"{number} {name}" for name, number in COUNTS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
