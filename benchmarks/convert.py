"""Conversion against a plain copy: bytes read and written per second, and peak memory, at growing sizes.

Makes random deepseek_v3 folders, as published in FP8 and in BF16, then takes turns between our command and a copy of the files it
reads to the same disk. Both end with everything flushed to disk; before each, what will be read is in the page cache. Ours
computes checksums of all files of a checkpoint too, and an export compares them first. Our command is started as a user starts
it; what passes before it opens the first weights of the checkpoint, mostly imports and asking Megatron-Core for its layout, and
after the finished folder stands under its name, the end of the interpreters and of torchrun, is given in a column of its own: the
first ratios are without it, the last one is with it.

The copy waits for the disk, ours mostly computes: on a machine that is busy with something else ours looks worse than it is.

Before anything is timed, `verify` compares every tensor of the smallest folder with its converted checkpoint.

    python -m benchmarks.convert --dir /scratch --out convert.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Comparison, Side, describe_machine, parser_of, positive, print_table, run, write_results
from benchmarks.processes import ROOT, Finished, python_command, run_watched
from megatron_r1.errors import ConfigError
from megatron_r1.model.families.deepseek_v3 import DeepseekV3
from megatron_r1.weights.hf_export import hf_tensors, write_configs, write_index
from megatron_r1.weights.mapping import hf_shapes
from megatron_r1.weights.safetensors_file import HfTensor, plan_files
from tests.random_weights import write_safetensors

FORMATS = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
HEADER = [
    "conversion",
    "ours, GB/s",
    "copy, GB/s",
    "ours / copy",
    "the same by CPU time",
    "start-up and end, s",
    "ours / copy, whole command",
    "peak memory of a process, MB",
]
SCRIPT = "tools/convert_hf.py"
CHECKPOINT_SUFFIX = (
    ".distcp"  # of weights: an import writes them from the start, an export reads them all for their checksums first
)
_POOL_ELEMENTS = 1 << 26  # of random numbers, from which all tensors are cut


@dataclass
class Conversion:
    """One direction, format, size and number of processes."""

    comparison: Comparison  #: ours is without start-up and end
    whole: list[Finished] = field(default_factory=list)  #: our commands with them

    @property
    def whole_ratio(self) -> float:
        """Like `comparison.speed_ratio`, with start-up and end."""
        ours = replace(self.comparison.ours, wall_seconds=[finished.wall_seconds for finished in self.whole])
        return replace(self.comparison, ours=ours).speed_ratio

    @property
    def around_seconds(self) -> float:
        """Of start-up and end by the wall clock, the median over repetitions."""
        return median(finished.wall_seconds - finished.work_wall_seconds for finished in self.whole)

    @property
    def peak_bytes(self) -> int:
        """Of the largest process of any repetition."""
        return max(finished.peak_bytes[0] for finished in self.whole)


def make_architecture(moe_layers: int, hidden: int = 2048) -> DeepseekV3:
    """A dense layer and some MoE layers; with the default width an expert's matrix has 4 million elements."""
    return DeepseekV3(
        vocab_size=8 * hidden, hidden_size=hidden, num_hidden_layers=1 + moe_layers, first_k_dense_replace=1,
        intermediate_size=3 * hidden, num_attention_heads=max(1, hidden // 128), q_lora_rank=hidden // 2, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, n_routed_experts=8,
        moe_intermediate_size=hidden, num_experts_per_tok=2,
    )  # fmt: skip


def choose_architecture(gigabytes: float, dtype: torch.dtype) -> DeepseekV3:
    """The depth whose folder comes nearest to the size."""

    def size(moe_layers: int) -> int:
        return sum(tensor.nbytes for tensor in hf_tensors(hf_shapes(make_architecture(moe_layers)), dtype))

    one_layer = size(2) - size(1)
    return make_architecture(max(1, round((gigabytes * 1e9 - size(1)) / one_layer) + 1))


def make_folder(folder: Path, arch: DeepseekV3, dtype: torch.dtype, seed: int) -> None:
    """A folder as published: random numbers, several files."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(_POOL_ELEMENTS, generator=generator, dtype=torch.bfloat16).mul_(0.02)
    codes = torch.randint(0, 256, (_POOL_ELEMENTS,), generator=generator, dtype=torch.uint8)
    codes[codes.bitwise_and(0x7F) == 0x7F] = 0  # NaN
    folder.mkdir()
    files = plan_files(hf_tensors(hf_shapes(arch), dtype), max_shard_bytes=500_000_000)
    for i, (file, tensors) in enumerate(files.items()):
        write_safetensors(folder / file, tensors, _random_tensors(tensors, numbers, codes.view(torch.float8_e4m3fn), i))
    write_index(folder, files)
    write_configs(folder, arch, dtype, bos_token_id=0, eos_token_id=1)


def _random_tensors(
    tensors: list[HfTensor], numbers: torch.Tensor, codes: torch.Tensor, start: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for i, tensor in enumerate(tensors):
        size = torch.Size(tensor.shape).numel()
        pool = codes if tensor.dtype is codes.dtype else numbers
        first = (start * 104_729 + i * 7919) % (len(pool) - size)
        values = pool[first : first + size].view(tensor.shape)
        if tensor.dtype is torch.float32:  # scales and router biases
            values = values.float().abs_().add_(1e-4)
        yield tensor.name, values


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_folder(source: Path, target: Path) -> Finished:
    """A plain copy, flushed to disk."""
    wall, cpu = time.perf_counter(), time.process_time()
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    flush(target)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Finished(*seconds, *seconds, [])


def flush(folder: Path) -> None:
    """Wait until all files below a folder are on disk; quick for those that are."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def warm_cache(folder: Path) -> None:
    """Read all files below a folder once."""
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def convert_command(direction: str, processes: int, dtype: str, source: Path, target: Path) -> list[str]:
    """Our command line."""
    flag = "--hf" if direction == "import" else "--megatron"
    return [*python_command(SCRIPT, processes), direction, flag, str(source), "--out", str(target), "--dtype", dtype]


def measure(name: str, command: Callable[[Path, Path], list[str]], source: Path, repeats: int) -> Conversion:
    """Take turns between our command and a copy. Who begins alternates.

    Args:
        name: for the table.
        command: ours, made from source and target.
        source: folder that is converted.
        repeats: timed runs of each.
    """
    target = source.with_name("target")

    def convert() -> Finished:
        finished = run_watched(command(source, target), data_file=CHECKPOINT_SUFFIX, result=target)
        start = time.perf_counter()
        flush(target)
        more = time.perf_counter() - start
        return replace(finished, wall_seconds=finished.wall_seconds + more, work_wall_seconds=finished.work_wall_seconds + more)

    result = Conversion(Comparison(name, Side(), Side()))
    ours, peer = result.comparison.ours, result.comparison.peer
    for repetition in range(repeats):
        for side in (ours, peer) if repetition % 2 == 0 else (peer, ours):
            warm_cache(source)
            finished = convert() if side is ours else copy_folder(source, target)
            side.amounts.append(folder_bytes(source) + folder_bytes(target))
            side.wall_seconds.append(finished.work_wall_seconds)
            side.own_cpu_seconds.append(finished.work_cpu_seconds)
            if side is ours:
                result.whole.append(finished)
            shutil.rmtree(target)
    return result


def measure_size(folder: Path, gigabytes: float, form: str, arguments: argparse.Namespace, *, verify: bool) -> list[Conversion]:
    """All directions and numbers of processes for one folder, which is made and removed again."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    make_folder(source, choose_architecture(gigabytes, FORMATS[form]), FORMATS[form], arguments.seed)
    run_watched(convert_command("import", 1, "bf16", source, checkpoint))
    if verify:
        run_watched([*python_command(SCRIPT, 1), "verify", "--hf", str(source), "--megatron", str(checkpoint)])
        print(f"{form}: verify finds every tensor of {folder_bytes(source) / 1e9:.2f} GB in the checkpoint", flush=True)
    results = []
    for direction in arguments.directions:
        given, formats, dtype = source, f"{form} to bf16", "bf16"
        if direction == "export":
            given, formats, dtype = checkpoint, f"bf16 to {form}", form
        for processes in arguments.processes:
            name = f"{direction} {formats}, {folder_bytes(given) / 1e9:.2f} GB, {processes} process{'es' * (processes > 1)}"
            command = partial(convert_command, direction, processes, dtype)
            results.append(measure(name, command, given, arguments.repeats))
            print_table(HEADER, [table_row(results[-1])])
    for made in (source, checkpoint):
        shutil.rmtree(made)
    return results


def table_row(conversion: Conversion) -> list[str]:
    """One line of the table."""
    comparison = conversion.comparison
    return [
        comparison.workload,
        f"{comparison.ours.per_second / 1e9:.2f}",
        f"{comparison.peer.per_second / 1e9:.2f}",
        f"{comparison.speed_ratio:.2f}",
        f"{comparison.cpu_ratio:.2f}",
        f"{conversion.around_seconds:.1f}",
        f"{conversion.whole_ratio:.2f}",
        f"{conversion.peak_bytes / 1e6:,.0f}",
    ]


def check_space(folder: Path, gigabytes: float) -> None:
    """Raises ConfigError where the folder is missing or too little is free: the largest source, its checkpoint, and a target."""
    if not folder.is_dir():
        raise ConfigError(f"--dir {folder}: there is no such folder")
    needed, free = 5 * gigabytes * 1e9, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"--dir {folder}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} GB are needed; choose smaller --sizes")


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure every format and size, print a table, write the JSON file."""
    check_space(arguments.dir, max(arguments.sizes))
    results: list[Conversion] = []
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-", dir=arguments.dir) as name:
        folder = Path(name)
        machine = describe_machine("cpu")
        for form in arguments.formats:
            for size in arguments.sizes:
                results += measure_size(folder, size, form, arguments, verify=size == arguments.sizes[0])
    print_table(HEADER, [table_row(conversion) for conversion in results])
    if arguments.out is not None:
        write_conversions(results, arguments, machine)


def write_conversions(results: list[Conversion], arguments: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Write every single run as JSON."""
    details = [
        {**asdict(c), "speed_ratio": c.comparison.speed_ratio, "cpu_ratio": c.comparison.cpu_ratio, "whole_ratio": c.whole_ratio}
        for c in results
    ]
    write_results(arguments.out, arguments, {"convert": details}, machine)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("tools/convert_hf.py against a plain copy of the same files on the same disk.", repeats=3)
    parser.add_argument("--dir", type=Path, default=ROOT, help="where to work: a temporary folder on the disk to be measured")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 1, 2, 4], metavar="GB", help="of the model folders")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS), help="of the model folders")
    parser.add_argument("--directions", nargs="+", choices=("import", "export"), default=["import", "export"])
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2], help="more than one through torchrun")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(benchmark, parse_arguments()))
