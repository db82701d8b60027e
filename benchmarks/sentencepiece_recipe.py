"""SentencePiece models of one's own through every stage: are all ids and texts those of the sentencepiece library?

    python -m benchmarks.sentencepiece_recipe --data DIR [--dir /scratch] [--kinds unigram bpe no-bos] [--out FILE.json]

For each kind a model is trained on DIR/text (English and Chinese). It encodes 10,000 and more lines of eight languages
(DIR/language, DIR/text), some of which it spells in bytes, and spaces, marks, characters that NFKC changes, its own tokens as text.
Then come the commands, as a user starts them: `preprocess`, `pretrain`, `sft`, `grpo` with vLLM, `convert export`; and transformers
and bare vLLM read what was exported. The code is 0 only if everywhere ids and texts are those of the library.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from benchmarks.measure import Disagreement, describe_machine, print_table, run, write_results
from benchmarks.processes import run_watched
from megatron_r1.data.chat.prompt_templates import ASSISTANT, USER
from megatron_r1.data.token_files import open_token_file
from megatron_r1.data.tokenizer import TAGS, Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.talk.text_stream import TokenText
from megatron_r1.rollout.options import engine_environment
from megatron_r1.runtime.kept_tokens import KEY, TokenColumns
from megatron_r1.runtime.launch import set_environment

LEAST_LINES = 10_000
LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "ru", "zh")
_PIECES = 3000
_SAME_ANSWERS = 0.9  # least share of greedy answers that are the same; the last bits of two logits may decide one
#: What a text may hold that a tokenizer changes, or takes for something else.
ODD = [
    "  two  spaces ", "\ttab", "no\u00a0break", "\u3000wide", "\u2581", "a\u2581b", "\ufb01ne \uff11\uff12 \uff21",
    "\u2460 \u00bd \u2122", "e\u0301 \u00e9", "\u1112\u1161\u11ab \ud55c", "\uff8a\uff9f \u30d1", "\u200b\u200c\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "<s>", "a</s>b", "<unk>", "<0x0A>", "\uff1c/s\uff1e", "\u0627\u0644\u0639",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "x" * 300, " ",
]  # fmt: skip

#: How each model is trained. "bpe" keeps every character (docs/how_to/sentencepiece.md); the others are the library's default,
#: nmt_nfkc, which joins spaces.
KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no-bos": {"model_type": "bpe", "bos_id": -1, "eos_id": 1, "pad_id": 2},
}
_SMALL = ["runtime.device=cpu", "runtime.threads=1", "runtime.dtype=fp32"]


@dataclass
class Subject:
    """A model that goes through the stages."""

    kind: str
    folder: Path
    library: sentencepiece.SentencePieceProcessor
    tokenizer: Tokenizer
    lines: list[str]

    @property
    def model(self) -> Path:
        """The model's file."""
        return self.folder / "own.model"

    @property
    def exported(self) -> Path:
        """What `convert export` makes."""
        return self.folder / "exported"

    def settings(self, stage: str, *others: str) -> list[str]:
        """A training command as a user writes it; behind pretraining the tokenizer is that of the weights."""
        return [stage, f"run_dir={self.folder / stage}", *_SMALL, *others]

    def begun(self, ids: list[int]) -> list[int]:
        """With the beginning of sequence, if the model has one."""
        return [self.library.bos_id()] * (self.library.bos_id() >= 0) + ids


def train(kind: str, data: Path) -> bytes:
    """The content of a .model file. Raises ConfigError if there is no text."""
    files = sorted((data / "text").glob("*.md"))
    if not files:
        raise ConfigError(f"--data {data}: there is no text/*.md")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, files)), model_writer=written, vocab_size=_PIECES, character_coverage=0.985, byte_fallback=True,
        input_sentence_size=20_000, user_defined_symbols=[*TAGS, USER, ASSISTANT], num_threads=1, minloglevel=2, **KINDS[kind],
    )  # fmt: skip
    return written.getvalue()


