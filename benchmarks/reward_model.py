"""What a tiny reward model learns from few preference pairs, against two ways to guess that need no network.

    python -m benchmarks.reward_model --data hh_harmless.jsonl.gz [--seeds 0 1 2] [--out FILE.json]

A fixed fifth of the pairs, by a hash of the conversation's opening, is held out before anything else is done. On the text of the
rest a tokenizer is trained, then a small language model (`megatron-r1 pretrain`); from that `megatron-r1 reward-model` runs as a
user starts it, once for every seed. Of a conversation it is given the last question alone: the model is too small to make use of
more. The finished model scores the held-out pairs; accuracy is the share whose preferred response is scored higher. The peers are a
logistic regression on the words and pairs of words of the two responses, and the rule that the shorter response is preferred.

All settings were chosen on parts of the training pairs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import describe_machine, print_table, run, write_results
from benchmarks.processes import run_watched
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.chat.prompt_templates import fixed_texts
from megatron_r1.data.preferences import LabelledDialogues, read_pairs, split_heldout
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import DataError
from megatron_r1.pipeline.builders.preferences import load_reward_scorer
from megatron_r1.pipeline.session import open_session

ROOT = Path(__file__).resolve().parents[1]
HELDOUT, LEAST_HELDOUT = 0.2, 400
VOCABULARY = 2048
EXAMPLES = "examples/reward_model"
WORD = re.compile(r"[a-z']+|[?.!,]|\d+")
LEAST_COUNT, PENALTY = 3, 0.01  # of the logistic regression: how often a word must occur; half the ridge


def keep_last_questions(pairs: list[LabelledDialogues]) -> list[LabelledDialogues]:
    """The same pairs without the turns before the last."""
    return [replace(p, dialogues=tuple(replace(d, messages=d.messages[-1:]) for d in p.dialogues)) for p in pairs]


def write_pairs(path: Path, pairs: list[LabelledDialogues]) -> None:
    """As `reward-model` reads them: two whole dialogues of messages each."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            sides = [[*map(asdict, d.messages), {"role": "assistant", "content": d.response}] for d in pair.dialogues]
            file.write(json.dumps(dict(zip(("chosen", "rejected"), sides, strict=True))) + "\n")


def write_tokenizer(folder: Path, pairs: list[LabelledDialogues]) -> None:
    """Trained on every turn."""
    dialogues = [dialogue for pair in pairs for dialogue in pair.dialogues]
    texts = [text for d in dialogues for text in (*(message.content for message in d.messages), d.response)]
    train_tokenizer(texts, VOCABULARY, single_tokens=fixed_texts("r1_chat")).save(folder)


def write_documents(path: Path, pairs: list[LabelledDialogues]) -> None:
    """Every whole dialogue of both sides as a text to pretrain on."""
    with path.open("w", encoding="utf-8") as file:
        for dialogue in (dialogue for pair in pairs for dialogue in pair.dialogues):
            turns = [(m.role, m.content) for m in dialogue.messages] + [("assistant", dialogue.response)]
            text = "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {content}" for role, content in turns)
            file.write(json.dumps({"text": text}) + "\n")


def pretrain(folder: Path, documents: Path, tokenizer: Path) -> float:
    """A run of the command in `folder`; its wall seconds."""
    settings = [f"run_dir={folder}", f"data.source={documents}", f"data.tokenizer={tokenizer}"]
    return _command("pretrain", f"{EXAMPLES}/pretrain.yaml", settings)


def train(folder: Path, data: Path, weights: Path, seed: int) -> float:
    """The same for the reward model."""
    settings = [f"run_dir={folder}", f"data.source={data}", f"model.weights={weights}", f"seed={seed}"]
    return _command("reward-model", f"{EXAMPLES}/tiny_cpu.yaml", [*settings, "data.heldout_fraction=1e-9"])


def _command(name: str, config: str, settings: list[str]) -> float:
    return run_watched([sys.executable, "-m", "megatron_r1.cli", name, "--config", config, *settings]).wall_seconds


