"""How a model is laid out over ranks, checked before anything is built. Pure: no torch.distributed, no Megatron-Core."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_r1.config.model import ParallelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.types import round_up

_STAGE_WORDS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_REPEATED = re.compile(r"(?:\(([^()]*)\)|([EtmL]))\*(\d{1,4})")
_LONGEST_STAGES = 10_000  # letters


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism; tp * pp * cp * dp = world_size."""

    tp: int = 1  #: tensor
    pp: int = 1  #: pipeline
    vpp: int = 1  #: virtual pipeline stages per rank
    ep: int = 1  #: expert
    etp: int = 1  #: tensor inside experts
    cp: int = 1  #: context
    dp: int = 1  #: data (of everything but experts)
    sequence_parallel: bool = False
    world_size: int = 1
    stages: tuple[tuple[str, ...], ...] = ()  #: what each pipeline stage has, virtual ones in turn, see `read_stages`; (): even

    def decoder_layers(self, num_layers: int) -> list[int]:
        """Decoder layers of every pipeline stage, virtual ones in turn."""
        return [stage.count("decoder") for stage in self.stages] or stage_layers(num_layers, self.pp * self.vpp)

    @property
    def pad_multiple(self) -> int:
        """What the length of a packed micro-batch is a multiple of."""
        return self.tp * self.cp * 2

    @property
    def sequence_multiple(self) -> int:
        """What the room of every packed sequence is a multiple of: context parallelism cuts each into equal parts, two a rank."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def count_multiple(self) -> int:
        """What the number of micro-batches of a data-parallel rank is a multiple of: an interleaved pipeline needs that."""
        return self.pp if self.vpp > 1 else 1


def group_sizes(layout: Layout) -> list[int]:
    """Members of every group that Megatron-Core makes for one rank of the layout, and that torch connects."""
    tp, pp, cp, dp, ep, etp = layout.tp, layout.pp, layout.cp, layout.dp, layout.ep, layout.etp
    expert_dp = layout.world_size // (etp * ep * pp)
    embeddings = [min(pp, 2), 1]  # of the ends of a pipeline: word embeddings, position embeddings
    whole = tp * cp * dp
    of_share = [tp * cp * pp] if cp > 1 else []  # `parallel` makes it; without context parallelism there is one
    return [
        dp * cp, dp * cp, dp, dp, cp, tp * pp, tp, pp, *embeddings, whole, tp * dp, tp * cp,
        ep, etp, etp * ep, etp * ep * pp, expert_dp, expert_dp, layout.world_size, *of_share,
    ]  # fmt: skip


def resolve_layout(
    parallel: ParallelConfig, arch: Architecture, world_size: int, *, mtp: bool, stages: str | None = None
) -> Layout:
    """The layout that `parallel` asks for on `world_size` ranks.

    Args:
        parallel: sizes; data parallelism is what is left.
        arch: the model that is laid out.
        world_size: number of processes.
        mtp: whether multi-token prediction is trained.
        stages: `megatron.pipeline_model_parallel_layout`.

    Raises:
        ConfigError: the sizes do not divide the world or the model, or Megatron-Core 0.16.1 cannot or wrongly computes it.
    """
    tp, pp, vpp, ep, cp = parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.cp
    etp = parallel.etp or (tp if ep == 1 else 1)
    sequence_parallel = tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel

    _require_fit(
        world_size % (tp * pp * cp) == 0, f"parallel.tp={tp} x pp={pp} x cp={cp} does not divide the {world_size} processes"
    )
    _require_fit(
        world_size % (etp * ep * pp) == 0,
        f"parallel.ep={ep} x etp={etp} x pp={pp} does not divide the {world_size} processes",
    )
    _check_model(arch, tp, ep, etp)
    _check_pipeline(arch, pp, vpp, even=stages is None)
    read = () if stages is None else read_stages(stages, arch, pp, vpp)
    _require_fit(
        etp == tp or ep > 1,
        f"parallel.etp={etp} with tp={tp} needs parallel.ep above 1: Megatron-Core computes expert gradients wrongly otherwise",
    )
    _require_fit(
        sequence_parallel or tp == 1,
        f"parallel.sequence_parallel=false with tp={tp}: MLA's replicated key down-projection loses the sum of its gradient over "
        "tensor parallel ranks, and Megatron-Core does not train mixture-of-experts layers that way; leave it unset",
    )
    _require_fit(not sequence_parallel or tp > 1, "parallel.sequence_parallel=true needs parallel.tp above 1; leave it unset")
    _require_fit(
        not mtp or arch.mtp_depth > 0,
        "moe.mtp_loss_scale above 0 needs a model with num_nextn_predict_layers above 0",
    )
    return Layout(tp, pp, vpp, ep, etp, cp, world_size // (tp * pp * cp), sequence_parallel, world_size, read)


def smallest_layout(parallel: ParallelConfig, arch: Architecture, stages: str | None = None) -> Layout:
    """The layout of these sizes on as few ranks as they need. Raises ConfigError if the sizes do not fit the model."""
    etp = parallel.etp or (parallel.tp if parallel.ep == 1 else 1)
    world_size = parallel.pp * math.lcm(parallel.tp * parallel.cp, etp * parallel.ep)
    return resolve_layout(parallel, arch, world_size, mtp=False, stages=stages)


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Decoder layers of every pipeline stage; the first ones take the rest, since the last also has the output head."""
    base, rest = divmod(num_layers, stages)
    return [base + (stage < rest) for stage in range(stages)]


