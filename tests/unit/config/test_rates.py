"""Learning rates against Megatron-Core's scheduler, which has the same formulas, to the last bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rates import Rates, constant_but_lr, learning_rate

CASES: list[dict[str, Any]] = [
    {"schedule": "constant"},
    {"schedule": "constant", "warmup_steps": 7},
    {"schedule": "cosine", "min_lr_ratio": 0.1},
    {"schedule": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 30},
    {"schedule": "linear", "min_lr_ratio": 0.0, "warmup_steps": 3, "decay_updates": 50},
    {"schedule": "cosine", "min_lr_ratio": 0.3, "warmup_steps": 100},  # as many as there are updates
    *(
        {"schedule": "wsd", "min_lr_ratio": 0.1, "warmup_steps": 5, "wsd_decay_updates": 20, "wsd_decay_shape": shape}
        for shape in ("minus_sqrt", "linear", "cosine", "exponential")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rates_are_those_of_megatrons_scheduler(case: dict[str, Any]) -> None:
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer, group = OptimizerConfig(lr=4e-3, **case), {}
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=optimizer.lr, min_lr=optimizer.lr * optimizer.min_lr_ratio,
        lr_warmup_steps=optimizer.warmup_steps, lr_decay_steps=max(optimizer.decay_updates or 100, optimizer.warmup_steps + 1),
        lr_decay_style=optimizer.schedule if optimizer.schedule != "wsd" else "WSD", start_wd=0.1, end_wd=0.1, wd_incr_steps=0,
        wd_incr_style="constant", wsd_decay_steps=optimizer.wsd_decay_updates, lr_wsd_decay_style=optimizer.wsd_decay_shape,
    )  # fmt: skip
    ours = learning_rate(optimizer, total_updates=100)
    for update in range(1, 131):
        theirs.step(1)
        assert ours(update) == group["lr"]


def test_wsd_falls_in_the_last_tenth_and_never_within_the_warm_up() -> None:
    rate = learning_rate(OptimizerConfig(lr=1.0, schedule="wsd", min_lr_ratio=0.0, wsd_decay_shape="linear"), 1000)
    assert [rate(update) for update in (1, 900, 950, 1000, 1001)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])
    settings = {"warmup_steps": 6, "wsd_decay_updates": 90, "wsd_decay_shape": "linear"}
    rate = learning_rate(OptimizerConfig(lr=1.0, schedule="wsd", min_lr_ratio=0.0, **settings), 10)
    assert [rate(update) for update in (3, 6, 8, 10)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_other_stages_change_their_learning_rate_alone() -> None:
    rates = constant_but_lr(OptimizerConfig(lr=1.0, warmup_steps=2), MoeTrainingConfig(bias_update_rate=0.1, mtp_loss_scale=0.3), 9)
    assert [rates(1), rates(5)] == [Rates(0.5, 0.1, 0.3), Rates(1.0, 0.1, 0.3)]
