"""Phases of a run that goes on: the last one may be longer, others may follow, and all that was trained with stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.resume import check_settings, require_longer
from megatron_r1.errors import ConfigError

WHERE = "run_dir X was started with"
FIRST = {"tokens": 4096, "learning_rate": [{"lr": 1e-3}], "blend": ["a", "b"]}
LAST = {"updates": 3, "sequence_length": 128, "learning_rate": [{"lr": 1e-4}]}


def settings(*phases: dict[str, Any]) -> list[str]:
    return ["data.blend=[a]", f"pretrain.phases={json.dumps(phases)}"]


def check(before: list[str], now: list[str], **more: Any) -> bool:
    return check_settings(load_config(None, before), load_config(None, now), "pretrain", WHERE, **more)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([FIRST], [{**FIRST, "tokens": 4097}]),
        ([FIRST], [FIRST, LAST]),
        ([FIRST], [{**FIRST, "tokens": 8192}, LAST, LAST]),
        ([FIRST, LAST], [FIRST, {**LAST, "updates": 4}]),
        ([FIRST, LAST], [{**FIRST, "blend": ["x/a", "x/b"], "cp": 2}, {**LAST, "updates": 9, "cp": 1}]),
    ],
)
def test_a_run_may_be_longer_at_its_end(before, now, finished: bool) -> None:
    assert check(settings(*before), settings(*now), finished=finished) is True
    require_longer(load_config(None, settings(*before)), load_config(None, settings(*now)), "pretrain", WHERE)
    assert check(settings(*now), settings(*now), finished=finished) is False
    with pytest.raises(ConfigError, match="of phases only the last one may be longer, and others may follow it"):
        check(settings(*now), settings(*before))


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ([{**FIRST, "tokens": 8192}, LAST], "pretrain.phases.0.tokens=4096, now it is 8192: it says what an update does; keep"),
        ([FIRST, {**LAST, "updates": 2}], "pretrain.phases.1.updates=3, now it is 2: "),
        ([FIRST, {**LAST, "updates": None, "tokens": 99999}], "pretrain.phases.1.tokens=None, now it is 99999: "),
        ([LAST, FIRST], "pretrain.phases.0.tokens=4096, now it is None: "),
        ([LAST, FIRST, LAST], "pretrain.phases.0.tokens=4096, now it is None: "),
        ([FIRST, {**LAST, "updates": 9, "sequence_length": 64}], "pretrain.phases.1.sequence_length=128, now it is 64: "),
        ([FIRST, {**LAST, "updates": 9, "learning_rate": [{"lr": 2e-4}]}], "pretrain.phases.1.learning_rate=[{'tokens': None, "),
        ([FIRST, {**LAST, "rope_scaling": "none"}, LAST], "pretrain.phases.1.rope_scaling=None, now it is none: "),
        ([{**FIRST, "blend": ["a"]}, LAST, LAST], "pretrain.phases.0.blend=[{'path': "),
        ([FIRST], "2 entries in pretrain.phases, now it is 1: "),
    ],
)
def test_what_was_trained_with_stays(now, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings(FIRST, LAST), settings(*now))
    assert f"{WHERE} {told}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_of_steps_is_a_run_of_one_phase() -> None:
    steps = ["pretrain.steps=10", "data.blend=[a]"]
    assert check(steps, settings({"updates": 10})) is False and check(settings({"updates": 10}), steps) is False
    assert check(steps, settings({"updates": 10}, LAST)) is True and check(steps, settings({"updates": 11})) is True
    assert check([*settings(LAST), "pretrain.steps=10"], [*settings(LAST), "pretrain.steps=3"]) is False, "nothing reads it"
    with pytest.raises(ConfigError, match=r"pretrain\.phases\.0\.updates=10, now it is 9"):
        check(steps, settings({"updates": 9}, LAST))
    assert check(steps, ["pretrain.steps=9", "data.blend=[a]"]) is True, "which may be fewer while it trains"


def test_a_schedule_over_all_updates_is_told_how_to_go_on() -> None:
    cosine, free = "pretrain.optimizer.schedule=cosine", {"updates": 3}
    assert check([*settings(FIRST), cosine], [*settings(FIRST, LAST), cosine]) is True, "no phase follows the schedule"
    for before, now in (([free], [{"updates": 4}]), ([free], [free, LAST]), ([LAST], [LAST, free])):
        with pytest.raises(
            ConfigError, match="pretrain.phases that now are longer, and a cosine schedule must be told how"
        ) as caught:
            check([*settings(*before), cosine], [*settings(*now), cosine])
        assert "decay_updates to the updates it fell over to keep the rate" in str(caught.value)
        told = "pretrain.optimizer.decay_updates=3"
        assert check([*settings(*before), cosine], [*settings(*now), cosine, told]) is True
    with pytest.raises(ConfigError, match=r"decay_updates=None, now it is 3: it changes only together with pretrain\.phases"):
        check([*settings(free), cosine], [*settings(free), cosine, "pretrain.optimizer.decay_updates=3"])


def test_behind_extra_rounds_of_a_gate_there_is_no_other_phase() -> None:
    gate = ["pretrain.gate_accuracy=0.5", "pretrain.gate_extra_steps=5"]
    assert check([*settings(LAST), gate[0]], [*settings(LAST, LAST), gate[0]]) is True
    with pytest.raises(ConfigError, match="gate_extra_steps=5, whose updates stand behind the last phase"):
        check([*settings(LAST), *gate], [*settings(LAST, LAST), *gate])
    assert check([*settings(LAST), *gate], [*settings(LAST), *gate]) is False
