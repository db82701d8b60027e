"""Published steps of pretraining. Layouts and precision as published; what recomputes is in the recipes that the sources name."""

from __future__ import annotations

from benchmarks.published.rows import NotPredicted, TrainStep, of_rate
from megatron_r1.plan.layer_time import Grid
from megatron_r1.plan.update_time import Training

_BRIDGE = "NVIDIA Megatron-Bridge, performance summary and its archive"
_ZOO = "Megatron-MoE-ModelZoo, best practice for Qwen3"
_SIMUMAX = "SimuMax 1.2, measured on B200 (not its simulation)"
_V3_PAPER = "DeepSeek-V3, arXiv 2412.19437, section 3.2 and table 1"

# Recomputed: norms, the up-projections of latent attention, activations: a tenth of the forward pass at most.
_BF16 = Training(recompute=0.1, balanced_routing=True, deepep=True, mtp=True, overlapped_reduction=True)
_FP8 = Training(recompute=0.1, fp8=True, balanced_routing=True, deepep=True, mtp=True, overlapped_reduction=True)
_FP8_BESIDE = Training(
    recompute=0.1, fp8=True, balanced_routing=True, deepep=True, mtp=True, overlapped_reduction=True, overlapped_dispatch=True,
    graphs=True,
)  # fmt: skip
_QWEN = Training(recompute=0.1, balanced_routing=True, deepep=True, overlapped_reduction=True)
_QWEN_BESIDE = Training(
    recompute=0.1, balanced_routing=True, deepep=True, overlapped_reduction=True, overlapped_dispatch=True
)  # fmt: skip
_QWEN_A2A = Training(recompute=0.1, balanced_routing=True, overlapped_reduction=True)
_QWEN_FP8 = Training(recompute=0.1, fp8=True, balanced_routing=True, deepep=True, overlapped_reduction=True)
_QWEN_GRAPHS = Training(recompute=0.0, fp8=True, balanced_routing=True, overlapped_reduction=True, graphs=True)
_PLAIN = Training(balanced_routing=True)


def _simumax(name: str, model: str, grid: Grid, tokens: int, *seconds: tuple[int, float]) -> list[TrainStep]:
    """The rows of one layout: micro-batches of a copy of the model, and milliseconds."""
    return [
        TrainStep(
            f"{model}, 8 B200, {name}, {count} micro-batches", "held out" if count == 8 else "fitted", model, "B200", grid,
            count * grid.dp, milliseconds / 1e3, _SIMUMAX, tokens=tokens, training=_PLAIN,
        )
        for count, milliseconds in seconds
    ]  # fmt: skip


_V3_4, _70B, _405B = "V3 of 4 layers", "Llama-3-70B of 12 layers", "Llama-3.1-405B of 4 layers"

