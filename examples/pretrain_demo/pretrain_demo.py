"""A tiny DeepSeek-V3 against a dense model of equal FLOPs a token, pretrained on real text: what `make pretrain-demo` runs.

python examples/pretrain_demo/pretrain_demo.py [--out FOLDER] [--text FOLDER] [--seeds N] [--rates RATE,...] [key.sub=value ...]

The learning rate of either model is searched for first, over the same few, with short runs of a seed that is not used afterwards.
Ends with code 1 if V3's held-out loss is not lower. Stopped and started again, it goes on: a step that is done is not done again,
one that was under way goes on from its last checkpoint. `steps.json` in the folder has what each attempt at a step took; one that
was killed with its parent is not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import matplotlib as mpl

from examples.pretrain_demo.compare import (
    Search,
    draw_curves,
    loss_table,
    read_losses,
    report_page,
    shape_table,
    text_table,
    verdict,
)
from examples.pretrain_demo.plan import (
    MODELS,
    SEARCH_SEED,
    make_data,
    plan_data,
    plan_runs,
    plan_search,
    shapes,
    sources_of,
    tokens_of,
)
from examples.step_runner import cost_rows, run_example, run_steps
from megatron_r1.report.plots import STYLE
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table
from megatron_r1.training.pretrain_plan import PretrainPlan

RESULT, CURVES, REPORT = "result.md", "curves.png", "report.html"
SEEDS = 3
RATES = (3e-3, 6e-3, 1.2e-2)
MOST_RATES = 6


class Demonstration:
    """All steps, and what comes out of them.

    Attributes:
        failed: in a line, once the result is there and V3's loss is not lower.
    """

    def __init__(
        self, out: Path, text: Path | None, seeds: Sequence[int], rates: Sequence[float], overrides: Sequence[str]
    ) -> None:
        self.out, self.text, self.seeds, self.rates, self.overrides = out, text, seeds, sorted(set(rates)), overrides
        self.failed = ""
        self._steps: list[str] = []  # names of all
        self._tokens: dict[str, int] = {}  # of each source
        self._search: Search | None = None
        self._best = dict.fromkeys(MODELS, self.rates[0])

    def run(self) -> int:
        """Run what is not done yet; returns an exit code."""
        found = shapes({}, self.overrides)
        data = plan_data(self.out, self.text)
        print(align_table(shape_table(found), numbers=True), flush=True)
        self._steps = [*data]
        if code := make_data(data, self.out):
            return code
        self._tokens = tokens_of(self.out / "data", sources_of(data))
        if len(self.rates) > 1 and (code := self._find_rates()):
            return code
        return self._run(plan_runs(self.out, self._tokens, self.seeds, self._best, self.overrides))

    def _find_rates(self) -> int:
        """Try all learning rates, and more while the best of a model is the highest or the lowest."""
        rates = self.rates
        while True:
            if code := self._run(plan_search(self.out, self._tokens, rates, self.overrides)):
                return code
            self._search = Search.read(self.out, list(self._tokens), rates)
            self._best, more = self._search.best(), self._search.beyond()
            if more is None or len(rates) >= MOST_RATES:
                return 0
            rates = sorted([*rates, more])

    def _run(self, steps: Mapping[str, list[str]]) -> int:
        self._steps = list(dict.fromkeys([*self._steps, *steps]))
        return run_steps(steps, self.out, side_by_side=steps)

    def show(self) -> str:
        """Write result.md, curves.png and report.html; returns what to print."""
        found = shapes(self._best, self.overrides)
        config = found["v3"][0]
        plan = PretrainPlan(config.pretrain)
        losses = read_losses(self.out, list(self._tokens), self.seeds)
        holds, said = verdict(losses, plan.phases[-1].last_update)
        tables = [loss_table(losses, plan), shape_table(found), *([self._search.table()] if self._search else [])]
        tables += [text_table(self._tokens, config), cost_rows(self._steps, self.out)]
        figure = draw_curves(losses, plan)
        with mpl.rc_context(STYLE):
            figure.savefig(self.out / CURVES, format="png", dpi=120)
        write_atomically(self.out / REPORT, report_page(said, figure, tables))
        text = "\n\n".join([said, *(align_table(table, numbers=True) for table in tables)]) + "\n"
        write_atomically(self.out / RESULT, f"{text}\n![Held-out loss]({CURVES})\n")
        self.failed = "" if holds else f"V3's held-out loss is not lower throughout: {self.out / RESULT}"
        return f"{text}\nresult: {self.out / RESULT}\ncurves: {self.out / CURVES}\nreport: {self.out / REPORT}"


def _read_rates(text: str) -> list[float]:
    """Numbers above 0 between commas; none if there is anything else."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return rates if all(0 < rate < inf for rate in rates) else []


def main(argv: list[str] | None = None) -> int:
    """Run all steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_demo"), help="folder of everything that is made")
    parser.add_argument("--text", type=Path, help="folder of .txt and .md files; default: the Debian Reference, from its packages")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of either model, with the seeds from 0 ({SEEDS})")
    usual = ",".join(f"{rate:g}" for rate in RATES)
    parser.add_argument("--rates", default=usual, help=f"learning rates to try first ({usual}); one: it is not searched for")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all runs")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.seeds <= SEARCH_SEED:
        parser.error(f"--seeds {arguments.seeds}: give 1 to {SEARCH_SEED}")
    rates = _read_rates(arguments.rates)
    if not rates:
        parser.error(f"--rates {arguments.rates}: give numbers above 0 with commas between them")
    out, text = arguments.out.resolve(), arguments.text and arguments.text.resolve()
    out.mkdir(parents=True, exist_ok=True)
    demonstration = Demonstration(out, text, range(arguments.seeds), rates, arguments.overrides)
    code = run_example(demonstration.run, demonstration.show)
    if demonstration.failed:
        print(f"pretrain_demo.py: {demonstration.failed}", file=sys.stderr)
    return code or int(bool(demonstration.failed))


if __name__ == "__main__":
    sys.exit(main())
