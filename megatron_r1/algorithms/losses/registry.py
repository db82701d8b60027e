"""Losses by the names that the settings give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from megatron_r1.algorithms.losses.contract import Metrics, PolicyLoss
from megatron_r1.algorithms.losses.grpo import grpo_loss
from megatron_r1.algorithms.losses.pairwise import pairwise_loss
from megatron_r1.algorithms.losses.safety import safety_loss
from megatron_r1.errors import ConfigError
from megatron_r1.import_path import import_function, is_import_path

#: What `grpo.loss` may name.
POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": grpo_loss}
#: By `reward_model.kind`; each takes `(scores_S, safe_S, denominator=...)`.
REWARD_MODEL_LOSSES: dict[str, Callable[..., tuple[torch.Tensor, Metrics]]] = {"helpful": pairwise_loss, "safety": safety_loss}


@cache
def find_policy_loss(name: str) -> PolicyLoss:
    """The loss that `grpo.loss` names: one of `POLICY_LOSSES`, or a user's `package.module:function`.

    Raises:
        ConfigError: there is none of this name, or the function cannot be imported or called as a policy loss.
    """
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    if not is_import_path(name):
        raise ConfigError(f"grpo.loss={name} is not known: write {', '.join(sorted(POLICY_LOSSES))} or package.module:function")
    return import_function(name, "grpo.loss", ("batch", "settings"))
