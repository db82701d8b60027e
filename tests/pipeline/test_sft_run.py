"""Supervised fine-tuning from the command line: mixture, validation, a kill and its resume, starting points, errors."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.data.chat.conversations import read_conversation
from megatron_r1.data.chat.prompt_templates import r1_chat_jinja
from megatron_r1.data.chat.template import describe_sample
from megatron_r1.data.record_files import read_records
from megatron_r1.data.sft import PREVIEW, SftData
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.pipeline.artifact import hash_files
from megatron_r1.runtime import distributed
from megatron_r1.runtime.run import Run
from tests.paths import ROOT
from tests.public_data import KINDS, public_file

EXAMPLE = str(ROOT / "examples/tiny_cpu/sft_chat.yaml")


@pytest.fixture(autouse=True)
def one_command_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is a process: forget where the ranks of the commands before met."""
    monkeypatch.setattr(distributed, "_STORE", None)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources of different weight, two epochs of seven updates with validation, and a checkpoint every other step."""
    folder = tmp_path_factory.mktemp("chat")
    train_tally_tokenizer(template="r1_chat").save(folder / "tokenizer")
    sizes = {"long": 40, "short": 16}
    for name, size in sizes.items():
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"first {n}"},
                    {"role": "assistant", "content": f"<think>\n{n}\n</think>\n\n{n}"},
                ]
            }
            for n in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [{"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in (("long", 1.0), ("short", 2.0))]
    return [
        f"data.tokenizer={folder / 'tokenizer'}", "data.template=r1_chat", "runtime.device=cpu",
        "model.overrides.num_hidden_layers=2",
        f"sft.sources={json.dumps(sources)}", "sft.epochs=2", "sft.batch_size=8", "sft.micro_batch_tokens=96",
        "sft.validation_fraction=0.1",
        "sft.validation_interval=5", "sft.optimizer.lr=1e-3", "sft.moe.bias_update_rate=1e-3", "checkpoint.interval=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(["sft", f"run_dir={folder}", *settings]) == 0
    return folder


def test_metrics_tell_loss_validation_and_tokens(whole: Path, runs) -> None:
    lines = runs.read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(15))
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 5, 10, 14]
    assert lines[-1]["validation/loss"] < 0.8 * lines[0]["validation/loss"] and lines[-1]["loss"] < 0.8 * lines[1]["loss"]
    assert lines[1]["lr"] > lines[-1]["lr"] == pytest.approx(1e-4), "cosine to a tenth"
    assert all(line["tokens"] > line["tokens/trained"] > 0 and line["samples/dropped"] == 0 for line in lines[1:])
    assert all(0.5 < line["tokens/packed_fraction"] <= 1.0 for line in lines[1:])


def test_the_finished_model_names_its_sources_and_carries_the_chat_template(whole: Path) -> None:
    manifest = json.loads((whole / "hf/artifact.json").read_text())
    assert {"sft.sources.0", "sft.sources.1"} <= manifest["inputs"].keys()
    assert Tokenizer.load(whole / "hf").chat_template == r1_chat_jinja()


def test_an_interrupted_run_ends_bit_by_bit_as_one_that_was_not(
    whole: Path, settings: list[str], runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: in the first epoch, and after a step whose checkpoint was not written yet. (SIGKILL: test_grpo_run.py.)"""
    folder = tmp_path / "run"
    for last in (3, 9):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "record", interrupt_after(last, Run.record))
            assert cli.main(["sft", f"run_dir={folder}", *settings]) == cli.INTERRUPTED
        assert len(runs.read_metrics(folder)) == last + 1 and not (folder / "hf").exists()
    assert cli.main(["sft", f"run_dir={folder}", *settings]) == 0
    assert runs.read_metrics(folder) == runs.read_metrics(whole)
    assert hash_files(folder / "hf") == hash_files(whole / "hf")


