"""Reward models on one rank: against transformers, from every kind of folder, trained, resumed, scoring, and no policies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1 import cli
from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import fixed_texts
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import CheckpointError, ConfigError, DataError
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.pipeline.builders.models import build_reward_model
from megatron_r1.pipeline.builders.preferences import PreferenceRewards, load_reward_scorer, open_preferences
from megatron_r1.pipeline.session import open_session
from megatron_r1.runtime import distributed
from megatron_r1.training.reward_model import reward_loss_of
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import export_hf
from tests.paths import ROOT
from tests.random_weights import full_architecture, further_families, llama_architecture, qwen2_architecture, write_random_model
from tests.reward_cases import build_reward_model as build_case
from tests.reward_cases import make_examples

MODELS = {
    "v3": full_architecture(mtp=1),
    "qwen2": qwen2_architecture(tied=True),
    "llama": llama_architecture(),
    **further_families(),
}
SEQUENCES = [sequence for example in make_examples() for sequence in example.sequences]
CPU = RuntimeConfig(device="cpu")
EXAMPLE = ROOT / "examples/reward_model/tiny_cpu.yaml"
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 2,
    "moe_intermediate_size": 32, "num_experts_per_tok": 1,
}  # fmt: skip


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(distributed, "_STORE", None)
    with open_session(CPU) as opened:
        yield opened


def load(session, folder: Path | None, label: str | None = "helpful", **model):
    """The reward model of a folder, or on the trunk that stands there; ready to be trained where it gets a label."""
    config = Config(runtime=CPU, model=ModelConfig(weights=None if folder is None else str(folder), **model))
    optimizer = None if label is None else RewardModelConfig().optimizer.model_copy(update={"lr": 1e-3})
    return build_reward_model(config, session, label=label, optimizer=optimizer, total_updates=4)


def write_hf(model, folder: Path) -> Path:
    export_hf(model.weights(), model.arch, folder, bos_token_id=0, eos_token_id=1)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers_from_one_folder(session, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    write_random_model(tmp_path / "policy", MODELS[name])
    model = load(session, tmp_path / "policy")
    trunk = HfFolder(tmp_path / "policy")
    before = dict(model.weights())
    assert all(torch.equal(tensor, trunk.read(key)) for key, tensor in before.items() if key != "score.weight")
    assert before["score.weight"].shape == (1, MODELS[name].hidden_size)
    examples = make_examples()
    model.train_step(examples, reward_loss_of("helpful", examples))
    scores = model.scores(SEQUENCES)
    assert max(scores) - min(scores) > 0.02

    theirs = AutoModelForSequenceClassification.from_pretrained(write_hf(model, tmp_path / "reward"), dtype=torch.float32).eval()
    assert theirs.config.id2label == {0: "helpful"}
    with torch.no_grad():
        want = [theirs(torch.tensor([sequence])).logits.item() for sequence in SEQUENCES]
    assert scores == pytest.approx(want, abs=1e-5)
    again = load(session, tmp_path / "reward", label=None)
    assert again.scores(SEQUENCES) == scores and again.arch == model.arch
    assert read_hf_config(HfFolder(tmp_path / "reward").config).score_label == "helpful"


def test_packing_does_not_change_scores_and_length_has_no_limit_but_the_positions(session) -> None:
    packed = build_case("v3", {}, 1, micro_batch_tokens=4096).scores(SEQUENCES)
    model = build_case("v3", {}, 1, micro_batch_tokens=8)  # less than most: each gets a micro-batch of its own size
    assert model.scores(SEQUENCES) == pytest.approx(packed, abs=1e-6)
    assert [model.scores([sequence])[0] for sequence in SEQUENCES] == pytest.approx(packed, abs=1e-6)
    assert model.scores([]) == []
    longest = list(range(128))
    assert model.scores([longest, [1, 2, 3]])[0] == pytest.approx(model.scores([longest])[0], abs=1e-6)
    with pytest.raises(DataError, match="response 1 has 129 tokens.*128 positions"):
        model.scores([[1], [*longest, 0]])


def test_a_fresh_head_is_small_and_does_not_depend_on_the_trunk(session) -> None:
    examples = make_examples()
    model = build_case("qwen2", {}, 1)
    assert max(map(abs, model.scores(SEQUENCES))) < 0.5
    stats = model.train_step(examples, reward_loss_of("helpful", examples))
    assert stats.loss == pytest.approx(0.6931, abs=0.05) and stats.grad_norm > 0


def test_trunk_of_a_policys_checkpoint(session, tmp_path: Path) -> None:
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.checkpoint import load_policy_weights, save_policy
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    arch = qwen2_architecture(tied=True)
    expected = load(session, write_random_model(tmp_path / "hf", arch)).scores(SEQUENCES)
    where = (parallel.Layout(dp=1), CPU, MoeTrainingConfig())
    settings = {"optimizer": None, "total_updates": 0, "device": torch.device("cpu"), "micro_batch_tokens": 64}
    policy = MegatronPolicy(arch, *where, **settings, seed=3)
    policy.load_hf(tmp_path / "hf")
    (tmp_path / "checkpoint").mkdir()
    save_policy(policy, tmp_path / "checkpoint")
    model = MegatronRewardModel(arch.as_reward_model("helpful"), *where, **settings, seed=0)
    load_policy_weights(model, tmp_path / "checkpoint", trunk_only=True)
    assert model.scores(SEQUENCES) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        load_policy_weights(model, tmp_path / "checkpoint")


GOOD, BAD = "Please ask a doctor first.", "Sure, just do it now."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([GOOD, BAD, "Is number safe?"], 320, single_tokens=fixed_texts("r1_chat")).save(folder)
    return folder


def settings_of(folder: Path, tokenizer: Path, kind: str, *more: str) -> list[str]:
    """Arguments of a small run on 64 generated examples, which it can learn."""
    if kind == "helpful":
        records = [
            {"prompt": f"Is {n} safe?", "chosen": f"<think>{BAD}</think>{GOOD}", "rejected": f"{BAD} {n}"} for n in range(64)
        ]
    else:
        records = [
            {"prompt": f"Is {n} safe?", "response": f"<think>{n}</think>{GOOD if n % 2 else BAD}", "safe": n % 2 == 1}
            for n in range(64)
        ]
    data = folder.with_suffix(f".{kind}.jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        "reward-model", "--config", str(EXAMPLE), f"run_dir={folder}", f"data.source={data}", f"data.tokenizer={tokenizer}",
        f"model.overrides={json.dumps(SMALL)}", f"reward_model.kind={kind}", "reward_model.batch_size=16", "reward_model.epochs=3",
        "reward_model.validate_interval=3", "reward_model.optimizer.lr=5e-3", "reward_model.optimizer.warmup_steps=2",
        "checkpoint.interval=5", *more,
    ]  # fmt: skip


def read_numbers(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("helpful", "safety"):
        distributed._STORE = None
        assert cli.main(settings_of(folder / kind, tokenizer, kind)) == 0
    return {kind: folder / kind for kind in ("helpful", "safety")}


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_a_run_learns_and_records(runs, kind: str) -> None:
    numbers = read_numbers(runs[kind])
    last = numbers[-1]
    validated = [line["step"] for line in numbers if "validation/accuracy" in line]
    assert validated == [step for step in range(1, last["step"] + 1) if step % 3 == 0 or step == last["step"]]
    assert numbers[0]["loss"] == pytest.approx(0.6931, abs=0.05)
    assert last["accuracy"] == last["validation/accuracy"] == 1.0 and last["loss"] < 0.4
    manifest = json.loads((runs[kind] / "hf/artifact.json").read_text())
    assert manifest["stage"] == "reward-model" and "data.source" in manifest["inputs"]
    assert (runs[kind] / "report.html").is_file()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, tmp_path: Path, tokenizer, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["helpful"], run)
    shutil.rmtree(run / "hf")
    newest = max((run / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    monkeypatch.setattr(distributed, "_STORE", None)
    arguments = settings_of(runs["helpful"], tokenizer, "helpful")
    assert cli.main([*arguments, f"run_dir={run}"]) == 0
    assert read_numbers(run) == read_numbers(runs["helpful"])
    assert HfFolder(run / "hf").files == HfFolder(runs["helpful"] / "hf").files
    assert (run / "hf/model-00001-of-00001.safetensors").read_bytes() == (
        runs["helpful"] / "hf/model-00001-of-00001.safetensors"
    ).read_bytes()


def scorer_of(session, folder: Path):
    model = ModelConfig(weights=str(folder))
    return load_reward_scorer(Config(runtime=CPU, model=model, reward_model=RewardModelConfig(micro_batch_tokens=64)), session)


def test_scoring_reads_the_summary_for_helpfulness_and_everything_for_safety(session, runs) -> None:
    ask = (Message("user", "Is 7 safe?"),)
    responses = [GOOD, BAD, f"<think>{BAD}</think>{GOOD}", f"<think>{GOOD}</think>{BAD}", f"<think>{GOOD}"]
    good, bad, hidden_bad, hidden_good, unfinished = scorer_of(session, runs["helpful"]).score([(ask, r) for r in responses])
    assert hidden_bad == pytest.approx(good, abs=1e-5) and hidden_good == pytest.approx(bad, abs=1e-5)
    assert good > bad + 1 and unfinished is None
    scores = scorer_of(session, runs["safety"]).score([(ask, r) for r in responses])
    assert None not in scores and scores[0] > 0 > scores[1] and scores[2] != pytest.approx(scores[0], abs=1e-3)


def test_a_run_its_checkpoint_and_its_folder_score_the_same(session, runs) -> None:
    ask = [
        ((Message("user", "Is 7 safe?"),), GOOD),
        ((Message("user", "Is 8 safe?"), Message("assistant", BAD), Message("user", "?")), BAD),
    ]
    newest = max((runs["helpful"] / "checkpoints").glob("step_*"))
    folders = (runs["helpful"] / "hf", newest)
    first, second = (scorer_of(session, folder).score(ask) for folder in folders)
    assert first == second


def test_of_two_reward_models_one_is_on_the_device_while_it_scores(session, runs, monkeypatch) -> None:
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    present, scores = [], {}
    evaluate = MegatronRewardModel.evaluate

    def watched(model, *args):
        present.append([m._rest is None or not m._rest.is_away for m in built])
        return evaluate(model, *args)

    built: list[MegatronRewardModel] = []
    begin = MegatronRewardModel.__init__
    monkeypatch.setattr(MegatronRewardModel, "__init__", lambda model, *a, **k: (built.append(model), begin(model, *a, **k))[1])
    monkeypatch.setattr(MegatronRewardModel, "evaluate", watched)
    rollouts = [Rollout([5, 2], [0.0, 0.0], text, True) for text in (GOOD, BAD)]
    groups = [
        RolloutGroup(Prompt("p", "Is 7 safe?", "", "text", (1,), kind="general", preference=preference), rollouts, 0)
        for preference in ("safety", "helpful", "safety")
    ]
    for names in (["reward_models"], []):
        built.clear()
        present.clear()
        reward = RewardConfig(model="reward_models", helpful_model=str(runs["helpful"]), safety_model=str(runs["safety"]))
        runtime, short = CPU.model_copy(update={"offload": names}), RolloutConfig(max_response_tokens=32)
        config = Config(runtime=runtime, rollout=short, data=DataConfig(max_prompt_tokens=64), reward=reward)
        with open_preferences(config, session) as preferences:
            resting = [model._rest is not None and model._rest.is_away for model in built]
            scores[len(names)] = [preferences(groups), preferences(groups)]
        if names:
            assert resting == [True, True] and present == 2 * [[True, False], [False, True]]
        else:
            assert resting == [False, False] and present == 4 * [[True, True]]
    assert scores[1] == scores[0] and scores[1][0] == scores[1][1]


def test_general_prompts_of_a_batch_are_scored_together(session, runs) -> None:
    batches = []

    class Watched:
        def __init__(self) -> None:
            self._scorer = scorer_of(session, runs["helpful"])

        def score(self, responses: list) -> list[float | None]:
            batches.append(len(responses))
            return self._scorer.score(responses)

    prompt = Prompt("p", "Is 7 safe?", "", "text", (1,), kind="general")
    texts = [f"<think>x</think>{GOOD}", BAD, "<think>never ends", GOOD]
    rollouts = [Rollout([5, 2], [0.0, 0.0], text, number < 3) for number, text in enumerate(texts)]
    groups = [RolloutGroup(asked, rollouts, 0) for asked in (prompt, replace(prompt, kind="reasoning"), prompt)]
    verdicts = PreferenceRewards({"helpful": Watched()})(groups)
    assert batches == [8] and verdicts[1] == {} and verdicts[0] == verdicts[2]
    good, bad, unfinished, cut = verdicts[0]["model"]
    assert 0 < bad.score < good.score < 1 and (good.outcome, bad.outcome, unfinished.score) == ("correct", "wrong", 0.0)
    assert "nothing follows" in unfinished.detail and cut.score == 0.0 and "length limit" in cut.detail
    opened = RolloutGroup(replace(prompt, text="text<think>\n"), [Rollout([5, 2], [0.0, 0.0], "never ends", True)], 0)
    assert "nothing follows" in PreferenceRewards({"helpful": Watched()})([opened])[0]["model"][0].detail
    careful = RolloutGroup(replace(prompt, preference="safety"), rollouts, 0)
    with pytest.raises(ConfigError, match="reward.safety_model, which is not set"):
        PreferenceRewards({"helpful": Watched()})([careful])


def complain(capfd, monkeypatch, arguments: list[str]) -> str:
    """The one line of a command that ends with exit code 2."""
    monkeypatch.setattr(distributed, "_STORE", None)
    capfd.readouterr()
    assert cli.main(arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-r1")]
    return line


def test_reward_models_and_policies_are_told_apart(capfd, monkeypatch, tmp_path: Path, runs, tokenizer) -> None:
    for folder in (runs["helpful"] / "hf", runs["helpful"]):
        line = complain(
            capfd, monkeypatch, ["sft", f"run_dir={tmp_path / 'sft'}", f"model.weights={folder}", "data.source=none.jsonl"]
        )
        assert f"{folder} is a reward model" in line
    safety = [f"model.weights={runs['helpful'] / 'hf'}", "model.overrides={}"]
    line = complain(capfd, monkeypatch, settings_of(tmp_path / "run", tokenizer, "safety", *safety))
    assert "is a reward model for 'helpful', reward_model.kind is 'safety'" in line


def test_a_policy_does_not_score(session, tmp_path: Path) -> None:
    write_random_model(tmp_path / "policy", MODELS["qwen2"])
    for weights, says in ((str(tmp_path / "policy"), "policy is no reward model"), (None, "model.weights is not set")):
        with pytest.raises(ConfigError, match=says):
            load_reward_scorer(Config(runtime=CPU, model=ModelConfig(weights=weights)), session)
    config = json.loads((tmp_path / "policy/config.json").read_text())
    for change in ({"num_labels": 2}, {"id2label": {"0": "good", "1": "bad"}}):
        with pytest.raises(ValueError, match="a reward model has one label"):
            read_hf_config(config | {"architectures": ["Qwen2ForSequenceClassification"]} | change)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.source=none.jsonl", "none.jsonl: no such file"),
        ("data.template=r1_zero", "data.template must be r1_chat"),
        ("reward_model.max_tokens=10", "helpful.jsonl:1: 18 tokens are more than reward_model.max_tokens=10"),
        ("reward_model.micro_batch_tokens=20", "are more than reward_model.micro_batch_tokens=20"),
        ("reward_model.kind=safety", "helpful.jsonl:1: field 'safe' is missing"),
        ("reward_model.kind=kind", "'reward_model.kind'"),
        ("parallel.cp=2", "cp=2 does not divide"),
        ("data.heldout_fraction=0.9999", "leaves no example to train on"),
    ],
)
def test_bad_input_is_one_line(capfd, monkeypatch, tmp_path: Path, tokenizer, override: str, says: str) -> None:
    arguments = settings_of(tmp_path / "run", tokenizer, "helpful", override)
    assert says in complain(capfd, monkeypatch, arguments)
    assert not (tmp_path / "run/hf").exists()
