"""R1-Zero as one program: pretrain a base, train it with rewards alone (no SFT), compare the two.

Source: DeepSeek-R1 (arXiv 2501.12948) section 2.1.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from megatron_r1.config.schema import Config
from megatron_r1.evaluation.heldout import EvaluationResult
from megatron_r1.evaluation.heldout_table import render_table
from megatron_r1.pipeline.builders.rewards import read_evaluation
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.grpo import check_grpo, run_grpo
from megatron_r1.pipeline.stages.pretrain import run_pretrain
from megatron_r1.report.html import write_report
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.metrics import read_metrics


def run_r1_zero(config: Config, session: Session) -> None:
    """Pretrain the base, train it with GRPO, write the table. A part that is finished already is skipped."""
    check_grpo(config)  # wrong settings end the run here, not after pretraining
    root = Path(config.run_dir)
    base_config = config
    if config.model.weights is None:
        base = run_pretrain(config.model_copy(update={"run_dir": str(root / "base")}), session)
        model = config.model.model_copy(update={"weights": str(base.folder), "overrides": {}})
        base_config = config.model_copy(update={"model": model})
    run_grpo(base_config.model_copy(update={"run_dir": str(root / "r1_zero")}), session)
    on_rank_zero(lambda: compare_with_base(root))


def compare_with_base(root: Path) -> None:
    """Print the base beside R1-Zero, and keep the table as summary.json, summary.md and report.html, if both were evaluated."""
    evaluated = [m for m in read_metrics(root / "r1_zero" / "metrics.jsonl") if "eval/pass@1" in m]
    if not evaluated:
        print(
            f"\nevaluate.problems=0: there is no table\nreport: {write_report(root)}\nmodel:  {root / 'r1_zero' / 'hf'}", flush=True
        )
        return
    results = {"base": read_evaluation(evaluated[0]), "R1-Zero": read_evaluation(evaluated[-1])}
    table = render_table(results)
    shown = [f.name for f in fields(EvaluationResult) if f.name not in ("intervals", "temperature", "custom")]
    rows = [
        {"name": name, **{field: getattr(result, field) for field in shown}, **result.custom} for name, result in results.items()
    ]
    write_atomically(root / "summary.json", json.dumps({"rows": rows}, indent=1) + "\n")
    write_atomically(root / "summary.md", table + "\n")
    print(f"\n{table}\n\nreport: {write_report(root)}\nmodel:  {root / 'r1_zero' / 'hf'}", flush=True)
