"""Weights of a trainer of two ranks into running engines of one and two ranks, beside a plain copy of as many bytes in memory.

The trainer cuts its model over tensor, expert or pipeline parallelism, or over tensor and expert parallelism; the engine runs
beside its first rank. Models are of DeepSeek-V3's kind, 10 MB to 2 GB. Every update is timed in turn with the copy; the share is
the time of the copy over that of the update, the median over repetitions. What updates bring is compared by checksum.

    python -m benchmarks.weight_sync --out weight_sync.json

The command ends with 1 unless updates of 1 GB and more have 0.25 of the copy's speed, 0.12 with checksums, a byte of the largest
model takes at most 1.3 times as long as one of the next, and each engine rank receives at most 2% more than it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Disagreement, describe_machine, positive, print_table, run, write_results
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.options import engine_options, engine_weight_bytes
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.launch import child_environment
from megatron_r1.weights.trainer_shards import TrainerShards

RANKS = 2
LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "ep2": {"ep": 2}, "pp2": {"pp": 2}, "tp2 x ep2": {"tp": 2, "ep": 2}}
#: name -> hidden size, width of an expert, experts, layers, heads, vocabulary: 11 MB, 0.13, 1.06 and 2.1 GB in float32
SIZES = {
    "10 MB": (128, 64, 8, 4, 2, 1024), "100 MB": (512, 192, 24, 4, 4, 4096), "1 GB": (1024, 384, 24, 8, 8, 8192),
    "2 GB": (1024, 384, 24, 16, 8, 8192),
}  # fmt: skip
BARS = {False: 0.25, True: 0.12}  #: of the copy's speed; by whether checksums are compared
BARRED_BYTES = 500_000_000  #: the bars are for models of 1 GB in float32 and more, and for the same in bf16
LINEAR = 1.3
BESIDE = 1.02  #: bytes received over bytes held
_COPIED = 256 << 20  # bytes of a buffer of the plain copy


def model_of(size: str) -> Architecture:
    """A model of DeepSeek-V3's kind."""
    hidden, width, experts, layers, heads, vocabulary = SIZES[size]
    settings = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "first_k_dense_replace": 1,
        "intermediate_size": 11 * hidden // 4, "num_attention_heads": heads, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": experts, "n_shared_experts": 1,
        "moe_intermediate_size": width, "num_experts_per_tok": 4, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return resolve_architecture("tiny", settings)


def plain_copy(num_bytes: int) -> float:
    """Seconds in which as many bytes are copied in memory by one thread."""
    source, target = (torch.ones(min(num_bytes, _COPIED), dtype=torch.uint8) for _ in range(2))
    whole, rest = divmod(num_bytes, len(source))
    target.copy_(source)
    started = time.perf_counter()
    for _ in range(whole):
        target.copy_(source)
    target[:rest].copy_(source[:rest])
    return time.perf_counter() - started


def start_engine(arch: Architecture, dtype: str, workers: int, log: Path) -> VllmProcessEngine:
    """An engine beside this process."""
    rollout = RolloutConfig(max_response_tokens=16, kv_cache_bytes=64 << 20, tensor_parallel_size=workers)
    options = engine_options(
        arch, rollout, device="cpu", dtype="bfloat16" if dtype == "bf16" else "float32", bos_token_id=0, eos_token_id=1,
        max_prompt_tokens=16,
    )  # fmt: skip
    return VllmProcessEngine(options, str, child_environment(), log)


