"""What `make pretrain-demo` runs: texts to documents, equal FLOPs, V3's recipe scaled down, the table of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.pretrain_demo import prepare_text, pretrain_demo
from megatron_r1.config.load import load_config
from megatron_r1.data.fill_in_middle import MARKS
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.training.pretrain_plan import PretrainPlan
from tests.paths import ROOT

RECIPE = ROOT / "examples/v3_671b/pretrain.yaml"
TOKENS = 6e-8  #: of the recipe's that the demonstration trains on
BIAS_SPEED = 10  #: times the recipe's: a thousandth of the updates


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Any, Any]]:
    return pretrain_demo.shapes()


def test_both_models_cost_the_same_flops_a_token_in_every_phase(found: dict[str, tuple[Any, Any]]) -> None:
    lengths = [phase.sequence_length for phase in PretrainPlan(found["v3"][0].pretrain).phases]
    assert lengths == [128, 1024, 4096]
    for length in lengths:
        trained = {model: pretrain_demo.flops_per_token(arch, length)[1] for model, (_, arch) in found.items()}
        assert trained["dense"] == pytest.approx(trained["v3"], rel=0.02)
    assert found["v3"][1].mtp_depth == 1 and found["v3"][1].experts is not None
    assert found["dense"][1].mtp_depth == 0 and found["dense"][1].experts is None
    assert found["v3"][1].vocab_size == found["dense"][1].vocab_size


def test_both_are_trained_alike_but_for_experts_and_mtp(found: dict[str, tuple[Any, Any]]) -> None:
    v3, dense = (config.model_dump(exclude={"run_dir", "model"}) for config, _ in found.values())
    for phase in v3["pretrain"]["phases"]:
        phase |= {"bias_update_rate": [], "mtp_loss_scale": []}
        if isinstance(phase["rope_scaling"], dict):
            del phase["rope_scaling"]["mscale"], phase["rope_scaling"]["mscale_all_dim"]  # of latent attention
    assert v3["pretrain"].pop("moe") and dense["pretrain"].pop("moe")
    assert v3 == dense
    plans = [PretrainPlan(config.pretrain) for config, _ in found.values()]
    updates = [[(u.tokens, u.rates.lr) for u in map(plan.update, range(1, plan.total_updates + 1))] for plan in plans]
    assert updates[0] == updates[1]


def test_the_recipe_is_scaled_down(found: dict[str, tuple[Any, Any]]) -> None:
    ours, published = found["v3"][0].pretrain, load_config(RECIPE).pretrain
    assert (ours.optimizer.beta1, ours.optimizer.beta2, ours.optimizer.weight_decay, ours.optimizer.clip_grad) == (
        published.optimizer.beta1, published.optimizer.beta2, published.optimizer.weight_decay, published.optimizer.clip_grad,
    )  # fmt: skip
    faster = {"bias_update_rate": BIAS_SPEED * published.moe.bias_update_rate}
    assert ours.moe == published.moe.model_copy(update=faster) and ours.mask_documents == published.mask_documents
    assert [part.value for part in ours.phases[0].bias_update_rate] == [
        BIAS_SPEED * part.value for part in published.phases[0].bias_update_rate
    ]
    assert [part.value for part in ours.phases[0].mtp_loss_scale] == [part.value for part in published.phases[0].mtp_loss_scale]
    assert ours.sequence_length * 32 == published.sequence_length
    first, theirs = ours.phases[0], published.phases[0]
    assert first.tokens == pytest.approx(theirs.tokens * TOKENS)
    assert first.batch_ramp.tokens == pytest.approx(theirs.batch_ramp.tokens * TOKENS)
    for name in ("learning_rate", "bias_update_rate", "mtp_loss_scale"):
        parts = list(zip(getattr(first, name), getattr(theirs, name), strict=True))
        assert [mine.tokens for mine, part in parts if part.tokens] == [
            pytest.approx(part.tokens * TOKENS) for _, part in parts if part.tokens
        ]
    assert [part.shape for part in first.learning_rate] == [part.shape for part in theirs.learning_rate]
    for phase, part in zip(ours.phases[1:], published.phases[1:], strict=True):
        assert phase.sequence_length * 32 == part.sequence_length
        assert phase.sequence_length * phase.global_batch_size == ours.sequence_length * ours.global_batch_size
        assert part.sequence_length * part.global_batch_size == published.sequence_length * published.global_batch_size
        scaling = part.rope_scaling | {"original_max_position_embeddings": ours.sequence_length}
        assert phase.rope_scaling == scaling and phase.bias_update_rate == part.bias_update_rate
        assert phase.mtp_loss_scale == part.mtp_loss_scale
    rates = [
        [part.lr / settings.optimizer.lr for phase in settings.phases for part in phase.learning_rate]
        for settings in (ours, published)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.01)


def test_the_steps_of_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a b.md").write_text("one")
    (tmp_path / "novels/old").mkdir(parents=True)
    (tmp_path / "novels/old/two.txt").write_text("two")
    (tmp_path / "picture.png").write_text("no text")
    steps = pretrain_demo.plan_data(Path("/out"), tmp_path)
    assert list(steps) == ["text", "tokens of a_b", "tokens of novels"] and steps["text"][-2:] == ["--text", str(tmp_path)]
    assert list(pretrain_demo.plan_data(Path("/out"), None)) == ["text", "tokens of english", "tokens of chinese"]
    runs = pretrain_demo.plan_runs(Path("/out"), {"a_b": 30, "novels": 70}, [0, 1], ["pretrain.micro_batch_size=4"])
    assert list(runs) == ["v3 0", "v3 1", "dense 0", "dense 1"]
    for name, command in runs.items():
        model, seed = name.split()
        config = load_config(Path(command[command.index("--config") + 1]), command[command.index("--config") + 2 :])
        assert (config.seed, config.run_dir) == (int(seed), f"/out/{model}_{seed}") and config.pretrain.micro_batch_size == 4
        assert [(part.path, part.weight) for part in config.data.blend] == [
            ("/out/data/a_b_text_document", 30), ("/out/data/novels_text_document", 70),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no .txt or .md file below it"),
        (["a.png"], "no .txt or .md file below it"),
        (["a.txt", "a.md"], "would be a source of the same name, a"),
        ([f"{number}.txt" for number in range(9)], "9 texts at its top, at most 8 sources"),
        (None, "no such folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    files: list[str] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "texts"
    if files is not None:
        folder.mkdir()
    for name in files or []:
        (folder / name).write_text("text")
    assert pretrain_demo.main(["--out", str(tmp_path / "out"), "--text", str(folder)]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert prepare_text.main(["--out", str(tmp_path / "out"), "--text", str(folder)]) == 2
    assert not list((tmp_path / "out").iterdir())


def test_documents_hold_every_paragraph_once_and_the_tokenizer_fills_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paragraphs = [f"Paragraph {number}\nof a long story. " + "word " * number for number in range(90)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/story.txt").write_text("\n\n \n".join(paragraphs))
    (tmp_path / "texts/汉字.md").write_text("一段汉字。\n\n另一段汉字。")
    arguments = ["--out", str(tmp_path / "out"), "--text", str(tmp_path / "texts"), "--vocab-size", "300"]
    assert prepare_text.main(arguments) == 0
    written = tmp_path / "out/documents/story.jsonl"
    documents = [json.loads(line)["text"] for line in written.read_text().splitlines()]
    found = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert sorted(found) == sorted(paragraphs) and len(documents) > 3 and found != paragraphs
    assert sum(len(document.encode()) < prepare_text.DOCUMENT_BYTES for document in documents) <= 1
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer")
    assert None not in [tokenizer.find_token(mark) for mark in MARKS[0]]
    before = written.read_bytes()
    assert prepare_text.main(arguments) == 0 and written.read_bytes() == before
    (tmp_path / "texts/story.txt").write_text("another story")
    assert prepare_text.main(arguments) == 2 and "was made of another text" in capsys.readouterr().err
    assert written.read_bytes() == before


def test_the_result_counts_where_v3_is_lower(tmp_path: Path, found: dict[str, tuple[Any, Any]]) -> None:
    ends = [phase.last_update for phase in PretrainPlan(found["v3"][0].pretrain).phases]
    for model, level in (("v3", 4.0), ("dense", 4.25)):
        for seed in range(2):
            folder = pretrain_demo.run_folder(tmp_path, model, seed)
            folder.mkdir()
            names = {"validation/en_text_document/loss": level + seed / 8, "validation/zh_text_document/loss": level + seed / 2}
            (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": end} | names) + "\n" for end in [20, *ends]))
    losses = pretrain_demo.read_losses(tmp_path, ["en", "zh"], [0, 1])
    plan = PretrainPlan(found["v3"][0].pretrain)
    assert "is lower for V3: in 4 of 4 pairs" in pretrain_demo.verdict(losses, ends[-1])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pretrain_demo.loss_table(losses, plan).splitlines()]
    assert cells[2] == ["en, rows of 128", "4.062 [4.000, 4.125]", "4.312 [4.250, 4.375]", "-0.250", "2 of 2"]
    assert cells[-1][0] == "zh, rows of 4,096" and len(cells) == 2 + 6
    (tmp_path / "dense_1/metrics.jsonl").write_text(json.dumps({"step": ends[-1], "validation/en_text_document/loss": 4.0}) + "\n")
    with pytest.raises(pretrain_demo.DataError, match="a run of dense has no validation/zh/loss"):
        pretrain_demo.verdict(pretrain_demo.read_losses(tmp_path, ["en", "zh"], [0, 1]), ends[-1])
    (tmp_path / "dense_1/metrics.jsonl").write_text((tmp_path / "v3_1/metrics.jsonl").read_text())
    losses = pretrain_demo.read_losses(tmp_path, ["en", "zh"], [0, 1])
    assert "is NOT lower for V3 throughout: in 2 of 4 pairs" in pretrain_demo.verdict(losses, ends[-1])
    text = pretrain_demo.write_result(tmp_path, ["en", "zh"], [0, 1], [], ["text"])
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and "NOT lower" in (tmp_path / "result.md").read_text()
    assert "| parameters (millions)" in text and "\n| text " in text
