"""Which settings a run may go on with, and what a longer one has to be told."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.help import explain
from megatron_r1.config.keys import known_keys
from megatron_r1.config.load import load_config
from megatron_r1.config.resume import (
    STAYS,
    check_settings,
    first_general_rollout,
    input_paths,
    kind_on_resume,
    reason_to_stay,
    require_longer,
)
from megatron_r1.errors import ConfigError

ROUND = ["grpo.prompts_per_rollout=2", "grpo.group_size=4", "grpo.minibatch_size=4"]  # two updates
WHERE = "run_dir X was started with"


def check(command: str, before: list[str], now: list[str], **more: float) -> bool:
    return check_settings(load_config(None, before), load_config(None, now), command, WHERE, **more)


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("grpo", "grpo.micro_batch_tokens=16384"),
        ("sft", "sft.micro_batch_tokens=2048"),
        ("reward-model", "reward_model.micro_batch_tokens=8192"),
        ("pretrain", "pretrain.micro_batch_size=8"),
        ("grpo", "rollout.kv_cache_bytes=1000000"),
        ("grpo", "rollout.max_num_seqs=16"),
        ("grpo", "rollout.gpu_memory_utilization=0.3"),
        ("grpo", "rollout.tensor_parallel_size=2"),
        ("grpo", "rollout.nodes_per_engine=2"),
        ("grpo", "rollout.engines_per_node=4"),
        ("grpo", "rollout.verify_weights=false"),
        ("grpo", "rollout.max_logprob_diff_max=2"),
        ("grpo", "rollout.max_logprob_diff_mean=0.05"),
        ("grpo", "runtime.recompute=full"),
        ("grpo", "runtime.recompute_modules=[moe]"),
        ("grpo", "runtime.device=cpu"),
        ("grpo", "evaluate.problems=8"),
        ("grpo", "evaluate.interval=3"),
        ("grpo", "evaluate.seed=1"),
        ("grpo", "data.max_prompt_tokens=2048"),
        ("grpo", "reward.time_limit_seconds=60"),
        ("grpo", "reward.worker_memory_bytes=1000000000"),
        ("grpo", "parallel.tp=2"),
        ("grpo", "checkpoint.keep=5"),
        ("sft", "sft.validation=other.jsonl"),
        ("sft", "sft.validation_interval=7"),
        ("reward-model", "reward_model.validate_interval=7"),
        ("grpo", "sft.batch_size=7"),  # grpo does not read it
        ("sft", "grpo.clip_eps=10"),
        ("sft", "recipe.measured_problems=1"),
    ],
)
def test_what_does_not_define_the_result_may_change(command, setting):
    assert check(command, [], [setting]) is False


@pytest.mark.parametrize(
    ("command", "setting", "was"),
    [
        ("grpo", "grpo.clip_eps=10", "grpo.clip_eps=0.2, now it is 10"),
        ("grpo", "seed=1", "seed=0, now it is 1"),
        ("grpo", "rollout.temperature=0.7", "rollout.temperature=1.0, now it is 0.7"),
        ("grpo", "reward.language_weight=1", "reward.language_weight=0.0, now it is 1"),
        ("grpo", "reward.code.cpu_seconds=9", "reward.code.cpu_seconds=5.0, now it is 9"),
        ("grpo", "model.overrides.num_hidden_layers=3", "model.overrides={}, now it is {'num_hidden_layers': 3}"),
        ("grpo", "data.source=problems.jsonl", "data.source=tally, now it is problems.jsonl"),
        ("sft", "sft.batch_size=32", "sft.batch_size=64, now it is 32"),
        ("sft", "sft.sources=[a.jsonl]", "now it is"),
        ("sft", "sft.optimizer.lr=1e-3", "sft.optimizer.lr=5e-06, now it is 0.001"),
        ("sft", "runtime.dtype=bf16", "runtime.dtype=fp32, now it is bf16"),
        ("pretrain", "pretrain.global_batch_size=32", "pretrain.global_batch_size=16, now it is 32"),
        ("a stage of one's own", "grpo.clip_eps=10", "grpo.clip_eps=0.2, now it is 10"),
    ],
)
def test_what_defines_the_result_must_stay_and_is_named(command, setting, was):
    with pytest.raises(ConfigError, match="run_dir") as caught:
        check(command, [], [setting])
    assert was in str(caught.value) and "\n" not in str(caught.value)


def test_every_changed_setting_is_named():
    with pytest.raises(ConfigError) as caught:
        check("grpo", [], ["grpo.clip_eps=10", "grpo.kl_coef=0.5", "evaluate.problems=8"])
    told = "grpo.clip_eps=0.2, now it is 10.0, and grpo.kl_coef=0.001, now it is 0.5"
    assert str(caught.value) == f"{WHERE} {told}: keep the values, or choose another run_dir"
    many = [f"reward.math.{name}" for name in ("sentences=true", "rounding=3", "units=ignored", "percent=unit")]
    with pytest.raises(ConfigError, match="and 1 more: keep the values"):
        check("grpo", [], [*many, "reward.format_weight=2", "seed=3"])


def test_sources_may_move_but_not_change_their_weights():
    before = ["sft.sources=[{path: a.jsonl, weight: 1.0}, {path: b.jsonl, weight: 2.0}]"]
    assert check("sft", before, ["sft.sources=[{path: /x/a.jsonl, weight: 1.0}, {path: /x/b.jsonl, weight: 2.0}]"]) is False
    with pytest.raises(ConfigError, match=r"sft\.sources="):
        check("sft", before, ["sft.sources=[{path: a.jsonl, weight: 2.0}, {path: b.jsonl, weight: 2.0}]"])
    assert input_paths(load_config(None, before), "sft") == {"sft.sources.0": "a.jsonl", "sft.sources.1": "b.jsonl"}
    assert input_paths(load_config(None, []), "grpo") == {}, "a generated source is no path"
    given = load_config(None, ["model.weights=w", "data.source=d.jsonl", "reward.helpful_model=h"])
    assert input_paths(given, "grpo") == {"model.weights": "w", "data.source": "d.jsonl", "reward.helpful_model": "h"}
    assert input_paths(given, "sft") == {"model.weights": "w", "data.source": "d.jsonl"}


def test_tokenised_sources_may_move_but_not_change_their_weights():
    before = ["data.blend=[{path: a, weight: 1.0}, {path: b, weight: 2.0}]", "data.split=[9, 1]"]
    assert (
        check("pretrain", before, ["data.blend=[{path: /x/a, weight: 1.0}, {path: /x/b, weight: 2.0}]", "data.split=[9, 1]"])
        is False
    )
    with pytest.raises(ConfigError, match=r"data\.blend="):
        check("pretrain", before, ["data.blend=[{path: a, weight: 2.0}, {path: b, weight: 2.0}]", "data.split=[9, 1]"])
    with pytest.raises(ConfigError, match=r"data\.split="):
        check("pretrain", before, [before[0]])
    files = {f"data.blend.{number}{end}": f"{name}{end}" for number, name in enumerate("ab") for end in (".idx", ".bin")}
    assert input_paths(load_config(None, before), "pretrain") == files
    assert input_paths(load_config(None, before), "grpo") == {}


def test_the_sources_of_a_phase_may_move_but_not_change():
    def settings(*sources: str, **phase: object) -> list[str]:
        return [
            "data.blend=[a]",
            f"pretrain.phases={json.dumps([{'updates': 1}, {'updates': 2, 'blend': list(sources), **phase}])}",
        ]

    before = settings("a", "b")
    assert check("pretrain", before, settings("/x/a", "/y/b", cp=2)) is False
    moved = {"path": "/x/b", "weight": 2.0}
    for other in (settings("a"), settings("b", "a", "c"), settings(), settings("a", moved)):
        with pytest.raises(ConfigError, match=r"pretrain\.phases\.1\.blend="):
            check("pretrain", before, other)
    places = {"data.blend.0": "a", "pretrain.phases.1.blend.0": "a", "pretrain.phases.1.blend.1": "b"}
    files = {f"{key}{end}": f"{name}{end}" for key, name in places.items() for end in (".idx", ".bin")}
    assert input_paths(load_config(None, before), "pretrain") == files
    assert input_paths(load_config(None, before), "sft") == {}
    given = load_config(None, before).pretrain.phases
    assert [[(source.path, source.weight) for source in phase.blend] for phase in given] == [[], [("a", 1.0), ("b", 1.0)]]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.blend=[{path: a, weight: -1}]", "'data.blend.0.weight' on the command line is -1, expected greater than 0"),
        ("data.blend=[{path: a, weight: 0}]", "greater than 0"),
        ("data.blend=[{weight: 1}]", "'data.blend.0.path'"),
        ("pretrain.phases=[{updates: 1, blend: [{path: a, weight: 0}]}]", "'pretrain.phases.0.blend.0.weight'"),
        ("data.blend=[{path: a, wieght: 1}]", "'data.blend.0.wieght'"),
        ("data.split=[1]", "'data.split'"),
        ("data.split=[1, 2, 3]", "'data.split'"),
        ("data.split=[1, -1]", "none is negative"),
        ("data.split=[0, 1]", "of training, is not 0"),
    ],
)
def test_a_blend_that_cannot_be_is_told(setting, told):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "length", "updates"),
    [
        ("pretrain", "pretrain.steps", {"=": 10, "to": 20}),
        ("grpo", "grpo.rollouts", {"=": 20, "to": 40}),
        ("sft", "sft.epochs", {"=": 70, "to": 140}),
        ("reward-model", "reward_model.epochs", {"=": 70, "to": 140}),
    ],
)
def test_a_longer_run_goes_on_at_a_constant_rate_or_is_told_how(command, length, updates):
    before, now, section = [*ROUND, f"{length}=10"], [*ROUND, f"{length}=20"], length.partition(".")[0]
    constant, cosine, decay = (f"{section}.optimizer.{name}" for name in ("schedule=constant", "schedule=cosine", "decay_updates"))
    assert check(command, [*before, constant], [*now, constant]) is True
    with pytest.raises(ConfigError, match="a cosine schedule must be told how to go on") as caught:
        check(command, [*before, cosine], [*now, cosine], updates_per_epoch=7)
    assert f"{decay}={updates['=']} to keep the rate" in str(caught.value)
    assert f"{decay}={updates['to']} to let it fall over the whole run" in str(caught.value)
    for number in updates.values():
        assert check(command, [*before, cosine], [*now, cosine, f"{decay}={number}"]) is True
    with pytest.raises(ConfigError, match=f"{decay}=None, now it is 5: it changes only together with {length}"):
        check(command, [*before, cosine], [*before, cosine, f"{decay}=5"])
    assert check(command, [*now, cosine, f"{decay}=5"], [*now, cosine, f"{decay}=5"]) is False, "the same command resumes"


def test_without_a_line_that_tells_the_epoch_the_numbers_are_left_out():
    with pytest.raises(ConfigError, match=r"set sft\.optimizer\.decay_updates to the updates it fell over to keep the rate"):
        check("sft", ["sft.epochs=2"], ["sft.epochs=4"])


def test_a_finished_run_is_made_longer_never_shorter():
    short, long = load_config(None, ["grpo.rollouts=4"]), load_config(None, ["grpo.rollouts=8"])
    require_longer(short, long, "grpo", WHERE)
    with pytest.raises(ConfigError, match=r"grpo\.rollouts=8, now it is 4: keep the value, raise it"):
        require_longer(long, short, "grpo", WHERE)


def test_general_prompts_of_a_longer_run_begin_where_they_began():
    general = [*ROUND, "data.general_source=tally_chat"]
    before = [*general, "grpo.rollouts=10", "grpo.general_updates=8"]
    assert first_general_rollout(load_config(None, before).grpo) == 6
    with pytest.raises(ConfigError, match=r"general prompts from round 7 on, .*set grpo\.general_updates=28"):
        check("grpo", before, [*general, "grpo.rollouts=20", "grpo.general_updates=8"])
    assert check("grpo", before, [*general, "grpo.rollouts=20", "grpo.general_updates=28"]) is True
    assert check("grpo", [*ROUND, "grpo.rollouts=10"], [*ROUND, "grpo.rollouts=20"]) is True, "without them nothing is asked"


@pytest.mark.parametrize(
    "setting",
    ["rollout.max_response_tokens=65536", "grpo.length_schedule=[{after_updates: 9, max_response_tokens: 65536}]"],
)
def test_the_length_of_responses_may_change_while_rounds_follow(setting):
    assert check("grpo", [], [setting]) is False
    assert check("grpo", [], [setting, "grpo.rollouts=651"], finished=True) is True
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}=.*, now it is .*: keep the value"):
        check("grpo", [], [setting], finished=True)


def test_a_setting_says_why_it_must_stay():
    for reason, names in STAYS.items():
        assert not reason.endswith(".") and names.split()
    assert kind_on_resume("grpo.optimizer.lr") == "stays" and reason_to_stay("grpo.optimizer.lr") == "it says what an update does"
    assert "must stay as it was: it says what an update does" in explain("grpo.clip_eps", {})
    assert "its content must stay" in explain("data.source", {}) and "longer" in explain("grpo.rollouts", {})
    assert {kind_on_resume(key) for key in known_keys()} == {"free", "moves", "longer", "onward", "stays"}
