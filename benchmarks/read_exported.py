"""An exported folder as others read it: transformers and bare vLLM, without this project.

python -m benchmarks.read_exported FOLDER JOB.json RESULT.json

The job has "texts", "questions", "prompts" (some of the texts) and "tokens" of a greedy answer to each prompt. The result has the
ids that transformers gives texts and conversations of one question, the ids that vLLM gives the prompts, and both greedy answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_CACHE_BYTES = 64 << 20


def read_by_transformers(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Ids of texts and conversations, and greedy answers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in job["prompts"]:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job["tokens"])
        answers.append(made[0, ids.shape[1] :].tolist())
    conversations = [[{"role": "user", "content": question}] for question in job["questions"]]
    return {
        "texts": [tokenizer(text).input_ids for text in job["texts"]],
        "conversations": [
            tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=True)["input_ids"] for each in conversations
        ],
        "answers": answers,
        "control": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }


def read_by_vllm(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Ids of the prompts, and greedy answers with their texts in float32."""
    from vllm import LLM, SamplingParams

    # vLLM's CPU operator rotates the queries of latent attention wrongly, hence its plain one
    llm = LLM(
        model=folder, dtype="float32", max_model_len=1024, max_num_seqs=16, kv_cache_memory_bytes=_CACHE_BYTES, enforce_eager=True,
        attention_backend="CPU_MLA", compilation_config={"custom_ops": ["-rotary_embedding"]},
    )  # fmt: skip
    outputs = llm.generate(job["prompts"], SamplingParams(temperature=0.0, max_tokens=job["tokens"]), use_tqdm=False)
    return {
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "answer_texts": [output.outputs[0].text for output in outputs],
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    found = {"transformers": read_by_transformers(sys.argv[1], given), "vllm": read_by_vllm(sys.argv[1], given)}
    Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
