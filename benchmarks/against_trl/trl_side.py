"""TRL's side: its GRPOTrainer as a user starts it, but every round waits for its turn. Runs in TRL's environment.

    python -m benchmarks.against_trl.trl_side COMMANDS REPORTS SPEC

COMMANDS and REPORTS are the file descriptors of `gate.Gate`; the file SPEC is written by `rl_step.measure`. Its first turn computes
log-probs, losses and gradient norms of the other side's first round with TRL's own functions, before its first update; all batch
sizes that it may take are timed with it, and it trains with the fastest. Each round then reports the lengths of its responses and
the seconds of its parts, taken around TRL's own methods.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.against_trl.gate import Gate
from benchmarks.against_trl.reward import score


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that adds up the seconds of its parts, and takes the ids of a prompt from `prompt_ids`."""

    prompt_ids: dict[str, list[int]]

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lengths: list[int] = []
        super().__init__(*arguments, **settings)

    def _timed(self, part: str, work: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*arguments, **settings)
        finally:
            self.seconds[part] += time.perf_counter() - started

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def _generate(self, prompts: list[str]) -> Any:
        result = self._timed("rollout", super()._generate, prompts)
        self.lengths += map(len, result[1])
        return result

    def _calculate_rewards(self, *arguments: Any, **settings: Any) -> Any:
        return self._timed("reward", super()._calculate_rewards, *arguments, **settings)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **settings: Any) -> Any:
        part = "update/forward" if torch.is_grad_enabled() else "logprob"
        return self._timed(part, super()._get_per_token_logps_and_entropies, *arguments, **settings)


class Turns(TrainerCallback):
    """Waits at the gate before the first update of every round."""

    def __init__(self, gate: Gate, updates: int) -> None:
        self._gate, self._updates = gate, updates
        self.trainer: TimedTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates:
            return
        trainer = self.trainer
        report = {"lengths": trainer.lengths, "seconds": dict(trainer.seconds)}
        if self._gate.wait(report) == "end":
            sys.exit(0)
        trainer.lengths = []
        trainer.seconds.clear()


def make_trainer(spec: dict[str, Any], settings: dict[str, Any], callback: Turns) -> TimedTrainer:
    """The trainer of `spec` with one of its settings."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    dataset = Dataset.from_dict({"prompt": [prompt["text"] for prompt in spec["prompts"]]})
    trainer = TimedTrainer(
        model=spec["model"],
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.prompt_ids = {prompt["text"]: prompt["token_ids"] for prompt in spec["prompts"]}
    callback.trainer = trainer
    return trainer


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward of both sides, as TRL calls it."""
    return [score(prompt, completion, "") for prompt, completion in zip(prompts, completions, strict=True)]


def try_batches(
    trainer: TimedTrainer, content: dict[str, Any], choices: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of `check` for the first of the settings, with the seconds of each, and the settings that were the fastest."""
    sizes = [settings["per_device_train_batch_size"] for settings in choices]
    check(trainer, content | {"minibatches": [content["minibatches"][0][: sizes[0]]]}, sizes[0])  # so that none is the first
    seconds, reports = [], []
    for size in sizes:
        started = time.perf_counter()
        reports.append(check(trainer, content, size))
        seconds.append(time.perf_counter() - started)
    fastest = choices[seconds.index(min(seconds))]
    tried = {"batch": fastest["per_device_train_batch_size"], "batch_seconds": dict(zip(sizes, seconds, strict=True))}
    return reports[0] | tried, fastest


def check(trainer: TimedTrainer, content: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """What TRL makes of the other side's samples: the largest difference of log-probs, loss and gradient norm of each minibatch."""
    samples, largest, total, count = content["samples"], 0.0, 0.0, 0
    losses, norms = [], []
    model = trainer.model.train()
    for minibatch in content["minibatches"]:
        chunks = [minibatch[start : start + batch_size] for start in range(0, len(minibatch), batch_size)]
        trainer.current_gradient_accumulation_steps = len(chunks)
        loss = 0.0
        for chunk in chunks:
            chosen = [samples[number] for number in chunk]
            inputs = _inputs(chosen, trainer._tokenizer.pad_token_id)
            whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            kept = inputs["completion_ids"].shape[1]
            with torch.no_grad():
                inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(trainer.ref_model, whole, mask, kept)[0]
            expected = _padded([s["logprobs"] for s in chosen], 0.0, left=False)
            difference = ((inputs["ref_per_token_logps"] - expected) * inputs["completion_mask"]).abs()
            largest = max(largest, difference.max().item())
            total, count = total + difference.sum().item(), count + int(inputs["completion_mask"].sum())
            part = trainer._compute_loss(model, inputs)
            part.backward()
            loss += part.item()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        losses.append(loss)
        model.zero_grad(set_to_none=True)
    trainer.seconds.clear()
    trainer._metrics["train"].clear()
    return {"largest_difference": largest, "mean_difference": total / count, "losses": losses, "grad_norms": norms}


def _inputs(samples: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """One batch as `_generate_and_score_completions` makes it."""
    prompts, responses = [s["prompt"] for s in samples], [s["response"] for s in samples]
    return {
        "prompt_ids": _padded(prompts, pad, left=True),
        "prompt_mask": _padded([[1] * len(ids) for ids in prompts], 0, left=True),
        "completion_ids": _padded(responses, pad, left=False),
        "completion_mask": _padded([[1] * len(ids) for ids in responses], 0, left=False),
        "advantages": torch.tensor([s["advantage"] for s in samples]),
        "num_items_in_batch": torch.tensor(sum(map(len, responses))),
    }


def _padded(rows: list[list[Any]], value: Any, *, left: bool) -> torch.Tensor:
    longest = max(map(len, rows))
    padding = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for pad, row in zip(padding, rows, strict=True)])


def main(commands: str, reports: str, spec_file: str) -> None:
    """Wait, check, train."""
    gate = Gate(int(commands), int(reports))
    spec = json.loads(Path(spec_file).read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    turns = Turns(gate, spec["updates_per_round"])
    trainer = make_trainer(spec, spec["settings"][0], turns)
    config = trainer.model.config
    report = {
        "threads": torch.get_num_threads(),
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "versions": spec["versions"],
    }
    if gate.wait(report) == "end":
        return
    report, fastest = try_batches(trainer, json.loads(Path(spec["check"]).read_text()), spec["settings"])
    if gate.wait(report) == "end":
        return
    if fastest is not spec["settings"][0]:
        trainer = make_trainer(spec, fastest, turns)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