def test_after_running_out_of_memory_it_goes_on_with_smaller_micro_batches_on_a_copy_of_the_data_and_for_longer(
    whole: Path, settings: list[str], runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """From the command line alone, from a stopped run and from a finished one: both end alike."""
    expected, smaller = runs.read_metrics(whole), "sft.micro_batch_tokens=48"
    sources = json.loads(settings[4].removeprefix("sft.sources="))
    for source in sources:
        source["path"] = str(shutil.copyfile(source["path"], tmp_path / f"copy of {Path(source['path']).name}"))
    moved = [*settings[:4], f"sft.sources={json.dumps(sources)}", *settings[5:], smaller]
    longer = [*moved, "sft.epochs=4", "sft.optimizer.decay_updates=14"]

    stopped, finished = tmp_path / "stopped", tmp_path / "finished"
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Run, "record", fail_after(3, Run.record))
        cli.main(["sft", f"run_dir={stopped}", *settings])
    assert cli.main(["sft", f"run_dir={stopped}", *moved, "sft.epochs=4"]) == 2
    told = "sft.optimizer.decay_updates=14 to keep the rate that it fell to, or sft.optimizer.decay_updates=28"
    assert told in capfd.readouterr().err
    assert cli.main(["sft", f"run_dir={stopped}", *longer]) == 0

    shutil.copytree(whole, finished)
    assert cli.main(["sft", f"run_dir={finished}", *moved]) == 0
    assert "is finished" in capfd.readouterr().out and runs.read_metrics(finished) == expected
    assert cli.main(["sft", f"run_dir={finished}", *longer]) == 0
    assert json.loads((finished / "hf/artifact.json").read_text())["config"]["sft"]["epochs"] == 4

    mine, theirs = runs.read_metrics(stopped), runs.read_metrics(finished)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(29))
    for line, want in zip(mine[:15], expected, strict=True):
        close(line, want, "loss", "grad_norm", "lr")
    for line, want in zip(mine[15:], theirs[15:], strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=2e-2), "packed in another way since step 3, and since step 15"
    assert {line["lr"] for line in mine[15:]} == {expected[-1]["lr"]}, "at the rate that it fell to"
    assert mine[-1]["loss"] < expected[-1]["loss"]
    assert cli.main(["sft", f"run_dir={stopped}", *longer, "sft.batch_size=4"]) == 2
    assert "is finished, and was made with sft.batch_size=8, now it is 4" in capfd.readouterr().err


def close(line: dict, want: dict, *names: str) -> None:
    """Packed in another way, sums are taken in another order."""
    assert {name for name in names if name in line} == {name for name in names if name in want}
    for name in names:
        assert name not in want or line[name] == pytest.approx(want[name], rel=2e-3), (line["step"], name)


def fail_after(last: int, record: Callable) -> Callable:
    """`Run.record` after which a device has no memory left."""

    def record_and_fail(run: Run, step: int, metrics: Mapping[str, float]) -> None:
        record(run, step, metrics)
        if step == last:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return record_and_fail


def interrupt_after(last: int, record: Callable) -> Callable:
    """`Run.record` that ends the command once this step is written."""

    def record_and_stop(run: Run, step: int, metrics: Mapping[str, float]) -> None:
        record(run, step, metrics)
        if step == last:
            raise KeyboardInterrupt

    return record_and_stop


@pytest.mark.parametrize("start", ["hf", "checkpoints/step_000014"])
def test_it_goes_on_from_a_model_or_a_checkpoint(whole: Path, settings: list[str], runs, tmp_path: Path, start: str) -> None:
    """(From a converted folder: test_convert_train.py.)"""
    more = [f"model.weights={whole / start}", "model.overrides={}", "sft.epochs=1", "sft.batch_size=64"]
    without = [setting for setting in settings if not setting.startswith(("model.", "data.tokenizer"))]
    assert cli.main(["sft", f"run_dir={tmp_path / 'run'}", *without, *more]) == 0
    first = runs.read_metrics(tmp_path / "run")[0]["validation/loss"]
    assert first == pytest.approx(runs.read_metrics(whole)[-1]["validation/loss"], rel=1e-5)


