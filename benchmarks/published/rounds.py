"""Published steps of reinforcement learning.

What the sources do not state follows from what they do. Mean lengths of DAPO with 7B, 30B-A3B and 235B: the median, over a table's
rows, of the tokens that the rows' own MFU and seconds of an update give. Of GRPO, and of DAPO with 14B and 32B: from the row's own
length or tokens a second. Groups have 16 responses; a step of 512 prompts is 16 updates of 32, unless its script says otherwise.
"""

from __future__ import annotations

from typing import Any

from benchmarks.published.rows import NotPredicted, Round, Set
from megatron_r1.plan.layer_time import Grid
from megatron_r1.plan.update_time import Training

_PRACTICE = "verl_megatron_practice, its tables of DAPO and GRPO"
_NEMO = "NVIDIA NeMo-RL 0.6, performance summary and its recipes"
_VERL = "verl, documentation"

_DAPO = Training(even_ranks=False)
_DAPO_FULL = Training(recompute=1.0, even_ranks=False)
_DEEPEP = Training(recompute=0.1, deepep=True, even_ranks=False)
_MATH_7B, _MOE_30B, _MOE_235B = 1340.0, 1020.0, 8000.0  # tokens of a response


def _dapo(name: str, of_set: Set, model: str, device: str, grid: Grid, engine: int, mean: float, measured: tuple[float | None, ...],
          **more: Any) -> Round:  # fmt: skip
    names = ("step", "generation", "update", "log-probs", "sync")
    seconds = {part: value for part, value in zip(names, measured, strict=True) if value is not None}
    usual: dict[str, Any] = {
        "responses": 8192, "updates": 16, "limit": 8192, "graphs": False, "training": _DAPO, "scoring_batch": 30720.0,
    }  # fmt: skip
    return Round(name, of_set, model, device, grid, engine, mean=mean, seconds=seconds, source=_PRACTICE, **(usual | more))


def _nemo(name: str, model: str, device: str, grid: Grid, engine: int, mean: float, limit: int, step: float, **more: Any) -> Round:
    usual: dict[str, Any] = {
        "responses": 512, "updates": 1, "cache_share": 0.6, "micro_batch": float(limit), "prompt": 100.0,
        "training": Training(recompute=1.0),
    }  # fmt: skip
    return Round(
        name, "held out", model, device, grid, engine, mean=mean - 100, limit=limit - 100, seconds={"step": step}, source=_NEMO,
        **(usual | more),
    )  # fmt: skip


_V3_NEMO = {"accepted": 1.8, "drafts": 1}
_30B_NEMO = {"responses": 2048, "training": Training()}

