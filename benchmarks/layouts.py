"""Every layout computes what one rank computes: one update of pretraining, SFT, GRPO and of a reward model, on gloo ranks.

    python -m benchmarks.layouts --out layouts.json

The model is small and has every part of DeepSeek-V3; its router biases move, its balance loss counts, and multi-token prediction
is trained but where a row says it is not. SFT, GRPO and the reward model pack sequences of 7 to 40 tokens end to end; pretraining
has rows of one length. Each case is an update from the same weights on the same batch, packed by its own layout. Compared with one
rank, which packs otherwise, are the log-probs (or scores) of all sequences before the update, its loss, gradient norm, metrics and
the whole gradient, and the router biases after it, which must be equal to the bit.

A cell is the largest of these differences: of log-probs, in nats; of the whole gradient, its norm over that of one rank's; of a
number, absolute where it is below 1, else relative. Nothing is timed. Exit code 1: one is above `BAR`, or a bias differs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Disagreement, describe_machine, positive, print_table, run, write_results
from benchmarks.side_ranks import Answer, SideRanks, serve
from megatron_r1.types import MicroBatch

BAR = 1e-5
STAGES = {"pretrain": "pretraining, rows", "sft": "SFT", "grpo": "GRPO", "reward_model": "reward model"}
#: of a micro-batch; one rank takes others, so that it packs otherwise
TOKENS, TOKENS_OF_ONE_RANK = 80, 200
ROWS, WIDTH = 8, 48
AXES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


@dataclass(frozen=True)
class Way:
    """A layout, and how it is trained."""

    sizes: Mapping[str, int] = field(default_factory=dict)  #: above 1
    recompute: str = "none"
    mtp: bool = True

    @property
    def ranks(self) -> int:
        """That it takes."""
        return math.prod(self.sizes.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))

    @property
    def name(self) -> str:
        """For the table."""
        sizes = " ".join(f"{axis}{self.sizes[axis]}" for axis in AXES if axis in self.sizes) or "one rank"
        more = [f"recompute {self.recompute}"] * (self.recompute != "none") + ["without MTP"] * (not self.mtp)
        return ", ".join([sizes, *more])


WAYS = [
    *[Way(recompute=recompute) for recompute in ("full", "selective")],
    *[Way({axis: 2}) for axis in ("dp", "tp", "pp", "cp")],
    Way({"pp": 2, "vpp": 2}),
    Way({"ep": 2, "dp": 2}),
    *[Way({"cp": 2}, recompute=recompute) for recompute in ("full", "selective")],
    Way({"cp": 2}, mtp=False),
    Way({"ep": 2, "cp": 2}),
    Way({"cp": 4}),
    Way({"cp": 2, "dp": 2}, recompute="full"),
    Way({"ep": 4, "cp": 2, "dp": 2}),
    Way({"tp": 2, "cp": 2}, recompute="selective"),
    Way({"tp": 2, "ep": 2, "cp": 2}),
    Way({"tp": 2, "ep": 2, "etp": 2, "dp": 2}),
    Way({"tp": 2, "pp": 2}),
    Way({"pp": 2, "cp": 2}, mtp=False),
    Way({"pp": 2, "vpp": 2, "cp": 2}, recompute="full"),
    Way({"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 2, "cp": 2}),
    Way({"tp": 2, "ep": 4, "cp": 2, "dp": 2}, recompute="selective"),
    Way({"pp": 2, "ep": 2, "cp": 2, "dp": 2}),
]


def be_rank() -> None:
    """One rank, which makes what it is ordered to and leaves what it found in files."""
    from megatron_r1.mcore import host

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    host.activate("cpu")
    dist.init_process_group("gloo")
    serve({"measure": _measure})
    dist.destroy_process_group()


def _measure(stage: str, sizes: dict[str, int], recompute: str, mtp: bool, tokens: int, out: str) -> Answer:
    from megatron_r1.training.pretrain import loss_over
    from tests.balance_cases import BALANCED, build_model, finish_update, make_batch, one_update

    moe = BALANCED if mtp else BALANCED.model_copy(update={"mtp_loss_scale": 0.0})
    degrees = {axis: size for axis, size in sizes.items() if axis != "dp"}
    model = build_model(
        stage, micro_batch_tokens=tokens, world_size=dist.get_world_size(), recompute=recompute, moe=moe, **degrees
    )  # fmt: skip
    if stage == "pretrain":
        mine = list(_rows(model.layout.dp, model.shares.number))
        outputs = torch.zeros(0)
        found = finish_update(model, model.train_on_micro_batches(mine, loss_over(ROWS * WIDTH)))
    else:
        outputs = _outputs(stage, model, make_batch(stage))
        found = one_update(stage, model)
    if dist.get_rank() == 0:
        torch.save({**found, "outputs": outputs}, out)
    dist.barrier()
    return {}


def _rows(dp: int, number: int) -> Iterator[MicroBatch]:
    """Micro-batches of one row each, of this data-parallel rank."""
    tokens = torch.randint(130, (ROWS, WIDTH + 1), generator=torch.Generator().manual_seed(1))
    for row in tokens[number::dp]:
        yield MicroBatch(row[None, :-1], row[None, 1:], torch.ones(1, WIDTH), torch.arange(WIDTH)[None])


def _outputs(stage: str, model: Any, batch: list[Any]) -> torch.Tensor:
    """Log-probs of all targets of all samples, or scores of all sequences, on every rank."""
    if stage == "reward_model":
        return torch.tensor(model.scores([sequence for example in batch for sequence in example.sequences]))
    logprobs = model.logprobs(batch)
    own = {number: values for number, values in enumerate(logprobs) if model.reports and values is not None}
    of_ranks: list[dict[int, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    whole = {number: values for found in of_ranks for number, values in found.items()}
    return torch.cat([whole[number][batch[number].trained] for number in range(len(batch))])


def difference(got: Mapping[str, Any], want: Mapping[str, Any]) -> tuple[float, str]:
    """The largest one, and of what it is: see the top. Infinite if biases differ, or one side lacks a number."""
    if got.keys() != want.keys() or not torch.equal(got["bias"], want["bias"]):
        return math.inf, "router biases"
    found = {"gradient": ((got["gradient"] - want["gradient"]).norm() / want["gradient"].norm()).item()}
    if want["outputs"].numel():
        found["outputs"] = (got["outputs"] - want["outputs"]).abs().max().item()
    for name in want.keys() - {"bias", "gradient", "outputs"}:
        found[name] = abs(got[name] - want[name]) / max(1.0, abs(want[name]))
    return max((math.inf if math.isnan(value) else value, name) for name, value in found.items())


def benchmark(settings: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        Disagreement: something differs by more than the bar.
    """
    ways = [way for way in WAYS if way.ranks <= settings.most_ranks]
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        for ranks, of_ranks in itertools.groupby(sorted(ways, key=lambda way: way.ranks), key=lambda way: way.ranks):
            with SideRanks(f"{ranks} ranks", [sys.executable, "-m", "benchmarks.layouts", "--rank"], ranks) as side:
                for way in [Way(), Way(mtp=False), *of_ranks] if ranks == 1 else of_ranks:
                    for stage in settings.stages:
                        if stage == "reward_model" and not way.mtp:
                            continue  # it has none
                        is_reference = not way.sizes and way.recompute == "none"
                        out = os.path.join(folder, "found.pt")
                        side.order(
                            "measure", stage=stage, sizes=dict(way.sizes), recompute=way.recompute, mtp=way.mtp,
                            tokens=TOKENS_OF_ONE_RANK if is_reference else TOKENS, out=out,
                        )  # fmt: skip
                        found = torch.load(out)
                        if is_reference:
                            references[stage, way.mtp] = found
                        else:
                            cells.setdefault(way.name, {})[stage] = difference(found, references[stage, way.mtp])
            print(f"{ranks} rank(s): done", file=sys.stderr, flush=True)
    rows = [[name, *(f"{row[stage][0]:.0e}" if stage in row else "" for stage in settings.stages)] for name, row in cells.items()]
    print_table(["against one rank", *(STAGES[stage] for stage in settings.stages)], rows)
    if settings.out is not None:
        write_results(settings.out, settings, {"layouts": cells}, describe_machine("cpu"))
    every = [(f"{name}, {stage}", *cell) for name, row in cells.items() for stage, cell in row.items()]
    off = [f"{case}: {what} by {value:.1e}" for case, value, what in every if value > BAR]
    if off:
        raise Disagreement(f"{len(off)} of {len(every)} differ by more than {BAR:g}: {'; '.join(off)}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Every layout computes what one rank computes.")
    parser.add_argument("--most-ranks", type=positive, default=8, help="leave layouts out that take more; 8 need 3 GB")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="columns of the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write what differs most in each case")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse_arguments()
    sys.exit(be_rank() if given.rank else run(benchmark, given))
