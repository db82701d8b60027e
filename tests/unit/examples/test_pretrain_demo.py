"""What `make pretrain-demo` runs: texts to documents, equal FLOPs, V3's recipe scaled down, the table of the result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.pretrain_demo import compare, plan, prepare_text, pretrain_demo
from megatron_r1.config.load import load_config
from megatron_r1.data.fill_in_middle import MARKS
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.training.pretrain_plan import PretrainPlan
from tests.paths import ROOT

RECIPE = ROOT / "examples/v3_671b/pretrain.yaml"
TOKENS = 1e-7  #: of the recipe's that the demonstration trains on
BIAS_SPEED = 10  #: times the recipe's: a thousandth of the updates


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Any, Any]]:
    return plan.shapes({})


def test_both_models_cost_the_same_flops_a_token_in_every_phase(found: dict[str, tuple[Any, Any]]) -> None:
    lengths = [phase.sequence_length for phase in PretrainPlan(found["v3"][0].pretrain).phases]
    assert lengths == [128, 1024, 4096]
    for length in lengths:
        trained = {model: plan.flops_per_token(arch, length)[1] for model, (_, arch) in found.items()}
        assert trained["dense"] == pytest.approx(trained["v3"], rel=0.02)
    assert found["v3"][1].mtp_depth == 1 and found["v3"][1].experts is not None
    assert found["dense"][1].mtp_depth == 0 and found["dense"][1].experts is None
    assert found["v3"][1].vocab_size == found["dense"][1].vocab_size == prepare_text.VOCABULARY


def test_both_are_trained_alike_but_for_experts_and_mtp(found: dict[str, tuple[Any, Any]]) -> None:
    v3, dense = (config.model_dump(exclude={"run_dir", "model"}) for config, _ in found.values())
    for phase in v3["pretrain"]["phases"]:
        phase |= {"bias_update_rate": [], "mtp_loss_scale": []}
        if isinstance(phase["rope_scaling"], dict):
            del phase["rope_scaling"]["mscale"], phase["rope_scaling"]["mscale_all_dim"]  # of latent attention
    assert v3["pretrain"].pop("moe") and dense["pretrain"].pop("moe")
    assert v3 == dense
    plans = [PretrainPlan(config.pretrain) for config, _ in found.values()]
    updates = [[(u.tokens, u.rates.lr) for u in map(of_model.update, range(1, of_model.total_updates + 1))] for of_model in plans]
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
    steps = plan.plan_data(Path("/out"), tmp_path)
    assert list(steps) == ["text", "tokens of a_b", "tokens of novels"] and steps["text"][-2:] == ["--text", str(tmp_path)]
    assert list(plan.plan_data(Path("/out"), None)) == ["text", "tokens of english", "tokens of chinese"]
    runs = plan.plan_runs(
        Path("/out"), {"a_b": 30, "novels": 70}, [0, 1], {"v3": 1.2e-3, "dense": 1.2e-2}, ["pretrain.micro_batch_size=4"]
    )
    assert list(runs) == ["v3 0", "v3 1", "dense 0", "dense 1"]
    for name, command in runs.items():
        model, seed = name.split()
        config = load_config(Path(command[command.index("--config") + 1]), command[command.index("--config") + 2 :])
        assert (config.seed, config.run_dir) == (int(seed), f"/out/{model}_{seed}") and config.pretrain.micro_batch_size == 4
        whole = plan.shapes({})[model][0].pretrain
        parts = [part for phase in config.pretrain.phases for part in phase.learning_rate]
        written = [part for phase in whole.phases for part in phase.learning_rate]
        rate, factor = config.pretrain.optimizer.lr, {"v3": 0.2, "dense": 2.0}[model]
        assert rate == pytest.approx(6e-3 * factor) and [part.lr for part in parts] == pytest.approx(
            [part.lr * factor for part in written]
        )
        assert [phase.model_dump(exclude={"learning_rate"}) for phase in config.pretrain.phases] == [
            phase.model_dump(exclude={"learning_rate"}) for phase in whole.phases
        ]
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


def _write_losses(run: Path, losses: dict[int, float]) -> None:
    """Of both sources, `en` and `zh`, after each update."""
    run.mkdir(parents=True, exist_ok=True)
    names = ("validation/en_text_document/loss", "validation/zh_text_document/loss")
    lines = [{"step": step} | dict.fromkeys(names, loss) for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 7.0}, *lines]))


def _write_runs(out: Path, ends: list[int], ours: list[float], theirs: list[float]) -> list[compare.Losses]:
    for model, levels in (("v3", ours), ("dense", theirs)):
        for seed, level in enumerate(levels):
            _write_losses(plan.run_folder(out, model, seed), {step: level for step in [20, *ends]})
    return compare.read_losses(out, ["en", "zh"], range(len(ours)))


def test_the_claim_holds_where_every_pair_is_lower_and_the_interval_too(tmp_path: Path) -> None:
    losses = _write_runs(tmp_path / "clear", [9], [4.0, 4.125, 4.25], [4.25, 4.375, 4.625])
    holds, said = compare.verdict(losses, 9)
    assert holds and "is lower for V3: in 6 of 6 pairs" in said and "below 0 for 2 of 2 sources" in said
    holds, said = compare.verdict(_write_runs(tmp_path / "wide", [9], [4.0, 4.125, 4.25], [4.001, 4.9, 4.26]), 9)
    assert not holds and "is NOT lower for V3 throughout: in 6 of 6 pairs" in said and "for 0 of 2 sources" in said
    holds, said = compare.verdict(_write_runs(tmp_path / "one", [9], [4.0, 4.0, 4.4], [4.25, 4.25, 4.25]), 9)
    assert not holds and "in 4 of 6 pairs" in said
    assert compare.verdict(_write_runs(tmp_path / "alone", [9], [4.0], [4.25]), 9)[0]
    assert not compare.verdict(_write_runs(tmp_path / "equal", [9], [4.0], [4.0]), 9)[0]


def test_students_interval() -> None:
    assert [compare.t_quantile(freedom) for freedom in (1, 2, 4, 9)] == pytest.approx([12.7062, 4.3027, 2.7764, 2.2622], abs=1e-4)
    assert compare.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert compare.interval([1.0]) == (-float("inf"), float("inf"))


class _Runs:
    """In place of run_steps: writes what a run would have measured, whose best rate is the model's `best`."""

    def __init__(self, best: dict[str, float], ours: list[float], theirs: list[float], ends: list[int]) -> None:
        self.best, self.levels, self.ends = best, {"v3": ours, "dense": theirs}, ends
        self.searched: list[tuple[str, float]] = []
        self.rates: dict[str, str] = {}  #: of runs

    def __call__(self, steps: dict[str, list[str]], out: Path, side_by_side: Any) -> int:
        for name, command in steps.items():
            run = Path(next(part for part in command if part.startswith("run_dir=")).removeprefix("run_dir="))
            rate = next(part for part in command if part.startswith("pretrain.optimizer.lr=")).partition("=")[2]
            if name.startswith("search"):
                _, model, _ = name.split()
                self.searched.append((model, float(rate)))
                _write_losses(run, {5: 9.0, 10: 4.0 + abs(math.log(float(rate) / self.best[model]))})
            else:
                model, seed = name.split()
                self.rates[model] = rate
                _write_losses(run, {step: self.levels[model][int(seed)] for step in [20, *self.ends]})
        return 0


