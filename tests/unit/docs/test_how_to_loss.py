"""docs/how_to/loss.md as written: its function, its check, and what the page promises of both."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1.algorithms.losses.contract import PolicyBatch, PolicySettings
from megatron_r1.algorithms.losses.registry import POLICY_LOSSES, find_policy_loss
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.data.packing import pack_samples
from megatron_r1.errors import ConfigError
from megatron_r1.training.grpo import loss_of
from megatron_r1.types import TrainingSample
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "how_to" / "loss.md").read_text(encoding="utf-8")
FUNCTION, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAME = "own_losses:drift_bounded_loss"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page has its reader save the function; on Python's path."""
    (tmp_path / "own_losses.py").write_text(FUNCTION, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    return tmp_path


def test_the_check_passes_and_finds_a_loss_that_depends_on_the_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "check_own_losses.py").write_text(CHECK, encoding="utf-8")
    runpy.run_path(str(folder / "check_own_losses.py"))
    assert "in small micro-batches and in one" in capsys.readouterr().out
    (folder / "local_losses.py").write_text(FUNCTION.replace("batch.minibatch_sequences", "batch.num_sequences"), encoding="utf-8")
    (folder / "check_local.py").write_text(CHECK.replace("own_losses:", "local_losses:"), encoding="utf-8")
    with pytest.raises(AssertionError):
        runpy.run_path(str(folder / "check_local.py"))


def test_the_loss_is_the_equation_of_its_docstring(folder: Path) -> None:
    old = torch.tensor([[0.0, -1.0, -2.0, -1.0, 0.0]])
    logprobs = torch.tensor([[-9.0, -1.1, -2.1, -4.0, -9.0]], requires_grad=True)
    batch = PolicyBatch(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=old,
        ref_logprobs=None,
        advantages=torch.tensor([[2.0, 2.0, 2.0, 5.0, 0.0]]),
        loss_mask=torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]),
        sequence_ids=torch.tensor([[0, 0, 0, 1, 2]]),
        sequence_lengths=torch.tensor([[2.0, 2.0, 2.0, 1.0, 1.0]]),
        num_sequences=3,
        minibatch_sequences=4,
        minibatch_tokens=9,
    )
    loss, metrics = find_policy_loss(NAME)(batch, PolicySettings(0.2, 0.0, "sequence"))
    loss.backward()
    assert loss.item() == pytest.approx(-2.0 * -1.6 / 4), "the second response is 3 nats away, and left out"
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, -0.25, -0.25, 0.0, 0.0]]
    assert metrics["drift/dropped"].value.item() == 1 and metrics["drift/max"].value.item() == 3.0
    assert batch.at_tokens(torch.tensor([7.0, 8.0, 9.0])).tolist() == [[7.0, 7.0, 7.0, 8.0, 9.0]]
    empty = replace(batch, loss_mask=torch.zeros_like(old))
    assert find_policy_loss(NAME)(empty, PolicySettings(0.2, 0.0, "sequence"))[0].item() == 0.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gprpo", "grpo.loss=gprpo is not known: write grpo or package.module:function"),
        ("own_losses:drift", "grpo.loss=own_losses:drift: own_losses holds no function drift"),
        ("own_losses:one_argument", r"is called as one_argument\(batch, settings\)"),
    ],
)
def test_a_wrong_name_is_one_line(folder: Path, name: str, words: str) -> None:
    (folder / "own_losses.py").write_text("def one_argument(batch):\n    return batch\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        find_policy_loss(name)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("batch.logprobs.sum()", "must return a scalar tensor with gradient and a dictionary"),
        ("(batch.logprobs, {})", "must return a scalar"),
        ("(batch.logprobs.sum().detach(), {})", "must return a scalar tensor with gradient"),
        ("(batch.logprobs.sum(), {'a/b': 1.0})", "a metric a/b that is no Metric"),
        ("(batch.logprobs.sum(), {'a/b': Metric(1.0, 'max')})", "a metric a/b that is no Metric of a scalar tensor"),
        ("(batch.logprobs.sum(), {'loss': Metric(batch.logprobs[0, 0], 'max')})", "a metric loss: write a name with a slash"),
        (
            "(batch.logprobs.sum(), {'a/b': Metric(batch.logprobs[0, 0], 'mean')})",
            "reduction mean, expected one of sum, token_mean",
        ),
    ],
)
def test_a_result_that_breaks_the_contract_is_one_line(folder: Path, result: str, words: str) -> None:
    module = f"their_loss_{abs(hash(result))}"
    (folder / f"{module}.py").write_text(
        f"from megatron_r1.types import Metric\n\ndef loss(batch, settings):\n    return {result}\n", encoding="utf-8"
    )
    zeros = torch.zeros(3)
    samples = [TrainingSample([0] * 4, [1] * 3, old_logprobs=zeros, rollout_logprobs=zeros)]
    (micro_batches,) = pack_samples(samples, max_tokens=3, dp_size=1, pad_multiple=1)
    with pytest.raises(ConfigError, match=words):
        loss_of(GrpoConfig(loss=f"{module}:loss"), samples)(torch.zeros(1, 3, requires_grad=True), micro_batches[0])


def test_the_page_names_what_is_there() -> None:
    assert "grpo" in POLICY_LOSSES
    for path in re.findall(r"`((?:megatron_r1|tests|examples)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