def read_lines(data: Path) -> list[str]:
    """Lines of eight languages, and what is odd. Raises ConfigError if a file is missing or all are too few."""
    lines: list[str] = []
    for language in LANGUAGES:
        path = data / "language" / f"{language}.txt"
        if not path.is_file():
            raise ConfigError(f"--data {data}: there is no language/{language}.txt")
        lines += path.read_text(encoding="utf-8").splitlines()
    further = [line for path in sorted((data / "text").glob("*.md")) for line in path.read_text(encoding="utf-8").splitlines()]
    lines += random.Random(0).sample(further, min(len(further), LEAST_LINES))
    lines = [line for line in dict.fromkeys(lines) if line.strip()]
    if len(lines) < LEAST_LINES:
        raise ConfigError(f"--data {data}: has {len(lines)} different lines, and {LEAST_LINES} are needed")
    return lines + ODD


def expect(holds: bool, what: str) -> None:
    """Raises Disagreement."""
    if not holds:
        raise Disagreement(what)


def expect_same(what: str, texts: Sequence[str], ours: Sequence[object], theirs: Sequence[object]) -> None:
    """Raises Disagreement with the first text of which two things differ, and how many do."""
    expect(len(ours) == len(theirs) == len(texts), f"{what}: {len(ours):,} and {len(theirs):,} of {len(texts):,}")
    wrong = [number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    if wrong:
        at = wrong[0]
        raise Disagreement(
            f"{what}: {len(wrong):,} of {len(texts):,} differ, first {texts[at]!r}: {ours[at]!r:.300} and {theirs[at]!r:.300}"
        )


def check_encodings(subject: Subject) -> str:
    """Ids, texts, and texts token by token, of all lines; and the model's own tokens in a text."""
    library, tokenizer, lines = subject.library, subject.tokenizer, subject.lines
    ids = library.encode(lines)
    expect_same("encode", lines, [tokenizer.encode_plain(line) for line in lines], ids)
    texts = library.decode(ids)
    expect_same("decode", lines, [tokenizer.decode(each) for each in ids], texts)
    expect_same("decode token by token", lines[::5], [_streamed(tokenizer, each) for each in ids[::5]], texts[::5])
    # what follows a tag keeps a space at its end, where the library drops that of the whole text
    tagged = [f"{line}{TAGS[0]}{line} {TAGS[1]} {line.strip()}" for line in lines[: -len(ODD) : 10]]
    expect_same("encode with tags", tagged, [tokenizer.encode(text) for text in tagged], library.encode(tagged))
    random_ids = [random.Random(n).choices(range(library.vocab_size()), k=12) for n in range(1000)]
    control = {library.bos_id(), library.eos_id(), library.pad_id()}
    random_ids = [[id for id in each if id not in control] for each in random_ids]
    expect_same("decode any ids", list(map(str, random_ids)), [_streamed(tokenizer, each) for each in random_ids],
                [library.decode(each) for each in random_ids])  # fmt: skip
    byte = {id for id in range(library.vocab_size()) if library.is_byte(id)}
    return f"{len(lines):,} lines, {sum(map(len, ids)):,} tokens, {sum(bool(byte & set(each)) for each in ids):,} lines with bytes"


def _streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TokenText(tokenizer.decode)
    pieces = [stream.add([id]) for id in ids]
    return "".join(pieces) + stream.add([], is_last=True)


def check_preprocess(subject: Subject) -> str:
    """The token files hold the library's ids of every line, between the beginning and the end of sequence."""
    corpus = subject.folder / "corpus.jsonl"
    kept = [line for line in subject.lines if subject.library.encode(line) and line.strip()]
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in kept), encoding="utf-8")
    prefix = subject.folder / "tokens"
    _run("preprocess", "--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer", str(subject.model), "--append-eod")
    file = open_token_file(f"{prefix}_text_document")
    file.check(subject.tokenizer)
    expected = [[*subject.begun(ids), subject.library.eos_id()] for ids in subject.library.encode(kept)]
    expect_same("preprocess", kept, [file.read(number).tolist() for number in range(file.documents)], expected)
    return f"{file.documents:,} documents, {file.tokens:,} tokens"


