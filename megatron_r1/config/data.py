"""Settings of prompts, documents and the tokenizer: the section `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from megatron_r1.config.section import MAY_CHANGE, Section


class BlendSource(Section):
    """Tokenised documents to pretrain on. On the command line a path alone will do."""

    path: str = Field(
        min_length=1, description="Path of a .bin and its .idx without the ending, made by `megatron-r1 preprocess` or Megatron-LM."
    )
    weight: float = Field(1.0, gt=0, description="Share of the rows that come from this source, relative to the others.")


def _accept_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
    return value


Blend = Annotated[list[BlendSource], BeforeValidator(_accept_paths)]  #: of an entry that is a path alone, the weight is 1


class DataConfig(Section):
    """Where prompts and documents come from."""

    source: str = Field(
        "tally",
        description="Problems or documents: 'tally' (generated arithmetic), 'tally_chat' (the same with small talk), or a path to "
        "a .jsonl, .json, .parquet or .csv file (.gz, .zst) or a folder of such. Pretraining also reads .txt and .md files, a "
        "paragraph at a time.",
    )
    question_field: str = Field(
        "question",
        description="Name of the field that holds the question in a problem of a file: text, or a list of messages that ends with "
        "the user's. 'a.b' is field b of the object a. If the default is not there: problem, prompt, messages.",
    )
    answer_field: str = Field(
        "answer",
        description="Name of the field that holds the reference answer in a problem of a file. 'a.b' is field b of the object a. "
        "If the default is not there: reward_model.ground_truth, ground_truth, expected_answer, final_answer, solution.",
    )
    repeated: Literal["drop", "error"] = Field(
        "drop",
        description="What happens to a question that stands in a file again: it counts once, and not at all if its answers differ, "
        "and a line says how many there were; or the run stops.",
    )
    overlong: Literal["error", "drop"] = Field(
        "error",
        description="What happens to a problem of a file whose prompt is longer than data.max_prompt_tokens: the run stops, or the "
        "problem is left out. A line says how many were.",
    )
    evaluation_source: str | None = Field(
        None,
        description="File of problems to evaluate on, in place of the share in data.heldout_fraction. Questions that stand in both "
        "files are not trained on. null: see data.heldout_fraction.",
    )
    blend: Blend = Field(
        [],
        description="Tokenised documents to pretrain on, in place of data.source: a list of paths, or of {path, weight}. The order "
        "of rows follows from them and the seed alone.",
    )
    split: list[float] = Field(
        [1.0, 0.0],
        min_length=2,
        max_length=2,
        description="Shares of the documents of each source of data.blend to train on, and to validate with, relative to each "
        "other: [99, 1]. Those at the end of a source are validated with.",
    )
    index_cache: str | None = Field(
        None,
        description="Folder that keeps in which order the documents of data.blend come; all nodes must see it. `megatron-r1 "
        "build-index` fills it ahead. null: index in run_dir.",
        json_schema_extra=MAY_CHANGE,
    )
    read_ahead: int = Field(
        1,
        ge=0,
        description="Updates of pretraining whose rows wait in memory before they are trained on, 36 bytes a token. "
        "0: rows are read when the update needs them.",
        json_schema_extra=MAY_CHANGE,
    )
    text_field: str = Field("text", description="Name of the field that holds the text in a .jsonl or .json file for pretraining.")
    answer_format: Literal["plain", "gsm8k"] = Field(
        "plain", description="What the answer field holds. plain: the answer alone; gsm8k: a solution whose answer follows '####'."
    )
    tokenizer: str | None = Field(
        None,
        description="Folder with tokenizer.json or a SentencePiece model, or that file itself. null: that of model.weights, or "
        "one made for the generated data.",
    )
    template: Literal["r1_zero", "r1_chat", "r1_chat_think", "tokenizer"] = Field(
        "r1_zero",
        description="How a prompt is written. r1_zero: the template of R1-Zero (R1 v1 Table 1); r1_chat: DeepSeek-R1's chat "
        "template; r1_chat_think: its later revision, whose prompts end in <think>; tokenizer: the tokenizer's own chat_template.",
    )
    template_arguments: dict[str, Any] = Field(
        {},
        description="Further arguments of the tokenizer's own chat_template by their names, e.g. "
        "data.template_arguments.enable_thinking=false. Each must be one that the template reads.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message before every question. A problem with another one of its own is refused. null: none.",
    )
    question_prefix: str = Field("", description="Text right before every question, inside of the user's message.")
    question_suffix: str = Field("", description="Text right after every question, inside of the user's message.")
    general_source: str | None = Field(
        None,
        description="General prompts for reinforcement learning over all scenarios: 'tally_chat', or a path to a .jsonl or .json "
        "file of problems of kind general. null: reasoning prompts alone.",
    )
    general_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of general prompts among all prompts while general ones come, see grpo.general_updates. The paper does "
        "not state it.",
    )
    max_prompt_tokens: int = Field(
        1024,
        gt=0,
        description="Most tokens of a prompt. No prompt is cut, see data.overlong.",
        json_schema_extra=MAY_CHANGE,
    )
    heldout_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the problems that is kept for evaluation and never trained on, chosen by a hash of the question. "
        "0: none is kept, see data.evaluation_source and evaluate.problems. The paper does not state it.",
    )

    @field_validator("split")
    @classmethod
    def _check_shares(cls, value: list[float]) -> list[float]:
        if min(value) < 0 or not value[0]:
            raise ValueError("two shares of which none is negative and the first, of training, is not 0")
        return value

    def asked_with(self) -> dict[str, Any]:
        """The settings beside the template that say how a question is asked, without those that ask it as it is."""
        given = self.model_dump(include={"template_arguments", "system_prompt", "question_prefix", "question_suffix"})
        return {name: value for name, value in given.items() if value != type(self).model_fields[name].default}