ROUNDS: list[Round] = [
    # step, generation, update, log-probs, sync
    _dapo("Qwen2.5-7B DAPO, 8 H100 tp2", "fitted", "Qwen2.5-7B", "H100", Grid(8, tp=2), 1, _MATH_7B, (389, 148, 168, 57, 4.4)),
    _dapo("Qwen2.5-7B DAPO, 32 H100 tp4", "fitted", "Qwen2.5-7B", "H100", Grid(32, tp=4), 1, _MATH_7B, (175, 74, 55, 24, 3),
          micro_batch=20480.0),
    _dapo("Qwen2.5-7B DAPO, 32 H20 tp4cp2", "fitted", "Qwen2.5-7B", "H20", Grid(32, tp=4, cp=2), 4, _MATH_7B,
          (336, 105, 137, 58, 4.5), scoring_batch=10240.0),
    _dapo("Qwen2.5-7B DAPO, 16 H100 tp4", "held out", "Qwen2.5-7B", "H100", Grid(16, tp=4), 1, _MATH_7B, (249, 99, 93, 38, 3),
          micro_batch=20480.0),
    _dapo("Qwen2.5-7B DAPO, 32 H100 tp2", "held out", "Qwen2.5-7B", "H100", Grid(32, tp=2), 1, _MATH_7B, (196, 76, 66, 28, 6)),
    _dapo("Qwen2.5-7B DAPO, 8 H100 tp4pp2", "held out", "Qwen2.5-7B", "H100", Grid(8, tp=4, pp=2), 1, _MATH_7B,
          (426, 146, 185, 74, 2.4), micro_batch=20480.0),
    _dapo("Qwen2.5-7B DAPO, 32 H20 tp2cp2", "held out", "Qwen2.5-7B", "H20", Grid(32, tp=2, cp=2), 1, _MATH_7B,
          (400, 128, 174, 55, 7.6)),
    _dapo("Qwen2.5-7B GRPO, 8 H100 tp4", "fitted", "Qwen2.5-7B", "H100", Grid(8, tp=4), 1, 500.0, (280, 68.2, 102, 41.7, 2.3),
          prompt=206.0, scored=2),
    _dapo("Qwen3-30B-A3B DAPO, 16 H100 tp4ep8", "fitted", "Qwen3-30B-A3B", "H100", Grid(16, tp=4, ep=8), 2, _MOE_30B,
          (562, 331, 160, 41, 8.5), cache_share=0.5),
    _dapo("Qwen3-30B-A3B DAPO, 32 H100 tp2ep8", "fitted", "Qwen3-30B-A3B", "H100", Grid(32, tp=2, ep=8), 4, _MOE_30B,
          (466, 329, 83, 23, 7.8), cache_share=0.5, training=_DAPO_FULL, scoring_batch=102400.0),
    _dapo("Qwen3-30B-A3B DAPO, 32 H20 ep8", "fitted", "Qwen3-30B-A3B", "H20", Grid(32, ep=8), 4, _MOE_30B, (602, 418, 122, 41, 12),
          cache_share=0.5, training=_DEEPEP, updates=4, scoring_batch=10240.0),
    _dapo("Qwen3-30B-A3B DAPO, 16 H100 tp4ep16", "held out", "Qwen3-30B-A3B", "H100", Grid(16, tp=4, ep=16), 4, _MOE_30B,
          (633, 395, 175, 63, 5.5), cache_share=0.5, scoring_batch=102400.0),
    _dapo("Qwen3-30B-A3B DAPO, 32 H100 tp4ep32", "held out", "Qwen3-30B-A3B", "H100", Grid(32, tp=4, ep=32), 2, _MOE_30B,
          (486, 308, 105, 45, 4.5), cache_share=0.5, micro_batch=15360.0, scoring_batch=102400.0),
    _dapo("Qwen3-30B-A3B DAPO, 32 H100 tp4ep8", "held out", "Qwen3-30B-A3B", "H100", Grid(32, tp=4, ep=8), 4, _MOE_30B,
          (530, 361, 76, 25, 7.8), cache_share=0.5, micro_batch=15360.0, scoring_batch=102400.0),
    _dapo("Qwen3-235B DAPO, 256 H100 tp4pp8ep32", "fitted", "Qwen3-235B", "H100", Grid(256, tp=4, pp=8, ep=32), 16, _MOE_235B,
          (4410, 2970, 704, 333, 25), cache_share=0.7, training=_DAPO_FULL, scoring_batch=102400.0, spread=0.0),
    _dapo("Qwen2.5-32B DAPO, 32 H20 tp8pp2", "fitted", "Qwen2.5-32B", "H20", Grid(32, tp=8, pp=2), 8, 1544.0,
          (None, None, 840, 315, 6.2), limit=20480, micro_batch=22528.0, scoring_batch=22528.0),
    _dapo("Qwen2.5-32B DAPO, 64 H20 tp8pp2", "held out", "Qwen2.5-32B", "H20", Grid(64, tp=8, pp=2), 8, 1430.0,
          (None, None, 422, 172, 6.3), limit=20480, micro_batch=22528.0, scoring_batch=22528.0),
    _dapo("Qwen2.5-14B DAPO, 32 H20 tp8pp2", "held out", "Qwen2.5-14B", "H20", Grid(32, tp=8, pp=2), 4, 791.0,
          (None, None, 265, None, None), limit=20480, micro_batch=22528.0),
    _dapo("Qwen3-14B DAPO, 32 H20 tp4cp2", "held out", "Qwen3-14B", "H20", Grid(32, tp=4, cp=2), 4, 3131.0,
          (None, None, 770, None, None), limit=20480, micro_batch=22528.0),
    _dapo("Qwen3-14B DAPO, 32 H20 tp8pp2", "fitted", "Qwen3-14B", "H20", Grid(32, tp=8, pp=2), 4, 3040.0,
          (None, None, 799, None, None), limit=20480, micro_batch=22528.0),
    _nemo("V3 GRPO, 256 H100", "V3", "H100", Grid(256, pp=16, ep=16), 32, 701, 1536, 134, **_V3_NEMO),
    _nemo("V3 GRPO, 512 H100", "V3", "H100", Grid(512, pp=16, ep=16), 32, 697, 1536, 111, **_V3_NEMO),
    _nemo("V3 GRPO, 512 H100, one step off", "V3", "H100", Grid(256, pp=16, ep=16), 32, 710, 1536, 64.1, cache_share=0.8,
          sampling_devices=256, **_V3_NEMO),
    _nemo("V3 GRPO, 512 H100, FP8, one step off", "V3", "H100", Grid(256, pp=16, ep=16), 16, 721, 1536, 59.2, cache_share=0.8,
          sampling_devices=256, element=1.0, **_V3_NEMO | {"training": Training(recompute=1.0, fp8=True)}),
    _nemo("Qwen3-235B GRPO, 128 H100", "Qwen3-235B", "H100", Grid(128, tp=2, cp=2, pp=8, ep=16), 16, 5698, 8192, 395),
    _nemo("Qwen3-235B GRPO, 256 H100", "Qwen3-235B", "H100", Grid(256, tp=2, cp=2, pp=8, ep=16), 16, 5713, 8192, 312),
    _nemo("Qwen3-235B GRPO, 256 H100, one step off", "Qwen3-235B", "H100", Grid(128, tp=4, pp=8, ep=16), 8, 5721, 8192, 231,
          cache_share=0.88, sampling_devices=128),
    _nemo("Qwen3-30B-A3B GRPO, 32 H100", "Qwen3-30B-A3B", "H100", Grid(32, ep=8), 2, 3203, 4096, 192, **_30B_NEMO),
    _nemo("Qwen3-30B-A3B GRPO, 32 H100, one step off", "Qwen3-30B-A3B", "H100", Grid(16, pp=2, ep=8), 2, 3201, 4096, 152,
          cache_share=0.8, sampling_devices=16, **_30B_NEMO),
    _nemo("Qwen3-30B-A3B GRPO, 192 H100, eight steps off", "Qwen3-30B-A3B", "H100", Grid(128, ep=8), 2, 3206, 4096, 34.5,
          cache_share=0.8, sampling_devices=64, ahead=8, updates=4, **_30B_NEMO),
    _nemo("V3 GRPO, 128 GB200", "V3", "GB200", Grid(128, pp=8, ep=16), 32, 711, 1536, 108, **_V3_NEMO),
    _nemo("V3 GRPO, 256 GB200", "V3", "GB200", Grid(256, pp=8, ep=16), 32, 700, 1536, 98.7, **_V3_NEMO),
    _nemo("V3 GRPO, 256 GB200, one step off", "V3", "GB200", Grid(128, pp=8, ep=16), 16, 708, 1536, 61.7, cache_share=0.8,
          sampling_devices=128, **_V3_NEMO),
    _nemo("Qwen3-235B GRPO, 64 GB200", "Qwen3-235B", "GB200", Grid(64, tp=2, cp=2, pp=4, ep=16), 8, 5709, 8192, 286),
    _nemo("Qwen3-235B GRPO, 128 GB200", "Qwen3-235B", "GB200", Grid(128, tp=2, cp=2, pp=4, ep=16), 8, 5693, 8192, 345),
    _nemo("Qwen3-235B GRPO, 128 GB200, one step off", "Qwen3-235B", "GB200", Grid(64, tp=4, pp=4, ep=16), 8, 5705, 8192, 278,
          cache_share=0.88, sampling_devices=64),
    _nemo("Qwen3-30B-A3B GRPO, 16 GB200", "Qwen3-30B-A3B", "GB200", Grid(16, ep=16), 1, 3199, 4096, 221, **_30B_NEMO),
    _nemo("Qwen3-30B-A3B GRPO, 16 GB200, one step off", "Qwen3-30B-A3B", "GB200", Grid(8, ep=8), 1, 3197, 4096, 301,
          cache_share=0.8, sampling_devices=8, **_30B_NEMO),
]  # fmt: skip

