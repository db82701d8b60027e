"""What a policy loss is given and what it returns. `docs/how_to/loss.md` writes one.

A policy loss is a pure function `loss(batch: PolicyBatch, settings: PolicySettings) -> (loss, metrics)`. It is called once for
each micro-batch of a policy update, with every sequence of the micro-batch whole, whatever the parallel layout.

It returns

- the loss: a scalar tensor with gradient, **this micro-batch's part** of the minibatch's loss. Parts of micro-batches and ranks
  are added, so a mean divides by a number of the whole minibatch (`minibatch_sequences`, `minibatch_tokens`), never by one of
  the micro-batch. A loss that keeps to this does not depend on the layout or on the size of a micro-batch;
- metrics: a name, with a slash as in "ratio/max", -> `Metric`; the same names at every call. Each says how its parts become
  one number of the step: "sum", "token_mean" (the parts' sum over trained tokens), "sample_mean" (over sequences) or "max".
  Values are scalars without gradient: sums over this micro-batch, or the largest value in it. They appear in `metrics.jsonl`.

A micro-batch may be all padding: `loss_mask` is then zero everywhere, and the loss and all sums must be 0, not NaN. A loss or a
gradient that is not finite is never applied: the run stops, or skips the update (`runtime.skip_nonfinite_updates`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from megatron_r1.errors import ConfigError
from megatron_r1.types import Metric, Reduction

Metrics = dict[str, Metric[torch.Tensor]]


@dataclass(frozen=True)
class PolicyBatch:
    """One micro-batch: S sequences (a prompt and its response each) end to end in a row of N target tokens.

    A prompt that several responses share (`grpo.share_prompts`) is a sequence of its own, without response tokens like padding.

    Entries outside the mask (prompts, padding) are there to be ignored: all log-probs may be anything finite there.
    """

    logprobs: torch.Tensor  #: [1, N] log pi_theta of the target tokens, with gradient
    old_logprobs: torch.Tensor  #: [1, N] of the policy before the first update on these responses
    rollout_logprobs: torch.Tensor  #: [1, N] of the rollout engine, which sampled them
    ref_logprobs: torch.Tensor | None  #: [1, N] of the reference policy, if there is one
    advantages: torch.Tensor  #: [1, N] A_i at every token of sequence i
    loss_mask: torch.Tensor  #: [1, N] float, 1 on response tokens, else 0
    sequence_ids: torch.Tensor  #: [1, N] int64, which of the S sequences a token belongs to
    sequence_lengths: torch.Tensor  #: [1, N] float, |o_i| at every token of sequence i: its response tokens, at least 1
    num_sequences: int  #: S, padding sequences included
    minibatch_sequences: int  #: responses of the whole minibatch, over all micro-batches and ranks
    minibatch_tokens: int  #: response tokens of the whole minibatch

    def sum_sequences(self, values: torch.Tensor) -> torch.Tensor:
        """[S] sums of per-token values [1, N] over the response tokens of each sequence, with gradient."""
        kept = torch.where(self.loss_mask > 0, values, 0.0).flatten()
        return kept.new_zeros(self.num_sequences).index_add(0, self.sequence_ids.flatten(), kept)

    def at_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[1, N] from one value per sequence [S]: the value of its sequence at every token, with gradient."""
        return values[self.sequence_ids]


@dataclass(frozen=True)
class PolicySettings:
    """The settings of the section `grpo` that a loss may use."""

    clip_eps: float  #: epsilon of the clipped ratio
    kl_coef: float  #: beta, weight of the penalty for leaving the reference policy; 0: none
    normalization: Literal["sequence", "token"]  #: whether responses or tokens weigh the same
    importance_cap: float = 0.0  #: most that a token's policy term is weighted by pi_old / pi_rollout; 0: no weights


PolicyLoss = Callable[[PolicyBatch, PolicySettings], tuple[torch.Tensor, Metrics]]


def checked_result(result: Any, name: str) -> tuple[torch.Tensor, Metrics]:
    """What the loss of this name returned, if it keeps to the contract: a user's own may not, and would fail far from its cause.

    Raises:
        ConfigError: the result is not a scalar with gradient and a dictionary of metrics.
    """
    match result:
        case (torch.Tensor() as loss, dict() as metrics) if loss.ndim == 0 and loss.requires_grad:
            for key, metric in metrics.items():
                if not (isinstance(metric, Metric) and isinstance(metric.value, torch.Tensor) and metric.value.ndim == 0):
                    raise ConfigError(f"grpo.loss={name} returned a metric {key} that is no Metric of a scalar tensor")
                if "/" not in key:  # names without one are the loop's own: loss, lr ...
                    raise ConfigError(f"grpo.loss={name} returned a metric {key}: write a name with a slash, such as {key}/mean")
                if metric.reduction not in get_args(Reduction):
                    raise ConfigError(
                        f"grpo.loss={name} returned a metric {key} with reduction {metric.reduction}, "
                        f"expected one of {', '.join(get_args(Reduction))}"
                    )
            return loss, metrics
    raise ConfigError(f"grpo.loss={name} must return a scalar tensor with gradient and a dictionary of metrics")
