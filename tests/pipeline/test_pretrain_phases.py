"""Pretraining in phases: what a phase changes, and a run that is killed before, at, in and after a change of phase."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_r1 import cli
from megatron_r1.runtime import distributed
from tests.paths import ROOT
from tests.timed import TIMES

YARN = {"type": "yarn", "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
FOURFOLD = json.dumps(YARN | {"factor": 4})
SETTINGS: dict[str, Any] = {
    "model": {
        "preset": "tiny",
        "overrides": {
            "num_nextn_predict_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "kv_lora_rank": 32,
            "num_attention_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "max_position_embeddings": 256, "n_routed_experts": 4, "moe_intermediate_size": 16,
        },
    },
    "runtime": {"device": "cpu", "threads": 1},
    "checkpoint": {"asynchronous": False, "keep": 9},
    "pretrain": {
        "sequence_length": 16,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "checkpoint_interval": 1,
        "ema_decay": 0.5,
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "moe": {"bias_update_rate": 1e-3, "aux_loss_coeff": 1e-4, "mtp_loss_scale": 0.3},
        "phases": [
            {
                "tokens": 160,
                "batch_ramp": {"start": 2, "increment": 2, "tokens": 64},
                "learning_rate": [{"tokens": 64, "lr": 1e-3}, {"tokens": 96, "lr": 1e-4, "shape": "cosine"}],
            },
            {
                "updates": 2,
                "sequence_length": 64,
                "global_batch_size": 2,
                "rope_scaling": YARN | {"factor": 4},
                "learning_rate": [{"lr": 1e-4}],
                "bias_update_rate": [{"value": 0.0}],
                "mtp_loss_scale": [{"value": 0.1}],
            },
            {"updates": 1, "sequence_length": 128, "global_batch_size": 1, "rope_scaling": YARN | {"factor": 8}},
        ],
    },
}  # fmt: skip


def pretrain(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setattr(distributed, "_STORE", None)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(SETTINGS))
    return cli.main(["pretrain", "--config", str(file), f"run_dir={folder}", *overrides])


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def killed_after(whole: Path, step: int, folder: Path) -> Path:
    """A copy of a run as a kill would leave it."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "hf")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("_")[2]) > step:
            shutil.rmtree(checkpoint)
    return folder


def check_weight_decay(model: Any) -> None:
    """Matrices have it, embedding and router among them; norms have not, and the router's bias is no parameter."""
    from megatron_r1.mcore.adam_state import distributed_optimizers

    names = {parameter: name for module in model.modules for name, parameter in module.named_parameters()}
    assert not any(name.endswith("expert_bias") for name in names.values())
    found = {}
    for part in distributed_optimizers(model.optimizer):
        for parameter, (group, _) in part.model_param_group_index_map.items():
            found[names[parameter]] = part.optimizer.param_groups[group]["weight_decay"]
    assert found.keys() == set(names.values())
    assert found == {name: 0.0 if parameter.dim() == 1 else 0.1 for parameter, name in names.items()}
    assert any("norm" in name for name in names.values()) and any("router.weight" in name for name in names.values())


class Averages:
    """What the average of the weights must be, made anew from the weights of every update, whichever phase's model they are of."""

    def __init__(self) -> None:
        from megatron_r1.mcore.ema import HostAverage

        self._after_update = HostAverage.after_update
        self.forget()

    def forget(self) -> None:
        """Another run begins, or goes on."""
        self.updates, self.expected = 0, []

    def take(self, average: Any) -> None:
        """In place of `HostAverage.after_update`."""
        average.settle()
        self.expected = self.expected or [tensor.clone() for tensor in average.average]
        self._after_update(average)
        average.settle()
        weights = average._weights
        self.expected = [torch.lerp(tensor, new.detach(), 0.5) for tensor, new in zip(self.expected, weights, strict=True)]
        assert all(map(torch.equal, self.expected, average.average)) and not torch.equal(self.expected[0], weights[0])
        self.updates += 1