STEPS: list[TrainStep] = [
    TrainStep("V3, 1,024 H100, BF16", "fitted", "V3", "H100", Grid(1024, tp=2, pp=8, vpp=4, ep=64), 16384, 61.756, _BRIDGE,
              training=_BF16),
    TrainStep("V3, 1,024 H100, FP8", "fitted", "V3", "H100", Grid(1024, tp=2, pp=8, vpp=4, ep=64), 8192,
              of_rate(1297, 8192, 1024), _BRIDGE, training=_FP8),
    TrainStep("Qwen3-235B, 256 H100, BF16, EP32", "fitted", "Qwen3-235B", "H100", Grid(256, tp=2, pp=8, vpp=4, ep=32), 2048, 19.7,
              _ZOO, training=_QWEN),
    TrainStep("Qwen3-235B, 256 H100, BF16, EP32, expert traffic beside", "fitted", "Qwen3-235B", "H100",
              Grid(256, tp=2, pp=8, vpp=4, ep=32), 2048, 17.6, _ZOO, training=_QWEN_BESIDE),
    TrainStep("Qwen3-235B, 256 H100, BF16, EP8 PP32", "held out", "Qwen3-235B", "H100", Grid(256, tp=2, pp=32, vpp=3, ep=8), 2048,
              24.2, _ZOO, training=_QWEN_A2A),
    TrainStep("Qwen3-235B, 256 H100, BF16, EP8 TP4", "held out", "Qwen3-235B", "H100", Grid(256, tp=4, pp=8, vpp=4, ep=8), 2048,
              29.0, _ZOO, training=_QWEN),
    TrainStep("Qwen3-235B, 256 H100, FP8", "held out", "Qwen3-235B", "H100", Grid(256, tp=2, pp=8, vpp=4, ep=32), 8192,
              of_rate(1712, 8192, 256), _BRIDGE, training=_QWEN_FP8),
    TrainStep("Qwen3-30B-A3B, 16 H100, FP8", "held out", "Qwen3-30B-A3B", "H100", Grid(16, ep=16), 1024,
              of_rate(8826, 1024, 16), _BRIDGE, training=_QWEN_FP8),
    TrainStep("Qwen3-30B-A3B, 16 H100, FP8, PP2", "held out", "Qwen3-30B-A3B", "H100", Grid(16, pp=2, vpp=12, ep=8), 1024,
              of_rate(9058, 1024, 16), _BRIDGE, training=_QWEN_FP8),
    TrainStep("V3, 2,048 H800, FP8, DualPipe", "held out", "V3", "H800", Grid(2048, pp=16, ep=64), 15360,
              of_rate(1543, 15360, 2048), _V3_PAPER,
              training=Training(recompute=0.1, fp8=True, deepep=True, overlapped_dispatch=True, dual_pipe=True, mtp=True,
                                overlapped_reduction=True)),
    TrainStep("V3, 256 B200, MXFP8", "held out", "V3", "B200", Grid(256, pp=8, vpp=2, ep=32), 4096, of_rate(3328, 4096, 256),
              _BRIDGE, training=_FP8_BESIDE),
    TrainStep("V3, 256 GB200, MXFP8", "held out", "V3", "GB200", Grid(256, pp=4, vpp=4, ep=64), 4096, of_rate(4912, 4096, 256),
              _BRIDGE, training=_FP8_BESIDE),
    TrainStep("Qwen3-235B, 256 GB200, MXFP8", "held out", "Qwen3-235B", "GB200", Grid(256, pp=8, vpp=3, ep=32), 8192,
              of_rate(5680, 8192, 256), _BRIDGE, training=_QWEN_GRAPHS),
    TrainStep("Qwen3-30B-A3B, 8 GB200, MXFP8", "fitted", "Qwen3-30B-A3B", "GB200", Grid(8, ep=8), 512, of_rate(26112, 512, 8),
              _BRIDGE, micro_rows=4, training=_QWEN_GRAPHS),
    TrainStep("Qwen3-30B-A3B, 8 B200, MXFP8", "held out", "Qwen3-30B-A3B", "B200", Grid(8, ep=8), 512, of_rate(27136, 512, 8),
              _BRIDGE, micro_rows=4, training=_QWEN_GRAPHS),
    *_simumax("EP8", _V3_4, Grid(8, ep=8), 4096, (4, 603.2), (8, 1101.7), (32, 4141.2)),
    *_simumax("EP4 PP2", _V3_4, Grid(8, ep=4, pp=2), 4096, (4, 452.2), (8, 771.6), (32, 2718.6)),
    *_simumax("TP2", _70B, Grid(8, tp=2), 4096, (4, 725.5), (8, 1387.0), (32, 5376.5)),
    *_simumax("TP8", _70B, Grid(8, tp=8), 4096, (4, 280.9), (8, 556.7), (32, 2073.7)),
    *_simumax("PP2", _405B, Grid(8, pp=2), 4096, (4, 1074.6), (8, 1935.4), (32, 7046.4)),
    *_simumax("TP4", _405B, Grid(8, tp=4), 4096, (4, 476.0), (8, 899.6), (32, 3455.4)),
]  # fmt: skip

NOT_PREDICTED: list[NotPredicted] = [
    NotPredicted("V3, 256 GB300, MXFP8", "6,288 tok/s", "GB300 is not in the table of devices", _BRIDGE),
    NotPredicted("V3, 256 B200, torchtitan", "651 to 918 tok/s", "FSDP, which this project does not have", "PyTorch blog, 2026-03"),
    NotPredicted("16B of V3's kind, 8 H100, torchtitan", "11.5k tok/s",
                 "FSDP, which this project does not have", "torchtitan issue 1789"),
    NotPredicted("Qwen3-0.6B, RL and SFT, 1 H100", "11.9k and 26.0k tok/s",
                 "FSDP; the batch is not stated", "prime-rl, benchmarks of 2026-02-01"),
    NotPredicted("Qwen3-0.6B, 1 A6000", "3.69k tok/s",
                 "A6000 is not in the table of devices", "prime-rl, benchmarks of 2026-02-01"),
    NotPredicted("Qwen3-4B LoRA, 1 H100", "6.23k tok/s",
                 "LoRA, which this project does not have", "prime-rl, benchmarks of 2026-02-01"),
    NotPredicted("Qwen3-30B-A3B, 8 H200", "12.75k tok/s", "FSDP; the batch is not stated", "prime-rl, benchmarks of 2026-02-01"),
]  # fmt: skip
