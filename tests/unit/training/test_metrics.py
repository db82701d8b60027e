"""How metrics of updates become those of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.training.metrics import loss_metrics
from megatron_r1.types import Metric


@dataclass(frozen=True)
class Update:
    metrics: dict[str, Metric[float]]
    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    tokens: int = field(default=999)  # padding included: no metric may be divided by it


def test_each_reduction() -> None:
    updates = [
        Update(
            {
                "a": Metric(3.0, "sum"),
                "b": Metric(4.0, "token_mean"),
                "c": Metric(2.0, "sample_mean"),
                "d": Metric(7.0, "max"),
                "e": Metric(1.0, "update_mean"),
            }
        ),
        Update(
            {
                "a": Metric(1.0, "sum"),
                "b": Metric(6.0, "token_mean"),
                "c": Metric(1.0, "sample_mean"),
                "d": Metric(-5.0, "max"),
                "e": Metric(4.0, "update_mean"),
            }
        ),
    ]
    assert loss_metrics(updates, tokens=20, samples=6) == {"a": 4.0, "b": 0.5, "c": 0.5, "d": 7.0, "e": 2.5}
