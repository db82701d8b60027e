"""Why the largest errors are what they are, as far as the sources tell. Key: the row, and what of it."""

from __future__ import annotations

_FIXED = "59 to 64 s on 512 H100 in BF16 and in FP8 and on 256 GB200 alike: some 30 s depend on neither devices nor precision"
_TRAINER = (
    "a trainer of tp2 takes 6 and 7.6 s, one of tp4 3 and 4.5 s, with the same bytes: its host's share is larger than planned"
)
_SPREAD = "experts spread over more ranks come back from the host sooner: the names of tensors cost less there than planned"
_GB200_235B = (
    "128 GB200 take longer than 64 (345 and 278 s against 286 s) at the same mean length: the number of devices does not help"
)
_GB200_30B = "16 GB200 take longer than 32 H100 (192 s), and sampling beside longer than in turn: not what the devices could do"
_RESHARD = "a fixed part, or more than one pair of ranks on a link: 256 pairs of links alone would take 0.2 s"

EXPLAINED: dict[tuple[str, str], str] = {
    ("Qwen2.5-7B DAPO, 32 H20 tp2cp2", "sync"): _TRAINER,
    ("Qwen3-30B-A3B DAPO, 16 H100 tp4ep16", "sync"): _SPREAD,
    ("Qwen3-30B-A3B DAPO, 32 H100 tp4ep32", "sync"): _SPREAD,
    ("Qwen3-235B DAPO, 256 H100 tp4pp8ep32", "log-probs"): "half of its update, which has four such passes: what else is in it the "
    "source does not say",
    ("V3 GRPO, 512 H100, one step off", "step"): _FIXED,
    ("V3 GRPO, 512 H100, FP8, one step off", "step"): _FIXED,
    ("V3 GRPO, 256 GB200, one step off", "step"): _FIXED,
    ("Qwen3-235B GRPO, 128 GB200", "step"): _GB200_235B,
    ("Qwen3-235B GRPO, 128 GB200, one step off", "step"): _GB200_235B,
    ("Qwen3-30B-A3B GRPO, 16 GB200", "step"): _GB200_30B,
    ("Qwen3-30B-A3B GRPO, 16 GB200, one step off", "step"): _GB200_30B,
    ("V3, 256 to 256 H100", "sync"): _RESHARD,
    ("Qwen3-235B, RDMA", "sync"): "its tensors cost half of what 30B's do: larger ones, of which the planner knows only the number",
    ("Qwen3-235B, 8 H800", "sync"): "one node, where NVLink carries what the planner sends over the network",
}