@pytest.fixture
def demonstrate(tmp_path: Path, found: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the demonstration with runs that are not made; returns its exit code and what was run."""
    (tmp_path / "text").mkdir()
    for name in ("en", "zh"):
        (tmp_path / f"text/{name}.txt").write_text("text")
    ends = [phase.last_update for phase in PretrainPlan(found["v3"][0].pretrain).phases]
    monkeypatch.setattr(pretrain_demo, "make_data", lambda steps, out: 0)
    monkeypatch.setattr(pretrain_demo, "tokens_of", lambda data, sources: dict(zip(sources, (3_000_000, 1_000_000), strict=True)))

    def run(best: dict[str, float], ours: list[float], theirs: list[float], *more: str) -> tuple[int, _Runs]:
        runs = _Runs(best, ours, theirs, ends)
        monkeypatch.setattr(pretrain_demo, "run_steps", runs)
        return pretrain_demo.main(["--out", str(tmp_path / "out"), "--text", str(tmp_path / "text"), *more]), runs

    return run


def test_rates_are_searched_for_and_the_result_is_tables_curves_and_a_page(
    tmp_path: Path, found: dict[str, tuple[Any, Any]], demonstrate: Any, capsys: pytest.CaptureFixture
) -> None:
    code, runs = demonstrate({"v3": 1.2e-2, "dense": 2.4e-2}, [4.0, 4.125], [4.25, 4.4], "--seeds", "2")
    told = capsys.readouterr()
    assert code == 0 and not told.err
    assert {rate for _, rate in runs.searched} == {3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2}  # one beyond the best of the dense model
    assert runs.rates == {"v3": "0.012", "dense": "0.024"}
    of_v3, out = PretrainPlan(found["v3"][0].pretrain), tmp_path / "out"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.out.splitlines()]
    assert ["en, rows of 128", "4.062 [4.000, 4.125]", "4.325 [4.250, 4.400]", "-0.263", "[-0.421, -0.104]", "2 of 2"] in cells
    assert "zh, rows of 4,096" in [row[0] for row in cells if row]
    assert ["all", "4,000,000", "3,800,000"] in cells and ["highest learning rate", "0.012", "0.024"] in cells
    assert ["V3", "0.012 *", "4.000", "4.000", "4.000"] in cells and ["dense", "0.012", "4.693", "4.693", "4.693"] in cells
    assert ["read with rows of 128", f"{of_v3.phases[0].tokens:,}", f"{of_v3.phases[0].tokens / 3_800_000:.2f} times"] in cells
    assert told.out.index("MFLOPs a token to train") < told.out.index("Held-out loss at the end is lower for V3")
    page = (out / "report.html").read_text()
    assert (out / "curves.png").stat().st_size > 10_000 and "is lower for V3" in (out / "result.md").read_text()
    assert "is lower for V3" in page and "script-src 'none'" in page and page.count("<table>") == 5
    assert "Held-out loss, en (nats a token)" in page and "Held-out loss, zh (nats a token)" in page


def test_a_claim_that_fails_ends_with_code_1_and_says_so(
    tmp_path: Path, demonstrate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(pretrain_demo, "report_page", lambda said, *_: said)
    code, runs = demonstrate({}, [5.0, 5.125, 4.0], [4.5, 4.625, 4.5], "--rates", "0.002")
    told = capsys.readouterr()
    assert code == 1 and not runs.searched and runs.rates == {"v3": "0.002", "dense": "0.002"}
    assert "V3's held-out loss is not lower throughout" in told.err and told.err.count("\n") == 1
    assert "NOT lower" in told.out and "NOT lower" in (tmp_path / "out/result.md").read_text()
    assert "NOT lower" in (tmp_path / "out/report.html").read_text() and "search: model" not in told.out


def test_a_run_that_measured_nothing_at_the_end_of_a_phase_is_named(demonstrate: Any, capsys: pytest.CaptureFixture) -> None:
    overrides = ["pretrain.phases=[{updates: 5}]", "--rates", "0.002", "--seeds", "1"]
    assert demonstrate({}, [4.0], [4.5], *overrides)[0] == 2
    assert "a run of v3 has no validation/en/loss at step 5: remove its folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--rates", "0"], ["--rates", "1e-3,"], ["--rates", "inf,1"], ["--rates", "x"], ["--seeds", "0"], ["--seeds", "101"]]
)
def test_numbers_that_cannot_be_are_refused(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain_demo.main(["--out", str(tmp_path / "out"), *given])
    assert ended.value.code == 2 and f"{given[0]} {given[1]}: give" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_is_the_first_phase_shortened() -> None:
    runs = plan.plan_search(Path("/out"), {"en": 30, "zh": 70}, [1e-3, 1.2e-2], ["pretrain.micro_batch_size=4"])
    assert list(runs) == ["search v3 0.001", "search v3 0.012", "search dense 0.001", "search dense 0.012"]
    for name, command in runs.items():
        _, model, rate = name.split()
        config = load_config(Path(command[command.index("--config") + 1]), command[command.index("--config") + 2 :])
        assert config.seed == plan.SEARCH_SEED and config.run_dir == f"/out/search/{model}_{rate}"
        whole = plan.shapes({}, ["pretrain.micro_batch_size=4"])[model][0].pretrain
        (phase,), first = config.pretrain.phases, whole.phases[0]
        assert phase.tokens == pytest.approx(first.tokens / 2, abs=1) and phase.rope_scaling == first.rope_scaling
        assert config.pretrain.optimizer.lr == float(rate)
        for mine, part in zip(phase.learning_rate, first.learning_rate, strict=True):
            assert mine.lr == pytest.approx(part.lr * float(rate) / whole.optimizer.lr) and mine.shape == part.shape
            assert mine.tokens == pytest.approx(part.tokens / 2, abs=1)
        assert [part.value for part in phase.mtp_loss_scale] == [part.value for part in first.mtp_loss_scale]
        rest = {"phases", "optimizer"}
        assert config.pretrain.model_dump(exclude=rest) == whole.model_dump(exclude=rest)


def test_a_rate_beyond_the_best_at_an_edge() -> None:
    def search(*bests: float) -> compare.Search:
        rates = (0.25, 0.5, 1.0)
        return compare.Search(["en"], {m: {r: [abs(r - b)] for r in rates} for m, b in zip(("v3", "dense"), bests, strict=True)})

    assert [search(*bests).beyond() for bests in [(0.5, 0.5), (0.5, 1.0), (0.25, 0.5), (0.25, 1.0)]] == [None, 2.0, 0.125, 2.0]
    with pytest.raises(compare.DataError, match="has no held-out loss of ja: remove it"):
        compare.Search.read(Path("/nowhere"), ["ja"], [1e-3])
