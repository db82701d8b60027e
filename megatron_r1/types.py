"""The nouns of the training loop, in the order in which data flows through them.

    Prompt -> Rollout -> RolloutGroup -> TrainingSample -> MicroBatch

Axis names: P prompts, G samples of a group, T tokens of one sequence, S sequences of a micro-batch, N tokens of a packed
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch

KINDS = ("reasoning", "general")  #: of prompts
DOMAINS = ("math", "code", "choice")  #: of reasoning prompts; `reward.domains` adds to these
PREFERENCES = ("helpful", "safety")  #: of general prompts
PADDING = -1  #: sample id of a sequence of padding
PROMPT = -2  #: sample id of a prompt that sequences after it share
MOST_TEMPERATURE = 2.0  #: vLLM refuses a higher one
LOGPROBS = ("rollout_logprobs", "old_logprobs", "ref_logprobs")  #: fields of a training sample


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
    greedy: int = 0  #: further responses per prompt at temperature 0, which stand after the others in a group

    @property
    def responses(self) -> int:
        """Responses per prompt of both kinds."""
        return self.n + self.greedy


def hollow(length: int, dtype: type[np.generic]) -> np.ndarray:
    """[length] zeros that take no memory and cannot be written: in place of an array that another rank holds."""
    return np.broadcast_to(dtype(0), length)


@dataclass(eq=False)
class Rollout:
    """One sampled response."""

    token_ids: np.ndarray  #: [T] int32 response tokens, the end-of-sequence or the stop text that ended it included
    rollout_logprobs: np.ndarray  #: [T] float32 natural log, of the distribution sampled from (temperature and top-p applied)
    text: str  #: decoded response without end-of-sequence
    finished: bool  #: ended with end-of-sequence or a text of `rollout.stop`; False: cut at max_tokens

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        self.rollout_logprobs = np.asarray(self.rollout_logprobs, dtype=np.float32)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rollout)
            and (self.text, self.finished) == (other.text, other.finished)
            and np.array_equal(self.token_ids, other.token_ids)
            and np.array_equal(self.rollout_logprobs, other.rollout_logprobs)
        )


@dataclass
class RolloutGroup:
    """All responses to one prompt: the unit over which GRPO normalises.

    The rank that sampled a group holds it. Other ranks may know its outline: lengths and scores, but neither texts nor details, and
    `hollow` arrays.
    """

    prompt: Prompt
    rollouts: list[Rollout]  #: [G]
    weights_version: int  #: trainer version that sampled them
    rewards_G: torch.Tensor | None = None  #: [G] float64, total reward
    reward_parts: dict[str, list[float | None]] = field(default_factory=dict)  #: name -> [G], e.g. "accuracy"; None: no score
    advantages_G: torch.Tensor | None = None  #: [G] float64
    reward_outcomes: dict[str, list[str]] = field(default_factory=dict)  #: name -> [G], see `rewards.protocol.Outcome`
    reward_details: dict[str, list[str]] = field(default_factory=dict)  #: name -> [G], why; one line each
    reward_magnitude: float = 0.0  #: the largest sum over a response's components without their signs: what rounding is measured by
    position: int = 0  #: of the prompt in the batch
    owner: int = 0  #: the rank that sampled it and holds it


class SamplingEngine(Protocol):
    """The part of a rollout engine that samples: all that evaluation and curation need of it."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        """Sample `sampling.responses` responses to every prompt; `on_group` is called with a group as soon as it is there.

        Returned, in the order of prompts, are the groups that this rank owns. One process owns all.
        """


@dataclass(eq=False)
class TrainingSample:
    """One sequence to train on. Every [T-1] field is aligned to targets: entry t belongs to `token_ids[t + 1]`.

    Every rank knows every sample of a minibatch, but of most it knows the lengths alone: the arrays of a sample that is not `here`
    are `hollow`.
    """

    token_ids: np.ndarray  #: [T] int32 prompt and response
    loss_mask: np.ndarray | slice  #: [T-1] int8, 1 where the target is trained on; or the slice of the targets that are
    advantage: float = 0.0  #: scalar, the same for every token of the response
    rollout_logprobs: np.ndarray | None = None  #: [T-1] float32, 0 outside the mask
    old_logprobs: np.ndarray | None = None  #: [T-1] float32, the trainer's before the first update of this rollout; outside the
    #: mask any finite number, as in `ref_logprobs`
    ref_logprobs: np.ndarray | None = None  #: [T-1] float32, the reference policy's
    name: str = ""  #: what it was made of, for messages: a problem's response, a file's record
    here: bool = True  #: whether this rank holds the arrays; those that its pipeline stage does not need are `hollow` all the same
    holder: int = 0  #: the rank that sends the arrays to wherever they are needed next
    #: samples of one number are alike before the first target with loss, and may share that; None: none is
    group: int | None = None
    home: int | None = None  #: the data-parallel rank that trains on it; None: whichever packing chooses, as every rank has all

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        if not isinstance(self.loss_mask, slice):
            self.loss_mask = np.asarray(self.loss_mask, dtype=np.int8)
        for name in LOGPROBS:
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name), dtype=np.float32))

    @property
    def num_targets(self) -> int:
        """Number of positions this sample occupies in a packed micro-batch."""
        return len(self.token_ids) - 1

    @property
    def num_trained(self) -> int:
        """Number of targets with loss."""
        if isinstance(self.loss_mask, slice):
            return len(range(*self.loss_mask.indices(self.num_targets)))
        return int(self.loss_mask.sum())

    @property
    def trained(self) -> np.ndarray | slice:
        """What picks the targets with loss out of a [T-1] array."""
        return self.loss_mask if isinstance(self.loss_mask, slice) else self.loss_mask > 0


@dataclass
class MicroBatch:
    """What one forward pass takes: sequences packed end to end ("thd"), or `[B, T]` rows when `cu_seqlens` is None.

    Packed: B is 1, the row holds S sequences and `cu_seqlens[-1]` is N; padding stands at the end as sequences of its own,
    without loss and with sample id `PADDING`. Where context parallelism cuts sequences, padding also stands behind each: see
    `lengths`.
    Responses may share their prompt: it is then a sequence of its own, without loss and with sample id `PROMPT`, and those that
    name it in `prompts` go on from it: they attend to it, and their positions follow its.
    All tensors are on the CPU until the policy moves them.
    """

    token_ids: torch.Tensor  #: [B, N] int64
    labels: torch.Tensor  #: [B, N] int64, the next token
    loss_mask: torch.Tensor  #: [B, N] float32
    position_ids: torch.Tensor  #: [B, N] int64, starts at 0 in every sequence, or after its prompt
    cu_seqlens: torch.Tensor | None = None  #: [S+1] int32 boundaries
    #: [S] index of each sequence in the list that was packed, `PADDING` or `PROMPT`
    sample_ids: list[int] = field(default_factory=list)
    #: [S] which sequence is the prompt that each goes on from, itself: none; or []
    prompts: list[int] = field(default_factory=list)
    #: [S] tokens of each sequence, without the padding behind it; or []: nothing is behind any
    lengths: list[int] = field(default_factory=list)
    token_fields: dict[str, torch.Tensor] = field(default_factory=dict)  #: name -> [B, N] float32: "advantages",
    #: "old_logprobs", "ref_logprobs", "rollout_logprobs", "sequence_lengths" (trained tokens of the token's sequence)
    documents: torch.Tensor | None = None  #: [B, N] int64, of a stream of documents: the number of the one at each position

    @property
    def num_tokens(self) -> int:
        """Positions of the micro-batch, padding included."""
        return self.token_ids.numel()

    def sample_at(self, position: int) -> int:
        """Sample id of the packed sequence at a position, or `PADDING`; in a shared prompt that of the first that shares it."""
        assert self.cu_seqlens is not None, "only packed micro-batches hold samples"
        number = int(torch.searchsorted(self.cu_seqlens.cpu(), position, right=True)) - 1
        return self.sample_ids[number + (self.sample_ids[number] == PROMPT)]

    @property
    def is_real(self) -> list[bool]:
        """Whether each packed sequence is a sample, not padding or a shared prompt: [S]. Rows have no padding: [B] of True."""
        if self.cu_seqlens is None:
            return [True] * self.token_ids.shape[0]
        return [sample_id >= 0 for sample_id in self.sample_ids]

    def sequence_tokens(self) -> torch.Tensor:
        """[S] int64 tokens of each packed sequence, without padding behind it; of padding at the end of the row, all."""
        assert self.cu_seqlens is not None, "only packed micro-batches hold several sequences in a row"
        if not self.lengths:
            return self.cu_seqlens.diff().long()
        return torch.tensor(self.lengths, device=self.cu_seqlens.device)

    def of_samples(self) -> torch.Tensor:
        """[1, N] bool: which positions are tokens of a sample, neither padding nor a shared prompt."""
        assert self.cu_seqlens is not None, "only packed micro-batches hold samples"
        numbers = self.sequence_numbers()
        ends = self.cu_seqlens[:-1] + self.sequence_tokens() * torch.tensor(self.is_real, device=numbers.device)
        return torch.arange(self.num_tokens, device=numbers.device) < ends[numbers]

    def prompt_tokens(self) -> torch.Tensor:
        """[S] int64 tokens of the prompt that each packed sequence goes on from: 0 if it has none."""
        lengths = self.sequence_tokens()
        if not self.prompts:
            return torch.zeros_like(lengths)
        prompts = torch.tensor(self.prompts, device=lengths.device)
        return torch.where(prompts == torch.arange(len(lengths), device=lengths.device), 0, lengths[prompts])

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


def round_up(number: int, multiple: int) -> int:
    """The next multiple, or the number if it is one."""
    return -(-number // multiple) * multiple


def filled(value: torch.Tensor | None) -> torch.Tensor:
    """A field that an earlier step of the loop has filled."""
    assert value is not None, "read before the step that fills it"
    return value
