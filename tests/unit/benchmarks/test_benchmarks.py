"""The benchmark commands start, agree with their peer at the smallest size, and take ratios of neighbours in time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import channel, convert, measure, rewards_step
from benchmarks.measure import Comparison, Side, compare
from benchmarks.processes import CommandFailed, run_watched
from megatron_r1.errors import ConfigError
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import hf_tensors
from megatron_r1.weights.mapping import hf_shapes
from tests.paths import ROOT
from tests.patience import patient

pytestmark = pytest.mark.slow


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=patient(300))


@pytest.mark.parametrize("module", ["train_step", "rollout", "convert"])
def test_help(module: str) -> None:
    result = run(module, "--help")
    assert result.returncode == 0
    assert "--repeats" in result.stdout and "--out FILE.json" in result.stdout


def test_train_step_compares_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("train_step", "--hidden", "32", "--sequences", "8", "--repeats", "1", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the first steps agree") == 1
    content = json.loads(out.read_text())
    assert content["machine"]["threads"] == 1
    assert [len(c["ours"]["wall_seconds"]) for c in content["train_step"]] == [1]
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def benchmark(arguments: argparse.Namespace) -> None:
        pytest.fail("measured first")

    for where in ({"out": tmp_path / "none" / "result.json"}, {"out": None, "dir": tmp_path / "none"}):
        assert measure.run(benchmark, argparse.Namespace(**where)) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "folder" in message and str(tmp_path / "none") in message


def test_every_channel_brings_the_bucket() -> None:
    bucket = bytearray(range(256)) * 1000
    for open_ends in (channel.keyed_ends, channel.plain_ends, lambda: channel.bare_ends(len(bucket))):
        send, receive, close = open_ends()
        sending = threading.Thread(target=send, args=(bucket,))
        sending.start()
        assert receive() == bucket
        sending.join()
        close()
        rate, cpu = channel.measure(open_ends(), bucket, 2)
        assert rate > 0 and cpu > 0


def test_each_engine_of_a_large_job_has_a_channel_of_its_own() -> None:
    assert channel.sync_seconds(1e9) == channel.sync_seconds(1e9, engines=1, senders=1) == 1342
    assert channel.sync_seconds(1e9, engines=64, senders=32) == 2 * 1342


def test_who_begins_alternates() -> None:
    order: list[str] = []

    def work(name: str) -> int:
        order.append(name)
        return 1

    compare("", lambda: work("ours"), lambda: work("peer"), repeats=3)
    assert order == ["ours", "peer"] + ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_ratio_is_the_median_of_neighbours() -> None:
    # A load that makes one repetition ten times slower for both must not show.
    ours = Side([10, 10, 10], [1.0, 10.0, 2.0], [1.0, 1.0, 1.0])
    peer = Side([20, 20, 20], [4.0, 40.0, 4.0], [1.0, 1.0, 1.0])
    comparison = Comparison("", ours, peer)
    assert comparison.speed_ratio == 2.0
    assert comparison.cpu_ratio == 0.5
    assert comparison.ours.per_second == 5.0


def test_peak_memory_of_every_process_is_seen() -> None:
    child = f"import time; x = bytearray(200 << 20); time.sleep({patient(0.5)})"
    finished = run_watched([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    assert len(finished.peak_bytes) == 2
    assert finished.peak_bytes[0] > 200 << 20 > finished.peak_bytes[1] > 1 << 20
    assert finished.wall_seconds > 0.5 > finished.cpu_seconds > 0
    assert (finished.work_wall_seconds, finished.work_cpu_seconds) == (finished.wall_seconds, finished.cpu_seconds)
    with pytest.raises(CommandFailed, match="ended with code 3: error: no such thing$"):
        run_watched([sys.executable, "-c", "print('error: no such thing'); print('bye'); raise SystemExit(3)"])


@pytest.mark.parametrize("form", convert.FORMATS)
def test_models_to_convert_are_as_published_and_of_the_wanted_size(tmp_path: Path, form: str, monkeypatch) -> None:
    dtype = convert.FORMATS[form]
    for size in (0.5, 4):
        tensors = hf_tensors(hf_shapes(convert.choose_architecture(size, dtype)), dtype)
        assert abs(sum(tensor.nbytes for tensor in tensors) / size / 1e9 - 1) < 0.25
    monkeypatch.setattr(convert, "_POOL_ELEMENTS", 1 << 20)
    arch = convert.make_architecture(1, hidden=128)
    convert.make_folder(tmp_path / "model", arch, dtype, seed=0)
    folder = HfFolder(tmp_path / "model")
    assert folder.architecture().model_dump(exclude={"init_std"}) == arch.model_dump(exclude={"init_std"})
    folder.check_names(hf_shapes(arch))
    assert all(folder.read(name).any() for name in folder.files)


def test_conversion_takes_turns_with_a_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.distcp").write_bytes(bytes(5_000_000))
    code = (
        "import sys, time, shutil, os; time.sleep(0.5); work = sys.argv[2] + '.work'; shutil.copytree(sys.argv[1], work); "
        "file = open(work + '/a.distcp'); sum(range(20_000_000)); os.rename(work, sys.argv[2]); time.sleep(0.4)"
    )
    result = convert.measure("x", lambda *folders: [sys.executable, "-c", code, *map(str, folders)], source, repeats=2)
    assert result.comparison.ours.amounts == result.comparison.peer.amounts == [10_000_000] * 2
    assert result.around_seconds > 0.9
    for finished, seconds in zip(result.whole, result.comparison.ours.wall_seconds, strict=True):
        assert finished.wall_seconds - 0.8 > finished.work_wall_seconds == seconds > 0.1
    assert 0 < result.whole_ratio < result.comparison.speed_ratio and len(convert.table_row(result)) == len(convert.HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    arguments = convert.parse_arguments(["--dir", str(tmp_path), "--out", str(tmp_path / "result.json"), "--sizes", "1"])
    convert.write_conversions([result], arguments, {})
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["convert"][0]["whole"][0]["peak_bytes"] and str(tmp_path) not in json.dumps(content)


def test_work_is_told_from_start_and_end(tmp_path: Path) -> None:
    data, result = tmp_path / "a.distcp", tmp_path / "result"
    data.touch()
    before, work, after = patient(0.3), patient(0.3), patient(0.5)
    code = (
        f"import time; time.sleep({before}); file = open({str(data)!r}); time.sleep({work}); open({str(result)!r}, 'w'); "
        f"time.sleep({after})"
    )
    command = [sys.executable, "-c", code]
    for name, there, least, around in (
        (".distcp", result, 0.7 * work, 0.9 * (before + after)),
        (".distcp", None, 0.9 * (work + after), 0.7 * before),
        (".other", None, before + work + after, 0),
    ):
        finished = run_watched(command, data_file=name, result=there)
        result.unlink()
        assert finished.wall_seconds - around >= finished.work_wall_seconds > least, (name, there)


def test_too_little_space_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GB are free, 5000000 GB are needed"):
        convert.check_space(tmp_path, 1_000_000)
    with pytest.raises(ConfigError, match="no such folder"):
        convert.check_space(tmp_path / "nowhere", 1)


def test_the_cost_of_scoring_a_step_follows_from_rates():
    rates = rewards_step.Rates(
        characters_per_second=1e6, format_characters_per_second=1e9, math_per_second=5000, program_tests_per_second=20
    )
    seconds = rewards_step.step_seconds(rates, 8192, 32_768, workers=64, tests=10, second_opinions=0.1, problems=6400)
    # 8,192 x 32,768 x 4 = 1.07e9 characters, a 64th of them for each worker
    expected = {"language": 16.8, "format": 0.0168, "math": 3.87, "code": 64.0, "references at the start": 3.02}
    assert seconds == pytest.approx(expected, rel=0.01)
    one = rewards_step.step_seconds(rates, 65, 32_768, workers=64)["code"]  # one worker has two answers
    assert one == pytest.approx(2 * 10 / 20)
    beside_8_engines = rewards_step.step_seconds(rates, 8192, 32_768, workers=64, problems=6400, pools=8)
    assert beside_8_engines == pytest.approx(
        {name: value / (1 if name.startswith("references") else 8) for name, value in expected.items()}, rel=0.01
    )