def be_rank(rank: int, folder: Path, settings: argparse.Namespace) -> None:
    """Update one engine from every layout, and write what was measured."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron-Core's, of packages that a CPU has no use for
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    host.activate("cpu")
    from megatron_r1.mcore import parallel, provider

    size, dtype, workers = settings.case
    arch = model_of(size)
    engines: list[VllmProcessEngine] = []

    def start() -> VllmProcessEngine:
        engines.append(start_engine(arch, dtype, int(workers), folder / "engine.log"))
        return engines[0]

    engine = CollectiveEngine(start if rank == 0 else None)
    found: list[dict[str, Any]] = []
    for name in settings.layouts:
        layout = parallel.resolve_layout(ParallelConfig(**LAYOUTS[name]), arch, RANKS, mtp=False)
        parallel.build_process_groups(layout, seed=1)
        modules = provider.build_model(arch, layout, RuntimeConfig(dtype=dtype), MoeTrainingConfig(), seed=7)
        shards = TrainerShards(modules, arch, parallel.groups())
        for verifies in (False, True):
            if engines:
                engines[0].options = replace(engines[0].options, verify_weights=verifies)
                engines[0]._link.verifies = verifies
            engine.load_weights(shards, 0)  # plans
            engine.load_weights(shards, 0)
            updates, copies = [], []
            for version in range(settings.repeats):
                dist.barrier()
                copies.append(
                    plain_copy(engine_weight_bytes(arch, "bfloat16" if dtype == "bf16" else "float32")) if rank == 0 else 0.0
                )
                dist.barrier()
                report = engine.load_weights(shards, version)
                updates.append(report.seconds)
            found.append({
                "layout": name, "verifies": verifies, "bytes": report.num_bytes, "seconds": updates, "copy_seconds": copies,
                "received": report.received_bytes, "held": report.held_bytes,
            })  # fmt: skip
        del modules, shards
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    engine.close()
    dist.barrier()
    dist.destroy_process_group()


def measure_case(case: list[str], settings: argparse.Namespace) -> list[dict[str, Any]]:
    """All layouts of one model, dtype and engine, each rank in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.weight_sync",
            "--repeats",
            str(settings.repeats),
            "--layouts",
            *settings.layouts,
        ]
        command += ["--case", *case, "--folder", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(RANKS)]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise Disagreement(f"a rank of {' '.join(case)} failed; its error is above")
        return json.loads((Path(folder) / "found.json").read_text())


def share_of_copy(measured: dict[str, Any]) -> float:
    """Speed of an update as a share of the copy's."""
    return median(copy / update for copy, update in zip(measured["copy_seconds"], measured["seconds"], strict=True))


def judge(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is below the bars.

    Args:
        found: by case: size, dtype and engine ranks, in the order of sizes.
    """
    problems = []
    smaller: dict[tuple[str, str, bool], tuple[int, float]] = {}
    for case, rows in found.items():
        size, _, kind = case.partition(", ")
        for row in rows:
            what = f"{case}, {row['layout']}{', checksums' if row['verifies'] else ''}"
            if any(received > BESIDE * held for received, held in zip(row["received"], row["held"], strict=True)):
                problems.append(f"{what}: an engine rank received more than {BESIDE} times what it holds")
            if row["bytes"] < BARRED_BYTES:
                continue
            if (share := share_of_copy(row)) < BARS[row["verifies"]]:
                problems.append(f"{what}: {share:.3f} of the copy's speed, below {BARS[row['verifies']]}")
            key, per_byte = (kind, row["layout"], row["verifies"]), median(row["seconds"]) / row["bytes"]
            if key in smaller and per_byte > LINEAR * smaller[key][1]:
                problems.append(
                    f"{what}: a byte takes {per_byte / smaller[key][1]:.2f} times as long as one of the model before {size}"
                )
            smaller[key] = row["bytes"], per_byte
    return problems


def show(case: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of one case."""
    print(f"\n{case}")
    header = ["trainer", "checksums", "GB", "seconds", "GB/s", "of a copy", "received by each rank", "over what it holds"]
    print_table(header, [
        [row["layout"], "yes" if row["verifies"] else "no", f"{row['bytes'] / 1e9:.3f}", f"{median(row['seconds']):.3f}",
         f"{row['bytes'] / 1e9 / median(row['seconds']):.2f}", f"{share_of_copy(row):.3f}",
         ", ".join(f"{number:,}" for number in row["received"]),
         f"{max(a / b for a, b in zip(row['received'], row['held'], strict=True)):.4f}"]
        for row in rows
    ])  # fmt: skip


def benchmark(settings: argparse.Namespace) -> None:
    """Measure and judge all cases."""
    found = {}
    for dtype in settings.dtypes:
        for workers in settings.engines:
            for size in settings.sizes:
                case = f"{size}, {dtype}, engine of {workers}"
                found[case] = measure_case([size, dtype, str(workers)], settings)
                show(case, found[case])
    if settings.out is not None:
        write_results(settings.out, settings, {"weight_sync": found}, describe_machine("cpu"))
    if problems := judge(found):
        raise Disagreement("; ".join(problems))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=positive, default=5, help="timed updates of each kind (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--engines", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="ranks of the engine")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every single time, with machine and versions")
    for own in ("--case", "--folder", "--rank"):
        parser.add_argument(own, nargs=3 if own == "--case" else None, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.rank is not None:
        be_rank(int(settings.rank), Path(settings.folder), settings)
        return 0
    return run(benchmark, settings)


if __name__ == "__main__":
    sys.exit(main())
