"""Which responses a report holds: bounded by bytes, of every kind, the same for the same seed; files of every age are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.report.rollouts import STEPS, Choice, Shown, choose_shown, read_choice, to_script
from megatron_r1.report.runs import RunRecord
from megatron_r1.runtime.choose_responses import ALL, KINDS
from megatron_r1.runtime.kept_tokens import TokenColumns


def line_of(number: int, length: int, with_tokens: bool = True) -> dict[str, Any]:
    ids = np.arange(length, dtype=np.int32) % 500
    difference = np.zeros(length, np.float32)
    difference[0] = number / 100
    line = {
        "step": 1, "prompt_id": f"p{number // 4}", "question": "q", "answer": "a", "response": "x" * 4 * length,
        "reward": float(number % 7), "reward_parts": {"accuracy": None}, "advantage": 0.5, "finished": True, "length": length,
    }  # fmt: skip
    return line | ({"tokens": TokenColumns(ids, np.full(length, -1.0, np.float32), difference).to_json()} if with_tokens else {})


def run_of(folder: Path, steps: int, responses: int, length: int, with_tokens: bool = True) -> RunRecord:
    (folder / "rollouts").mkdir(exist_ok=True)
    text = "".join(json.dumps(line_of(n, length + n, with_tokens)) + "\n" for n in range(responses))
    files = [folder / "rollouts" / f"step_{step:06d}.jsonl" for step in range(1, steps + 1)]
    for file in files:
        file.write_text(text)
    return RunRecord(folder, "run", "grpo", "2026-01-01", [], "data: {}", files)


def size(shown: Shown) -> int:
    return len(to_script(vars(shown)))


@pytest.mark.parametrize("most_bytes", [200_000, 2_000_000])
def test_a_large_run_makes_a_bounded_page_with_every_kind_of_response(tmp_path: Path, most_bytes: int) -> None:
    run = run_of(tmp_path, steps=40, responses=24, length=1000)
    shown = choose_shown(run, Choice(), most_bytes)
    assert 0.3 * most_bytes < size(shown) < most_bytes
    steps = {response["step"] for response in shown.responses}
    assert len(steps) == STEPS and {1, 40} <= steps, "evenly spread, with the first and the last"
    assert {response["kind"] for response in shown.responses} == set(KINDS) if most_bytes > 10**6 else True
    of_first = {response["kind"]: response["index"] for response in reversed(shown.responses) if response["step"] == 1}
    assert of_first["best"] % 7 == 6 and of_first["worst"] % 7 == 0 and of_first["largest difference"] == 23
    assert (
        f"{len(shown.responses)} of 576 responses of 24 of 40 steps are in this page" in shown.note and "(--seed 0)" in shown.note
    )
    assert choose_shown(run, Choice(), most_bytes) == shown
    if most_bytes < 10**6:
        cut = next(response for response in shown.responses if "response_left_out" in response)
        ids = cut["tokens"]["ids"]
        assert 0 < cut["tokens"]["first"] < cut["tokens"]["count"] and len(ids) < 4 * 4 / 3 * cut["tokens"]["count"]


def test_what_fits_is_shown_whole_and_chosen_steps_are_taken(tmp_path: Path) -> None:
    run = run_of(tmp_path, steps=3, responses=8, length=5)
    shown = choose_shown(run, Choice(), 10**6)
    assert len(shown.responses) == 24 and {response["kind"] for response in shown.responses} == {ALL}
    assert "24 of 24 responses of 3 of 3 steps" in shown.note and "--tokenizer" in shown.note
    assert {response["step"] for response in choose_shown(run, Choice(steps=(3, 1)), 10**6).responses} == {1, 3}
    with pytest.raises(DataError, match="has no responses of step 9: it has 1 to 3"):
        choose_shown(run, Choice(steps=(9,)), 10**6)
    with pytest.raises(DataError, match="tokenizer"):
        choose_shown(run, Choice(tokenizer=tmp_path / "missing"), 10**6)


def test_a_run_without_tokens_shows_what_is_there(tmp_path: Path) -> None:
    shown = choose_shown(run_of(tmp_path, 2, 4, 5, with_tokens=False), Choice(), 10**6)
    assert len(shown.responses) == 8 and "tokens" not in shown.responses[0] and "kept no tokens" in shown.note


@pytest.mark.parametrize(
    "broken", [{"ids": "AAAA"}, {"ids": "AAAAAA==", "engine": "AA"}, {"ids": "AAAAAA==", "engine": "AAAAAA=="}, []]
)
def test_broken_tokens_name_their_file(tmp_path: Path, broken: Any) -> None:
    run = run_of(tmp_path, 1, 1, 5)
    run.rollout_files[0].write_text(json.dumps(line_of(0, 5) | {"tokens": broken}) + "\n")
    with pytest.raises(DataError, match="step_000001.jsonl is no file of a run's responses"):
        choose_shown(run, Choice(), 10**6)


def test_no_character_of_the_pages_data_is_markup_or_invisible() -> None:
    text = "<>&\u202e\u2028\ud800\ufeff\x00\u4e09\U0001f600"
    written = to_script({text: [text]})
    assert json.loads(written) == {text: [text]} and b"<" not in written and b">" not in written and b"&" not in written
    assert written.decode("utf-8").count("\\u") == 2 * 8


def test_options_are_read_or_refused() -> None:
    assert read_choice(None, 3, "1,50", None) == Choice(seed=3, steps=(1, 50))
    assert read_choice(0.5, 0, None, Path("x")) == Choice(most_bytes=500_000, tokenizer=Path("x"))
    for most_mb, steps in ((0.0, None), (-1.0, None), (1e9, None), (float("nan"), None), (None, "1,x"), (None, ""), (None, "1,,2")):
        with pytest.raises(ConfigError, match="--"):
            read_choice(most_mb, 0, steps, None)