def check_pretrain(subject: Subject) -> str:
    """Training on these files."""
    blend = f"data.blend=[{subject.folder / 'tokens_text_document'}]"
    steps = ["pretrain.steps=20", "pretrain.global_batch_size=8", "pretrain.micro_batch_size=8", "pretrain.sequence_length=64"]
    model = ["model.preset=tiny", f"model.overrides.vocab_size={subject.library.vocab_size()}", f"data.tokenizer={subject.model}"]
    _run(*subject.settings("pretrain", *model, blend, "data.split=[99,1]", "pretrain.validation.interval=20", *steps))
    losses = _metrics(subject, "pretrain", "loss")
    expect(losses[-1] < losses[0], f"pretrain: the loss went from {losses[0]} to {losses[-1]}")
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def check_sft(subject: Subject) -> str:
    """Fine-tuning on conversations in eight languages."""
    pairs = subject.folder / "pairs.jsonl"
    asked = subject.lines[:: len(subject.lines) // 128][:128]
    records = [{"prompt": line, "response": f"{TAGS[0]}{line}{TAGS[1]}{TAGS[2]}{line}{TAGS[3]}"} for line in asked]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    given = ["sft.epochs=1", "sft.batch_size=32", "sft.max_tokens=1024", "sft.micro_batch_tokens=2048", "sft.overlong=truncate"]
    weights = f"model.weights={subject.folder / 'pretrain'}"
    _run(*subject.settings("sft", weights, "data.template=r1_chat", f"data.source={pairs}", *given))
    losses = _metrics(subject, "sft", "loss")
    return f"{len(losses)} updates, loss {losses[-1]:.2f}"


def check_grpo(subject: Subject) -> str:
    """Two rounds with vLLM: the text of every response is the library's of its tokens."""
    problems = subject.folder / "problems.jsonl"
    records = [{"question": f"{line[:40]} {n}+1=?", "answer": str(n + 1)} for n, line in enumerate(subject.lines[::200])]
    problems.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    given = [
        "grpo.rollouts=2", "grpo.prompts_per_rollout=4", "grpo.group_size=4", "grpo.minibatch_size=16",
        "data.max_prompt_tokens=256", "rollout.max_response_tokens=24", "rollout.kv_cache_bytes=67108864",
        "grpo.micro_batch_tokens=4096", "evaluate.problems=4", "evaluate.samples=1", "reward.workers=1",
        "data.heldout_fraction=0.2", "checkpoint.interval=1",
    ]  # fmt: skip
    weights = f"model.weights={subject.folder / 'sft'}"
    _run(*subject.settings("grpo", weights, "data.template=r1_chat", f"data.source={problems}", *given))
    control = {subject.library.bos_id(), subject.library.eos_id(), subject.library.pad_id()}
    texts, sampled = [], []
    for path in sorted((subject.folder / "grpo/rollouts").glob("step_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts.append(record["response"])
            sampled.append([id for id in TokenColumns.from_json(record[KEY]).ids.tolist() if id not in control])
    expect(len(texts) == 32, f"grpo: {len(texts)} responses, not 32")
    expect_same("response", texts, texts, [subject.library.decode(ids) for ids in sampled])
    return f"{len(texts)} responses, {sum(map(len, sampled)):,} tokens"


def check_export(subject: Subject) -> str:
    """Exported, the tokenizer encodes as before."""
    _run("convert", "export", "--megatron", str(subject.folder / "grpo"), "--out", str(subject.exported), "--verify")
    again = Tokenizer.load(subject.exported)
    encoded = [again.encode_plain(line) for line in subject.lines]
    expect_same("exported", subject.lines, encoded, subject.library.encode(subject.lines))
    expect(again.start_ids == subject.begun([]), f"exported: a sequence begins with {again.start_ids}")
    return ", ".join(sorted(path.name for path in subject.exported.iterdir() if "token" in path.name or "template" in path.name))


def check_reading(subject: Subject) -> str:
    """transformers and vLLM give the texts that tokenizer.json can express the library's ids, and the same answers."""
    library = subject.library
    texts = [line for line in subject.lines if _is_expressible(line, subject.kind)]
    questions = [line for line in texts[::500] if not any(token in line for token in (*TAGS, "<s>", "</s>"))]
    job = {"texts": texts, "questions": questions, "prompts": texts[:: len(texts) // 24][:24], "tokens": 12}
    given, result = subject.folder / "job.json", subject.folder / "read.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    run_watched([sys.executable, "-m", "benchmarks.read_exported", str(subject.exported), str(given), str(result)])
    read = json.loads(result.read_text(encoding="utf-8"))
    theirs, vllm = read["transformers"], read["vllm"]
    bos = library.bos_id() if library.bos_id() >= 0 else None
    expect(theirs["control"] == [bos, library.eos_id()], f"transformers: BOS and EOS are {theirs['control']}")
    expect_same("transformers", texts, theirs["texts"], [subject.begun(ids) for ids in library.encode(texts)])
    asked = [subject.tokenizer.encode_prompt("r1_chat", question)[1] for question in questions]
    expect_same("transformers, conversations", questions, theirs["conversations"], asked)
    prompts = job["prompts"]
    expect_same("vLLM", prompts, vllm["prompts"], [subject.begun(ids) for ids in library.encode(prompts)])
    same = sum(one == other for one, other in zip(vllm["answers"], theirs["answers"], strict=True))
    expect(same >= _SAME_ANSWERS * len(prompts), f"vLLM and transformers: {same} of {len(prompts)} greedy answers are the same")
    for prompt, ids, answer, text in zip(prompts, library.encode(prompts), vllm["answers"], vllm["answer_texts"], strict=True):
        written = [id for id in answer if id != library.eos_id()]
        whole = library.decode([*ids, *written])
        if "\ufffd" not in whole and library.unk_id() not in written:  # it waits for a whole character, and writes "<unk>"
            expect(whole == library.decode(ids) + text, f"vLLM, text of the answer to {prompt!r}: {whole!r} and {text!r}")
    return f"{len(texts):,} lines, {same} of {len(prompts)} answers the same"


def _is_expressible(text: str, kind: str) -> bool:
    """Whether tokenizer.json can say what the library does with a text, see docs/how_to/sentencepiece.md."""
    if text.startswith((" ", "\u2581")) or any(token in text for token in ("<s>", "</s>", "<unk>", "<0x")):
        return False
    plain = text == " ".join(text.split()) and unicodedata.is_normalized("NFKC", text) and text.isprintable()
    return kind == "bpe" or plain


STAGES: dict[str, Callable[[Subject], str]] = {
    "encode": check_encodings,
    "preprocess": check_preprocess,
    "pretrain": check_pretrain,
    "sft": check_sft,
    "grpo": check_grpo,
    "export": check_export,
    "read": check_reading,
}


def check_all(arguments: argparse.Namespace) -> None:
    """The command.

    Raises:
        Disagreement: something is not as the library has it; the first thing is named.
        CommandFailed: a command ended with an error.
    """
    lines = read_lines(arguments.data)
    set_environment(engine_environment("cpu", 1))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="megatron_r1-sentencepiece-") as scratch:
        for kind in arguments.kinds:
            results += _through_the_stages(_prepare(kind, Path(scratch).resolve() / kind, arguments.data, lines))
    print_table(["model", "stage", "what was compared", "s"], [list(map(str, result.values())) for result in results])
    if arguments.out is not None:
        write_results(arguments.out, arguments, {"sentencepiece_recipe": results}, describe_machine("cpu"))


def _prepare(kind: str, folder: Path, data: Path, lines: list[str]) -> Subject:
    folder.mkdir()
    content = train(kind, data)
    (folder / "own.model").write_bytes(content)
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    return Subject(kind, folder, library, Tokenizer.load(folder / "own.model"), lines)


def _through_the_stages(subject: Subject) -> Iterator[dict[str, Any]]:
    for name, check in STAGES.items():
        started = time.perf_counter()
        try:
            found = check(subject)
        except Disagreement as error:
            raise Disagreement(f"{subject.kind}: {error}") from None
        print(f"{subject.kind}: {name}: {found}", file=sys.stderr, flush=True)
        yield {"model": subject.kind, "stage": name, "found": found, "seconds": round(time.perf_counter() - started, 1)}


def _run(*arguments: str) -> None:
    run_watched([sys.executable, "-m", "megatron_r1.cli", *arguments])


def _metrics(subject: Subject, stage: str, name: str) -> list[float]:
    text = (subject.folder / stage / "metrics.jsonl").read_text(encoding="utf-8")
    return [line[name] for line in map(json.loads, text.splitlines()) if name in line]


def main() -> int:
    """Run the command. Returns the exit code."""
    parser = argparse.ArgumentParser(description="SentencePiece models of one's own through every stage.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with text/*.md and language/{de,en,...}.txt")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="for temporary files (default: the system's)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of models (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write what was compared")
    return run(check_all, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
