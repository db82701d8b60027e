"""Prompt/response pairs for supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.schema import SftConfig
from megatron_r1.data.records import read_records, take_text
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.types import TrainingSample


def load_sft_samples(path: Path, config: SftConfig, template: str, tokenizer: Tokenizer) -> list[TrainingSample]:
    """One sample per record of a .jsonl or .json file, with loss on the response and its end of sequence.

    The prompt is encoded as untrusted text inside the template. In the response <think> and <answer> are tokens; a written-out
    end of sequence is not, it is placed once, at the end.

    Raises:
        DataError: file and line of what is missing, malformed or longer than `config.micro_batch_tokens`.
    """
    samples = []
    for where, record in read_records(path):
        prompt = tokenizer.encode_prompt(template, take_text(record, config.prompt_field, where))[1]
        response = [*tokenizer.encode(take_text(record, config.response_field, where)), tokenizer.eos_id]
        sample = TrainingSample(token_ids=prompt + response, loss_mask=[0] * (len(prompt) - 1) + [1] * len(response))
        if sample.num_targets > config.micro_batch_tokens:
            raise DataError(
                f"{where}: {sample.num_targets} tokens are more than sft.micro_batch_tokens={config.micro_batch_tokens};"
                " raise it or remove the example"
            )
        samples.append(sample)
    return samples
