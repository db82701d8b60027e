"""What `megatron-r1 status` prints. It reads only the run folder: the job may run anywhere, or be dead."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from megatron_r1.report.runs import RunRecord, find_runs
from megatron_r1.runtime.checkpoints import COMPLETE, complete_checkpoints, step_of
from megatron_r1.runtime.heartbeat import ABORT, ENDED, FOLDER, Sign, read_sign

RATED_STEPS = 20  #: the newest steps, whose median rate is taken
_SHOWN = ("loss", "reward/mean", "reward/accuracy", "kl/reference", "grad_norm")
_NAMED = 8  # nodes in one line
_SET_APART = 10.0  # seconds: clocks that differ by less count as the same


def describe_status(folder: Path, now: float | None = None) -> str:
    """Stage, step, rates, end, last checkpoint and the health of every node, for the run in `folder` or those right under it.

    Args:
        now: seconds since 1970; default: the clock's.

    Raises:
        DataError: there is no run.
    """
    runs = find_runs(folder)
    now = time.time() if now is None else now
    return "\n\n".join("\n".join(_describe_run(_folder_of(folder, run), run, now)) for run in runs)


def _folder_of(folder: Path, run: RunRecord) -> Path:
    return folder if (folder / "run.json").is_file() and folder.name == run.name else folder / run.name


def _describe_run(folder: Path, run: RunRecord, now: float) -> list[str]:
    signs = [sign for sign in map(read_sign, sorted((folder / FOLDER).glob("rank_*.json"))) if sign is not None]
    steps = [record for record in run.metrics if record["step"] > 0]
    last = steps[-1] if steps else {}
    total = max((sign.total for sign in signs), default=0)
    lines = [
        f"{folder}: {run.command}, {_state(folder, signs, now)}, begun {_clock(datetime.fromisoformat(run.started).timestamp())}"
    ]
    seconds = [record["seconds/step"] for record in steps[-RATED_STEPS:] if record.get("seconds/step")]
    step = last.get("step", 0)
    if total or step:
        lines.append(f"  step        {step} of {total or '?'}" + (f" ({step / total:.0%})" if total else ""))
    if seconds:
        rate = statistics.median(seconds)
        rates = [f"{rate:.3g} s a step"]
        rates += [f"{v:,.0f} {k.rpartition('/')[2]} tokens/s" for k, v in last.items() if k.startswith("tokens_per_second/")]
        lines.append(f"  rates       {', '.join(rates)}")
        lines += _describe_devices(last)
        parts = {k.removeprefix("seconds/"): v for k, v in last.items() if k.startswith("seconds/") and k.count("/") == 1}
        lines.append("  last step   " + ", ".join(f"{name} {value:.3g} s" for name, value in parts.items() if name != "step"))
        if total > step and not (folder / "hf").exists():
            left = (total - step) * rate
            lines.append(f"  ends        about {_duration(left)} from its last step on, at {_clock(now + left)} if it runs now")
    lines += _describe_experts(last)
    lines += _describe_left_out(folder, run.command, steps)
    values = [f"{name} {last[name]:.4g}" for name in _SHOWN if isinstance(last.get(name), int | float)]
    if values:
        lines.append(f"  values      {', '.join(values)}")
    lines.append(f"  checkpoint  {_checkpoint(folder, now)}")
    lines += _health(folder, signs, last, now)
    return lines


def _describe_devices(last: dict[str, float]) -> list[str]:
    """What each device did in the last step, while it trained and over all; without a known peak there is no MFU."""
    if "flops_per_second/step" not in last:
        return []
    whole, train = (f"{last[f'flops_per_second/{part}'] / 1e12:.3g}" for part in ("step", "train"))
    line = f"  devices     {whole} TFLOPS each, {train} while they train"
    if "mfu/step" in last:
        line += f"; {last['mfu/step']:.1%} and {last['mfu/train']:.1%} of the peak (MFU)"
    return [line]


def _describe_experts(last: dict[str, float]) -> list[str]:
    """The layer whose experts are used least evenly, and how far their biases are apart."""
    loads = {name.removeprefix("moe/load/layer_"): load for name, load in last.items() if name.startswith("moe/load/layer_")}
    if not loads:
        return []
    worst = max(loads, key=lambda layer: loads[layer])
    line = f"  experts     load up to {loads[worst]:.3g} of the mean (layer {worst})"
    return [line + (f", biases {last['moe/bias_spread']:.3g} apart" if "moe/bias_spread" in last else "")]


def _describe_left_out(folder: Path, command: str, steps: list[dict[str, float]]) -> list[str]:
    """The newest steps with updates that were left out."""
    told = [(0, 0), *((int(record["step"]), record["updates/skipped"]) for record in steps if "updates/skipped" in record)]
    found = [step for (_, before), (step, now) in pairwise(told) if now > before]
    if not found:
        return []
    shown = f"{'..., ' * (len(found) > _NAMED)}{', '.join(map(str, found[-_NAMED:]))}"
    look = f"; megatron-r1 show-samples {folder} {found[-1]}" if command == "pretrain" else ""
    return [f"  left out    {told[-1][1]} updates, in steps {shown}{look}"]


def _state(folder: Path, signs: list[Sign], now: float) -> str:
    if (folder / "hf" / "artifact.json").is_file():
        return "finished"
    if (folder / FOLDER / ABORT).is_file():
        return "stopped: a rank hung"
    alive = [sign for sign in signs if _is_alive(sign, now)]
    if not alive:
        return "not running"
    return (
        "running" if len(alive) == alive[0].world_size else f"running, {alive[0].world_size - len(alive)} of its ranks give no sign"
    )


def _is_alive(sign: Sign, now: float) -> bool:
    """Whether the rank is alive by its own clock, which may be a little off; one sign may be late."""
    return sign.activity != ENDED and now - sign.time < 3 * sign.interval_seconds + 10


def _ahead(signs: list[Sign], now: float) -> list[str]:
    """Says of the nodes whose clock is ahead of this one's that the age of their signs is not known."""
    ahead = {sign.node: sign.time - now for sign in signs if sign.activity != ENDED and sign.time - now > _SET_APART}
    if not ahead:
        return []
    worst = _duration(max(ahead.values()))
    return [f"  clock       {_name(list(ahead))}: up to {worst} ahead of this one; whether they still give signs is not known"]