def test_bad_input_is_told_with_file_and_line(capfd, settings: list[str], tmp_path: Path) -> None:
    good, path = '{"prompt": "first 1", "response": "1"}\n', tmp_path / "bad.jsonl"
    for line, says in (
        ('{"prompt": "first 1"', "bad.jsonl:2: bad JSON"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "bad.jsonl:2 message 1: role 'robot' is unknown"),
        ('{"prompt": "first 1", "response": " "}', "bad.jsonl:2: field 'response' is blank"),
    ):
        path.write_text(good + line)
        assert cli.main(["sft", f"run_dir={tmp_path / 'run'}", *settings, f"sft.sources=[{path}]"]) == 2
        (told,) = [text for text in capfd.readouterr().err.splitlines() if text.startswith("megatron-r1")]
        assert says in told
    path.write_text(good * 9)
    more = [f"sft.sources=[{path}]", "sft.epochs=1", "sft.validation_fraction=0.0"]
    assert cli.main(["sft", f"run_dir={tmp_path / 'run'}", *settings, *more]) == 0, "the folder goes on with a mended file"


def test_a_file_that_changed_under_a_run_is_noticed(capfd, whole: Path, settings: list[str], tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/hf")
    source = Path(json.loads(settings[4].removeprefix("sft.sources="))[0]["path"])
    text = source.read_text()
    try:
        source.write_text(text.replace("first 7", "first 8"))
        assert cli.main(["sft", f"run_dir={tmp_path / 'run'}", *settings]) == 2
    finally:
        source.write_text(text)
    assert "long.jsonl has other content than when this run began" in capfd.readouterr().err


def _made_chat(name: str) -> list[dict[str, str]]:
    text = "小明有{n}颗糖，{m}颗给了朋友。" if "zh" in name else "Tom has {n} sweets and gives {m} to his friends."
    return [
        {
            "instruction": f"{name} {n}: {text.format(n=n + 9, m=n)}",
            "input": "",
            "output": text.format(n=n, m=3) * (n + 1),
        }
        for n in range(6)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_epoch_over_chat_with_the_right_mask(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of each file; what is trained on is exactly the assistant's text and its end."""
    parts, texts = [], []
    for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json"):
        records = _made_chat(name) if kind == "made" else [record for _, record in read_records(public_file(f"chat/{name}"))][:6]
        (tmp_path / name).write_text(json.dumps(records))
        parts.append(str(tmp_path / name))
        texts += [record[field] for record in records for field in ("instruction", "output")]
    if kind == "made":  # docs/how_to/sentencepiece.md, but for the size
        page = (ROOT / "docs/how_to/sentencepiece.md").read_text(encoding="utf-8")
        program = (
            page.split("```python\n")[1].split("```")[0].replace("vocab_size=32000", "vocab_size=1024, hard_vocab_limit=False")
        )
        (tmp_path / "text.txt").write_text("\n".join(texts))
        (tmp_path / "program.py").write_text(program)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            runpy.run_path("program.py")
        own, bos, eos = tmp_path / "own.model", "<s>", "</s>"
    else:
        own, bos, eos = tmp_path / "tokenizer", "<bos>", "<eos>"
        train_tokenizer(texts, 1024, single_tokens=["<｜User｜>", "<｜Assistant｜>"]).save(own)
    run = tmp_path / "run"
    arguments = [
        "--config",
        EXAMPLE,
        f"run_dir={run}",
        f"data.tokenizer={own}",
        f"sft.sources={json.dumps(parts)}",
    ]
    assert cli.main(["sft", *arguments, "model.overrides.vocab_size=1024", "sft.validation_fraction=0.0"]) == 0
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and losses[-1]["epoch"] == 1.0

    tokenizer = Tokenizer.load(own)
    assert Tokenizer.load(run / "hf").encode(texts[0]) == tokenizer.encode(texts[0])
    data = SftData(run / "data", load_config(run / "config.yaml").sft, seed=0)
    conversations = [read_conversation(record, where) for part in parts for where, record in read_records(Path(part))]
    assert data.epoch_size == len(conversations) == 18
    for (user, assistant), sample in zip(conversations, data.take(range(18)), strict=True):
        masked = describe_sample(sample, tokenizer)
        assert masked == f"{bos}<｜User｜>{user.content}<｜Assistant｜>⟦{assistant.content}{eos}⟧"
    print((run / "data" / PREVIEW).read_text())