def judge(weights: Path, pairs: list[LabelledDialogues]) -> torch.Tensor:
    """[P] 1 where the finished model prefers the chosen response, 0 where the other, half where it scores both the same."""
    config = Config(runtime=RuntimeConfig(device="cpu"), model=ModelConfig(weights=str(weights)))
    with open_session(config.runtime) as session:
        responses = [(dialogue.messages, dialogue.response) for pair in pairs for dialogue in pair.dialogues]
        scores = load_reward_scorer(config, session).score(responses)
    chosen, rejected = (torch.tensor(scores[side::2]) for side in (0, 1))
    return correct(chosen - rejected)


def correct(margin: torch.Tensor) -> torch.Tensor:
    """[P] 1, half or 0 by the sign."""
    return (margin.sign().double() + 1) / 2


def prefer_shorter(pairs: list[LabelledDialogues]) -> torch.Tensor:
    """The same for the rule that needs no training."""
    lengths = torch.tensor([[len(dialogue.response) for dialogue in pair.dialogues] for pair in pairs])
    return correct(lengths[:, 1] - lengths[:, 0])


def bag_of_words(training: list[LabelledDialogues], heldout: list[LabelledDialogues]) -> torch.Tensor:
    """The same for Bradley and Terry's model on whether a word or a pair of words occurs."""
    counts = Counter(word for pair in training for dialogue in pair.dialogues for word in _words(dialogue.response))
    columns = {word: column for column, word in enumerate(word for word, count in counts.items() if count >= LEAST_COUNT)}

    def differences(pairs: list[LabelledDialogues]) -> torch.Tensor:
        matrix = torch.zeros(len(pairs), len(columns))
        for row, pair in enumerate(pairs):
            for sign, dialogue in zip((1, -1), pair.dialogues, strict=True):
                for word in _words(dialogue.response) & columns.keys():
                    matrix[row, columns[word]] += sign
        return matrix

    inputs = differences(training)
    weights = torch.zeros(len(columns), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.softplus(-inputs @ weights).mean() + PENALTY * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return correct(differences(heldout) @ weights)


def _words(text: str) -> set[str]:
    words = ["", *WORD.findall(text.lower().replace("’", "'")), ""]
    return {*words, *(f"{first} {second}" for first, second in pairwise(words))}


def benchmark(arguments: argparse.Namespace) -> None:
    """Train and judge once for every seed."""
    training, heldout = split_heldout(read_pairs(arguments.data), HELDOUT)
    if len(heldout) < LEAST_HELDOUT:
        raise DataError(f"--data {arguments.data}: only {len(heldout)} pairs would be held out, {LEAST_HELDOUT} are needed")
    machine = describe_machine("cpu")
    judged = {"shorter response": prefer_shorter(heldout), "words and pairs of words": bag_of_words(training, heldout)}
    seconds = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(folder / "tokenizer", training)
        write_documents(folder / "documents.jsonl", training)
        training, heldout = keep_last_questions(training), keep_last_questions(heldout)
        write_pairs(folder / "training.jsonl", training)
        seconds["pretraining"] = pretrain(folder / "base", folder / "documents.jsonl", folder / "tokenizer")
        for seed in arguments.seeds:
            seconds[f"seed {seed}"] = train(folder / str(seed), folder / "training.jsonl", folder / "base/hf", seed)
            judged[f"reward model, seed {seed}"] = judge(folder / str(seed) / "hf", heldout)
    of_seeds = [values for name, values in judged.items() if name.startswith("reward model")]
    judged[f"reward model, mean of {len(of_seeds)} seeds"] = torch.stack(of_seeds).mean(0)
    results = {name: {"accuracy": float(v.mean()), "standard_error": float(v.std() / len(v) ** 0.5)} for name, v in judged.items()}
    print(f"{len(training)} pairs to train on, {len(heldout)} held out")
    rows = [(name, f"{100 * r['accuracy']:.1f}%", f"{100 * r['standard_error']:.1f}") for name, r in results.items()]
    print_table(("who prefers", "held-out accuracy", "standard error"), rows)
    print("seconds of the commands: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    if arguments.out is not None:
        counts = {"training_pairs": len(training), "heldout_pairs": len(heldout)}
        write_results(arguments.out, arguments, {**counts, "results": results, "seconds": seconds}, machine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Anthropic's harmless pairs, harmless-base/test.jsonl.gz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the head and the order")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures, with machine and versions")
    return run(benchmark, parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