def read_stages(text: str, arch: Architecture, pp: int, vpp: int) -> tuple[tuple[str, ...], ...]:
    """The stages that Megatron-LM's layout string names, in Megatron-Core's words: "Et*2|(t|)*2tmL".

    Raises:
        ConfigError: the string is none, or does not fit the model or the number of stages.
    """
    key = f"megatron.pipeline_model_parallel_layout={text!r}"
    plain = "".join(text.replace(",", "").split())
    before = None
    while before != plain and len(plain) <= _LONGEST_STAGES:
        before, plain = plain, _REPEATED.sub(_repeat, plain)
    _require_fit(len(plain) <= _LONGEST_STAGES, f"{key:.200} has too many layers")
    unknown = " ".join(sorted(set(plain) - {*_STAGE_WORDS, "|"}))
    words = "E is the embedding, t a layer, m multi-token prediction, L the loss, | ends a stage, x*3 and (xy)*3 repeat"
    _require_fit(not unknown, f"{key:.200} has {unknown}: {words}")
    stages = tuple(tuple(_STAGE_WORDS[letter] for letter in stage) for stage in plain.split("|"))
    letters = plain.replace("|", "")
    _require_fit(pp > 1, f"{key} needs parallel.pp above 1")
    _require_fit(len(stages) == pp * vpp, f"{key} has {len(stages)} stages, parallel.pp={pp} x vpp={vpp} are {pp * vpp}")
    _require_fit(
        letters.count("t") == arch.num_hidden_layers, f"{key} has {letters.count('t')} layers, the model {arch.num_hidden_layers}"
    )
    depth = arch.mtp_depth
    _require_fit(letters.count("m") == depth, f"{key} has {letters.count('m')} of multi-token prediction, the model {depth}")
    _require_fit(
        letters == "E" + "t" * arch.num_hidden_layers + "m" * depth + "L",
        f"{key} is out of order: E comes first, then every t, every m, and L",
    )
    _require_fit(stages[-1].count("mtp") == depth, f"{key} has multi-token prediction apart from the loss: put m into L's stage")
    return stages


def _repeat(found: re.Match[str]) -> str:
    part, count = found[1] or found[2] or "", int(found[3])
    return part * count if len(part) * count <= _LONGEST_STAGES else "t" * (_LONGEST_STAGES + 1)  # which is refused


def padded_vocabulary(size: int, tp: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks: rows that no token has are added until they divide."""
    return round_up(size, tp)


def _check_model(arch: Architecture, tp: int, ep: int, etp: int) -> None:
    _require_fit(
        ep == 1 or arch.experts is not None,
        f"parallel.ep={ep} needs a model with experts, {arch.model_type} has none: leave it unset",
    )
    for axis, size in (("tp", tp), ("ep", ep), ("etp", etp)):
        for what, dimension in arch.split_sizes()[axis].items():
            _require_fit(dimension % size == 0, f"parallel.{axis}={size} does not divide {what}={dimension} of the model")


def _check_pipeline(arch: Architecture, pp: int, vpp: int, *, even: bool) -> None:
    layers = arch.num_hidden_layers
    _require_fit(vpp == 1 or pp > 1, f"parallel.vpp={vpp} needs parallel.pp above 1")
    needed = f"parallel.pp={pp} x vpp={vpp} needs at least {pp * vpp} layers, the model has {layers}"
    _require_fit(not even or pp * vpp <= layers, needed)


def _require_fit(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