def test_a_run_in_phases_goes_on_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron_r1.mcore import megatron_model
    from megatron_r1.mcore.ema import HostAverage

    models: list[weakref.ref] = []
    parts: list[weakref.ref] = []
    build = megatron_model.MegatronModel.__init__

    def build_and_look(self: Any, *given: Any, **named: Any) -> None:
        assert not any(held() is not None for held in models + parts), (
            "the model of the phase before is freed first, buffers and all"
        )
        build(self, *given, **named)
        models.append(weakref.ref(self))
        parts.extend(map(weakref.ref, (*self.chunks, *self.modules)))

    take = megatron_model.MegatronModel._take_rates
    rates: list[tuple[float, ...]] = []

    def take_and_look(self: Any) -> None:
        take(self)
        check_weight_decay(self)
        groups = self.optimizer.param_groups
        found = (groups[0]["lr"], self._balance.bias_update_rate, self.modules[0].config.mtp_loss_scaling_factor)
        assert all(group["lr"] == found[0] for group in groups)
        rates.append(found)

    averages = Averages()
    monkeypatch.setattr(HostAverage, "after_update", lambda self: averages.take(self))
    monkeypatch.setattr(megatron_model.MegatronModel, "__init__", build_and_look)
    monkeypatch.setattr(megatron_model.MegatronModel, "_take_rates", take_and_look)
    whole = tmp_path / "whole"
    assert pretrain(whole, monkeypatch) == 0
    told = capfd.readouterr().err
    assert "pretraining: 7/7, " in told and "pretraining: 4/4, " not in told, "it counts to the end of the run, not of a phase"
    assert averages.updates == 7
    average = averages.expected
    lines = lines_of(whole)
    assert [line["phase"] for line in lines] == [0, 0, 0, 0, 1, 1, 2] and len(models) == 3
    assert [line["consumed_tokens"] for line in lines] == [32, 64, 128, 192, 320, 448, 576]
    lrs = [5e-4, 1e-3, 1e-3, pytest.approx(3.25e-4, rel=1e-3), 1e-4, 1e-4, 1e-3]
    assert rates == list(zip(lrs, [1e-3] * 4 + [0.0] * 2 + [1e-3], [0.3] * 4 + [0.1] * 2 + [0.3], strict=True))
    assert [line["lr"] for line in lines] == lrs
    factors = {}
    for folder in sorted((whole / "checkpoints").iterdir()):
        scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
        factors[int(folder.name.rpartition("_")[2])] = scaling and scaling["factor"]
    assert factors == {1: None, 2: None, 3: None, 4: None, 5: 4.0, 6: 4.0, 7: 8.0}
    assert json.loads((whole / "hf/config.json").read_text())["rope_scaling"]["factor"] == 8.0

    weights = next(whole.glob("hf/*.safetensors")).read_bytes()
    for step in (3, 4, 5):  # before, at and in the second phase; then through the rest
        models.clear()
        averages.forget()
        again = killed_after(whole, step, tmp_path / f"again_{step}")
        assert pretrain(again, monkeypatch) == 0
        assert f"resuming {again} after step {step}" in capfd.readouterr().err
        assert lines_of(again) == lines and next(again.glob("hf/*.safetensors")).read_bytes() == weights
        assert len(models) == (3 if step == 3 else 2), "what was trained already is not built"
        assert averages.updates == 7 - step and all(map(torch.equal, averages.expected, average)), "to the last bit"

    phases = [dict(phase) for phase in SETTINGS["pretrain"]["phases"]]
    phases[2]["updates"] = 2
    phases.append({"updates": 1, "sequence_length": 64, "global_batch_size": 2, "rope_scaling": YARN | {"factor": 4}})
    longer = f"pretrain.phases={json.dumps(phases)}"
    models.clear()
    assert pretrain(again, monkeypatch, longer) == 0, "a finished run, too"
    assert f"resuming {again} after step 7" in capfd.readouterr().err and len(models) == 2
    (again / "report.html").rename(again / "report.html.tmp-1")
    assert pretrain(again, monkeypatch, longer) == 0, "as a kill behind the artifact would leave it"
    assert (
        [path.name for path in again.glob("report*")] == ["report.html"]
        and "is finished" in capfd.readouterr().out
        and len(models) == 2
    )
    models.clear()
    averages.forget()
    assert pretrain(tmp_path / "longer", monkeypatch, longer) == 0
    assert lines_of(again) == lines_of(tmp_path / "longer") and lines_of(again)[:7] == lines and len(lines_of(again)) == 9
    at_once, added = (next(run.glob("hf/*.safetensors")).read_bytes() for run in (tmp_path / "longer", again))
    assert at_once == added != weights

    before = (whole / "metrics.jsonl").read_bytes()
    phases = [dict(phase) for phase in SETTINGS["pretrain"]["phases"]]
    phases[1]["updates"] = 3
    assert pretrain(whole, monkeypatch, f"pretrain.phases={json.dumps(phases)}") == 2
    assert "it says what an update does; keep the value" in capfd.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_page_is_right_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """docs/how_to/pretrain.md, its commands in this process."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/how_to/pretrain.md").read_text()
    (block,) = re.findall(r"^```yaml\n# phases.yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("phases.yaml").write_text(block)
    commands = re.findall(r"^```bash\nmegatron-r1 (.*?)\n```$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(distributed, "_STORE", None)
        assert cli.main(command.split()) == 0
    assert "phase 1     512 tokens in 2 updates from 11 on, cp 1" in capsys.readouterr().out
    lines = lines_of(Path("runs/phases"))
    assert len(lines) == 12 and lines[-1]["consumed_tokens"] == 2048 + 512
    assert json.loads(Path("runs/phases/hf/config.json").read_text())["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pretrain.sequence_length=512", "pretrain.sequence_length=512 is more than the model's 256 positions"),
        ("pretrain.phases=[{updates: 1, sequence_length: 257}]", "phases.0.sequence_length=257 is more than the model's 256"),
        (
            f"pretrain.phases=[{{updates: 1}}, {{updates: 1, sequence_length: 80, rope_scaling: {FOURFOLD}}}]",
            "pretrain.phases.1.sequence_length=80 is more than the 64 tokens that pretrain.phases.1.rope_scaling reaches",
        ),
        ("pretrain.phases=[{updates: 1, rope_scaling: {type: linear, factor: 2}}]", "phases.0.rope_scaling: rope_scaling is"),
        ("pretrain.phases=[{updates: 1, rope_scaling: {type: yarn}}]", "rope_scaling lacks factor"),
        ("pretrain.phases=[{updates: 1, rope_scaling: {type: yarn, factor: -1}}]", "greater than 0"),
        ("pretrain.phases=[{updates: 1, rope_scaling: sometimes}]", "'pretrain.phases.0.rope_scaling"),
        ("pretrain.phases=[{updates: 1, size: 3}]", "'pretrain.phases.0.size'"),
        ("pretrain.fill_in_middle_rate=0.1", "needs a tokenizer with the tokens"),
        ("pretrain.phases=[{updates: 1, cp: 2}]", "parallel"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_leaves_nothing(override: str, told: str, tmp_path, monkeypatch, capfd) -> None:
    assert pretrain(tmp_path / "run", monkeypatch, override) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert told in error[-1] and not (tmp_path / "run").exists()
