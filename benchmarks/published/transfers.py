"""Published times in which weights reach engines."""

from __future__ import annotations

from benchmarks.published.rows import NotPredicted, Transfer

_NEMO = "NVIDIA NeMo-RL, design of its NCCL reshard"
_MILES = "miles, documentation of transfers from peer to peer"
_MOONSHOT = "MoonshotAI checkpoint-engine, README"
_VERL = "verl, documentation"

TRANSFERS: list[Transfer] = [
    Transfer("Qwen3-4B, dp8 to tp8, H100", "fitted", "Qwen3-4B", "H100", "resharded", 8, 8, 0.275, _NEMO),
    Transfer("Qwen3-30B-A3B, 16 to 16 H100", "fitted", "Qwen3-30B-A3B", "H100", "resharded", 16, 16, 0.87, _NEMO),
    Transfer("V3, 256 to 256 H100", "held out", "V3", "H100", "resharded", 256, 256, 2.61, _NEMO),
    Transfer("V3, 256 to 256 GB200", "held out", "V3", "GB200", "resharded", 256, 256, 2.26, _NEMO),
    Transfer("Qwen3-30B-A3B, RDMA", "fitted", "Qwen3-30B-A3B", "H100", "peers", 16, 16, 2.16, _MILES),
    Transfer("Qwen3-235B, RDMA", "held out", "Qwen3-235B", "H100", "peers", 64, 64, 3.16, _MILES),
    Transfer("Qwen3-30B-A3B, NCCL", "fitted", "Qwen3-30B-A3B", "H100", "broadcast", 16, 16, 2.67, _MILES),
    Transfer("Qwen3-235B, NCCL", "held out", "Qwen3-235B", "H100", "broadcast", 64, 64, 10.75, _MILES),
    Transfer("V3 FP8, 16 H20", "fitted", "V3", "H20", "broadcast", 16, 16, 10.19, _MOONSHOT, element=1.0),
    Transfer("V3 FP8, 256 H20", "held out", "V3", "H20", "broadcast", 256, 256, 11.33, _MOONSHOT, element=1.0),
    Transfer("Kimi-K2 FP8, 256 H20", "held out", "Kimi-K2", "H20", "broadcast", 256, 256, 16.04, _MOONSHOT, element=1.0),
    Transfer("Qwen3-235B, 8 H800", "held out", "Qwen3-235B", "H800", "broadcast", 8, 8, 6.22, _MOONSHOT),
]  # fmt: skip

NOT_PREDICTED: list[NotPredicted] = [
    NotPredicted("Qwen3-30B-A3B FP8, 16 H100", "2.9 to 4.0 s", "an FP8 path of its own, slower than BF16's", _NEMO),
    NotPredicted("Qwen3.5-397B, H100", "1.97 to 2.17 s", "linear attention, which no family here has", _NEMO),
    NotPredicted("V3, 32 and 4 nodes", "9.25 and 14.21 s",
                 "buckets through a checkpoint engine on 4 nodes' links", "NeMo-RL, checkpoint engine"),
    NotPredicted("a model of 247 GB, 3% and 5% changed", "20.2 to 33.8 s",
                 "changes alone travel, which this project does not do", "NeMo-RL, sparse refit"),
    NotPredicted("GLM-5 744B, H100", "8.48 and 58.3 s", "no family here has its shape", _MILES),
    NotPredicted("Kimi-K2 1T, H100", "7.2 and 53 s", "whether its weights travel in FP8 is not stated", _MILES),
    NotPredicted("7B to 235B, H100, changes against all", "3.9 to 266 s",
                 "a loader that casts on the host: 235B at 1.8 GB/s", _VERL),
    NotPredicted("7B, 30B-A3B and 235B, H20", "0.02 to 58.6 s", "7B's 0.02 s and 30B's 15.8 s are no one way's", _VERL),
    NotPredicted("GLM-4.5-355B", "48 and 100 s", "no family here has its shape", "slime 0.1, blog"),
]  # fmt: skip
