"""The nouns of the training loop, in the order in which data flows through them.

    Prompt -> Rollout -> RolloutGroup -> TrainingSample -> MicroBatch

Axis names: P prompts, G samples of a group, T tokens of one sequence, S sequences of a micro-batch, N tokens of a packed
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

KINDS = ("reasoning", "general")  #: of prompts
DOMAINS = ("math", "code", "choice")  #: of reasoning prompts; `reward.domains` adds to these
PREFERENCES = ("helpful", "safety")  #: of general prompts
PADDING = -1  #: sample id of a sequence of padding


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenised."""

    id: str  #: stable over runs: rollouts, data cursor and seeds refer to it
    question: str  #: the bare question, before the template
    answer: str  #: reference answer in the form that the reward function reads
    text: str  #: the rendered template, exactly what `token_ids` encode
    token_ids: tuple[int, ...]  #: [T] prompt tokens, beginning-of-sequence included
    language: str = ""  #: "en", "zh", or "" if unknown
    domain: str = "math"  #: the subject, which names the scorer of accuracy; the `answer` of "code" is its tests as JSON
    kind: str = "reasoning"  #: which rewards apply: "reasoning" has a rule, "general" needs a model
    preference: str = "helpful"  #: of a general prompt: its reward model, "helpful" or "safety" (R1 v2 (arXiv) section 3.1)
    context: tuple[tuple[str, str], ...] = ()  #: (role, text) of what was said before the question


@dataclass(frozen=True)
class Sampling:
    """How to sample responses. `temperature` 0 is greedy."""

    n: int  #: responses per prompt (G)
    temperature: float
    top_p: float
    max_tokens: int  #: response tokens, end-of-sequence included


@dataclass
class Rollout:
    """One sampled response."""

    token_ids: list[int]  #: [T] response tokens, end-of-sequence included when `finished`
    rollout_logprobs: list[float]  #: [T] natural log, of the distribution sampled from (temperature and top-p applied)
    text: str  #: decoded response without end-of-sequence
    finished: bool  #: ended with end-of-sequence; False: cut at max_tokens


@dataclass
class RolloutGroup:
    """All responses to one prompt: the unit over which GRPO normalises."""

    prompt: Prompt
    rollouts: list[Rollout]  #: [G]
    weights_version: int  #: trainer version that sampled them
    rewards_G: torch.Tensor | None = None  #: [G] float64, total reward
    reward_parts: dict[str, list[float | None]] = field(default_factory=dict)  #: name -> [G], e.g. "accuracy"; None: no score
    advantages_G: torch.Tensor | None = None  #: [G] float64
    reward_outcomes: dict[str, list[str]] = field(default_factory=dict)  #: name -> [G], see `rewards.protocol.Outcome`
    reward_details: dict[str, list[str]] = field(default_factory=dict)  #: name -> [G], why; one line each
    reward_magnitude: float = 0.0  #: the largest sum over a response's components without their signs: what rounding is measured by


class SamplingEngine(Protocol):
    """The part of a rollout engine that samples: all that evaluation and curation need of it."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        """`sampling.n` responses to every prompt; `on_group` is called with every group as soon as it is there."""


@dataclass
class TrainingSample:
    """One sequence to train on. Every [T-1] field is aligned to targets: entry t belongs to `token_ids[t + 1]`."""

    token_ids: list[int]  #: [T] prompt and response
    loss_mask: list[int]  #: [T-1] 1 where the target is trained on
    advantage: float = 0.0  #: scalar, the same for every token of the response
    rollout_logprobs: torch.Tensor | None = None  #: [T-1] float32, 0 outside the mask
    old_logprobs: torch.Tensor | None = None  #: [T-1] float32, the trainer's before the first update of this rollout
    ref_logprobs: torch.Tensor | None = None  #: [T-1] float32, the reference policy's
    name: str = ""  #: what it was made of, for messages: a problem's response, a file's record

    @property
    def num_targets(self) -> int:
        """Number of positions this sample occupies in a packed micro-batch."""
        return len(self.token_ids) - 1

    @property
    def num_trained(self) -> int:
        """Number of targets with loss."""
        return sum(self.loss_mask)


@dataclass
class MicroBatch:
    """What one forward pass takes: sequences packed end to end ("thd"), or `[B, T]` rows when `cu_seqlens` is None.

    Packed: B is 1, the row holds S sequences and `cu_seqlens[-1]` is N; padding stands at the end as sequences of its own,
    without loss and with sample id `PADDING`.
    All tensors are on the CPU until the policy moves them.
    """

    token_ids: torch.Tensor  #: [B, N] int64
    labels: torch.Tensor  #: [B, N] int64, the next token
    loss_mask: torch.Tensor  #: [B, N] float32
    position_ids: torch.Tensor  #: [B, N] int64, starts at 0 in every sequence
    cu_seqlens: torch.Tensor | None = None  #: [S+1] int32 boundaries
    sample_ids: list[int] = field(default_factory=list)  #: [S] index of each sequence in the list that was packed, or `PADDING`
    token_fields: dict[str, torch.Tensor] = field(default_factory=dict)  #: name -> [B, N] float32: "advantages",
    #: "old_logprobs", "ref_logprobs", "rollout_logprobs", "sequence_lengths" (trained tokens of the token's sequence)
    documents: torch.Tensor | None = None  #: [B, N] int64, of a stream of documents: the number of the one at each position

    @property
    def num_tokens(self) -> int:
        """Positions of the micro-batch, padding included."""
        return self.token_ids.numel()

    def sample_at(self, position: int) -> int:
        """Sample id of the packed sequence at a position, or `PADDING`."""
        assert self.cu_seqlens is not None, "only packed micro-batches hold samples"
        return self.sample_ids[int(torch.searchsorted(self.cu_seqlens.cpu(), position, right=True)) - 1]

    @property
    def is_real(self) -> list[bool]:
        """Whether each packed sequence is one, or padding: [S]. Rows have no padding: [B] of True."""
        if self.cu_seqlens is None:
            return [True] * self.token_ids.shape[0]
        return [sample_id != PADDING for sample_id in self.sample_ids]

    def sequence_numbers(self) -> torch.Tensor:
        """[1, N] int64: which of the S packed sequences each position belongs to, padding sequences included."""
        assert self.cu_seqlens is not None, "only packed micro-batches hold several sequences in a row"
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(lengths, output_size=self.num_tokens)[None]

    def to(self, device: torch.device) -> MicroBatch:
        """A copy with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        token_fields = {name: value.to(device) for name, value in self.token_fields.items()}
        return replace(self, **moved, token_fields=token_fields)


#: How the values of micro-batches, ranks and minibatches become one number of a step: "sum" adds them; "token_mean" divides
#: their sum by the step's trained tokens, "sample_mean" by its samples, "update_mean" by its updates; "max" takes the largest.
Reduction = Literal["sum", "token_mean", "sample_mean", "update_mean", "max"]
Value = TypeVar("Value", torch.Tensor, float)


@dataclass(frozen=True)
class Metric(Generic[Value]):
    """A number that a loss reports beside itself: a scalar tensor for one micro-batch, a float for a whole minibatch."""

    value: Value  #: this part's sum, or its largest value
    reduction: Reduction


def filled(value: torch.Tensor | None) -> torch.Tensor:
    """A field that an earlier step of the loop has filled."""
    assert value is not None, "read before the step that fills it"
    return value
