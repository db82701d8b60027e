"""Settings of prompts, documents and the tokenizer: the section `data`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section


class DataConfig(Section):
    """Where prompts and documents come from."""

    source: str = Field(
        "tally",
        description="'tally' (generated arithmetic), 'tally_chat' (the same with small talk) or a path to a .jsonl / .json file of "
        "problems or documents",
    )
    question_field: str = "question"
    answer_field: str = "answer"
    text_field: str = Field("text", description="of the records of a .jsonl or .json file that is pretrained on")
    answer_format: Literal["plain", "gsm8k"] = Field("plain", description="gsm8k: the answer is what follows '####'")
    tokenizer: str | None = Field(None, description="folder with tokenizer.json; default: model.weights")
    template: Literal["r1_zero", "r1_chat", "r1_chat_think", "tokenizer"] = Field(
        "r1_zero",
        description="r1_chat: DeepSeek-R1's; r1_chat_think: its later revision, whose prompts end in <think>; tokenizer: the "
        "tokenizer's own chat_template",
    )
    general_source: str | None = Field(
        None,
        description="general prompts for RL over all scenarios: 'tally_chat' or a .jsonl / .json file of problems of kind general",
    )
    general_share: float = Field(
        0.5, ge=0, le=1, description="of the prompts, while general ones come (not stated; see grpo.general_updates)"
    )
    max_prompt_tokens: int = Field(1024, gt=0, description="longer prompts are refused by name, not cut")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share of problems kept for evaluation, by a hash of the problem")