def _checkpoint(folder: Path, now: float) -> str:
    found = complete_checkpoints(folder / "checkpoints")
    if not found:
        return "none yet"
    age = now - (found[-1] / COMPLETE).stat().st_mtime
    when = f"{_duration(age)} ago" if age > -_SET_APART else f"by a clock that is {_duration(-age)} ahead of this one"
    return f"step {step_of(found[-1])}, {when}, in {found[-1]}"


def _health(folder: Path, signs: list[Sign], last: dict[str, float], now: float) -> list[str]:
    lines = []
    nodes: dict[str, list[Sign]] = {}
    for sign in signs:
        nodes.setdefault(sign.node, []).append(sign)
    ill = [node for node, of_node in nodes.items() if not all(_is_alive(sign, now) for sign in of_node)]
    if signs and any(_is_alive(sign, now) for sign in signs):
        doing = Counter(sign.activity for sign in signs)
        lines.append(
            f"  nodes       {len(nodes) - len(ill)} of {len(nodes)} well, {len(signs)} of {signs[0].world_size} ranks seen; "
            + ", ".join(f"{count} in {activity}" for activity, count in doing.most_common(4))
        )
        lines += [f"  no sign     {_name(ill)}"] if ill else []
        lines += _ahead(signs, now)
    if "seconds/ranks/slowest" in last:
        lines.append(
            f"  slowest     rank {last['seconds/ranks/slowest']:.0f}: {last['seconds/ranks/probe_max']:.3g} s for the probe, "
            f"the median is {last['seconds/ranks/probe_median']:.3g}"
        )
    if (folder / FOLDER / ABORT).is_file():
        lines.append(f"  hung        {json.loads((folder / FOLDER / ABORT).read_text())['why']}")
    return lines


def _name(nodes: list[str]) -> str:
    return ", ".join(nodes[:_NAMED]) + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")


def _clock(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "a time that no calendar has"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(max(seconds, 0)), 3600)  # a clock may have been set back a little
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
