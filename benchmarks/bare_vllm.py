"""vLLM without this project: `vllm.LLM.generate` in a process of its own, which waits for its turns at a gate.

python -m benchmarks.bare_vllm COMMANDS_FD REPORTS_FD JOB.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.against_trl.gate import Gate


def serve(gate: Gate, job: dict[str, Any]) -> None:
    """Sample all responses of the job at every turn; report their token ids.

    Args:
        job: "engine", arguments of vllm.LLM; "prompts", token ids; "seeds", of each prompt's responses; "tokens" of each response.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    requests = [(ids, seed) for ids, seeds in zip(job["prompts"], job["seeds"], strict=True) for seed in seeds]

    def sample() -> list[list[int]]:
        # As a trainer asks: a log-prob for every token, and no text of its own, since it has the tokenizer.
        settings = [
            SamplingParams(
                temperature=1.0,
                max_tokens=job["tokens"],
                ignore_eos=True,
                seed=seed,
                logprobs=0,
                detokenize=False,
            )
            for _, seed in requests
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    report: dict[str, Any] = {}
    while gate.wait(report) != "end":
        report = {"token_ids": sample()}


if __name__ == "__main__":
    serve(Gate(int(sys.argv[1]), int(sys.argv[2])), json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