_LENGTHS = "lengths are not stated"
NOT_PREDICTED: list[NotPredicted] = [
    NotPredicted("V3 GRPO, 96 H20", "1,700 s", "the number of responses is not stated", _VERL),
    NotPredicted("Qwen2.5-32B DAPO, 64 H20 fsdp", "2,001 s", "FSDP, which this project does not have", _PRACTICE),
    NotPredicted("Qwen2.5-32B and 14B DAPO, sampling", "643 to 1,052 s",
                 "groups are filtered: how many are sampled is not stated", _PRACTICE),
    NotPredicted("Qwen2.5-7B GRPO, 8 H100, fixed micro-batches", "581 s",
                 "their number of sequences is not stated for certain", _PRACTICE),
    NotPredicted("Qwen2.5-Math-7B DAPO 28K, 32 to 128 H20", "790 to 151 s", f"FSDP, and {_LENGTHS}", _VERL),
    NotPredicted("the same by staleness, 128 H20", "231 to 146 s", f"FSDP, and {_LENGTHS}", _VERL),
    NotPredicted("Qwen3-30B-A3B GRPO, 128 H20", "498 and 283 s", f"means over 400 steps whose {_LENGTHS}", _VERL),
    NotPredicted("Qwen3.5-35B-A3B, 4 nodes", "14.1 to 22.8 h", "linear attention, which no family here has", _VERL),
    NotPredicted("Search-R1 of 3B, 7B and 30B-A3B", "train 48, 93, 189 s",
                 f"several turns, and {_LENGTHS}", "SkyRL, example for Megatron"),
    NotPredicted("Qwen3.5-9B with drafts, 8 H100", "401 to 247 s",
                 "linear attention, which no family here has", "SkyRL, speculative decoding"),
    NotPredicted("1.5B and 7B, 128 and 192 H800", "14.8 and 25.4 h", _LENGTHS, "AReaL 0.3, blog"),
    NotPredicted("V3 served, a node of H800", "73.7k tok/s in, 14.8k out", "sequences of a step are not stated",
                 "DeepSeek, open-infra-index"),
    NotPredicted("Llama-8B in FP8", "a step shorter by 15 to 25%", _LENGTHS, "NeMo-RL, documentation of FP8"),
    NotPredicted("R1-Zero, 512 H800", "198 h", f"{_LENGTHS}; docs/cluster.md has the prediction for several", "R1 v2, B.4.4"),
]  # fmt: skip
