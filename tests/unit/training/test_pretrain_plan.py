"""The plan of DeepSeek-V3's pretraining against what its report says, field by field, and plans of other shapes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.presets import PRESETS, resolve_architecture
from megatron_r1.training.pretrain_plan import PretrainPlan
from tests.paths import ROOT

T, B = 10**12, 10**9
V3 = load_config(ROOT / "examples/v3_671b/pretrain.yaml")


@pytest.fixture(scope="module")
def plan() -> PretrainPlan:
    return PretrainPlan(V3.pretrain)


def make(phases: list[dict[str, Any]], **settings: Any) -> PretrainPlan:
    optimizer = settings.pop("optimizer", {})
    given = {"sequence_length": 8, "global_batch_size": 4, "micro_batch_size": 1} | settings
    return PretrainPlan(PretrainConfig(optimizer={"lr": 1.0} | optimizer, phases=phases, **given))


def test_settings_that_hold_for_all_of_v3() -> None:
    """V3 section 4.2, "Model Hyper-Parameters" and "Training Hyper-Parameters"; 3.2 for the layout, 3.3.2 for the moments."""
    optimizer, moe, stage = V3.pretrain.optimizer, V3.pretrain.moe, V3.pretrain
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (optimizer.lr, optimizer.warmup_steps) == (2.2e-4, 2000)
    assert (moe.aux_loss_coeff, moe.mtp_trains_trunk) == (1e-4, True)
    assert (stage.fill_in_middle_rate, stage.mask_documents) == (0.1, False)
    assert resolve_architecture(V3.model.preset, V3.model.overrides).init_std == 0.006 == PRESETS["671b"].init_std
    layout = V3.parallel
    assert (layout.tp, layout.pp, layout.ep, layout.cp) == (1, 16, 64, 1)
    assert V3.runtime.recompute == "full"  # the paper's is less, see the file
    moments = V3.megatron.exp_avg_dtype, V3.megatron.exp_avg_sq_dtype
    assert V3.megatron.use_precision_aware_optimizer and moments == ("bf16", "bf16")  # section 3.3.2


def test_phases_of_v3(plan) -> None:
    """V3 sections 4.2 and 4.3: 14.8T tokens at 4K, then 1,000 updates at 32K and at 128K, with YaRN in both."""
    lengths = [(phase.sequence_length, phase.levels[-1].rows) for phase in plan.phases]
    assert lengths == [(4096, 15_360), (32_768, 1920), (131_072, 480)]
    assert [phase.updates for phase in plan.phases[1:]] == [1000, 1000]
    first = plan.phases[0]
    assert 14.8 * T <= first.tokens < 14.8 * T + 15_360 * 4096, "it ends with the update that reaches them"
    scalings = [phase.rope_scaling for phase in plan.phases]
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    assert scalings == [None, *[yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}] * 2]
    assert PRESETS["671b"].rope_scaling.model_dump() == scalings[1], "the published config.json"


def test_updates_of_v3_are_counted(plan) -> None:
    """Level by level: 96 stretches of 469B / 96 tokens with 3,072 + 128 j rows, then full batches."""
    consumed = updates = 0
    for rows in range(3072, 15_360, 128):
        end = 469 * B * ((rows - 3072) // 128 + 1) / 96
        while consumed < end:
            consumed, updates = consumed + rows * 4096, updates + 1
    assert plan.update(updates + 1).first_token == consumed and len(plan.update(updates).rows) == 15_232
    assert len(plan.update(updates + 1).rows) == 15_360 and 469 * B <= consumed < 469 * B + 15_360 * 4096
    updates += math.ceil((14.8 * T - consumed) / (15_360 * 4096))
    assert plan.phases[0].updates == updates == 242_940 and plan.total_updates == 244_940
    assert plan.total_tokens == plan.phases[0].tokens + 2000 * 15_360 * 4096


@pytest.mark.parametrize(
    ("tokens", "rows", "lr", "bias", "mtp"),
    [
        (0, 3072, 2.2e-4 / 2000, 1e-3, 0.3),
        (2 * 3072 * 4096, 3072, 3 * 2.2e-4 / 2000, 1e-3, 0.3),
        (234.6 * B, 3072 + 48 * 128, 2.2e-4, 1e-3, 0.3),  # half of the ramp
        (468.9 * B, 15_232, 2.2e-4, 1e-3, 0.3),
        (469.1 * B, 15_360, 2.2e-4, 1e-3, 0.3),
        (10 * T - B, 15_360, 2.2e-4, 1e-3, 0.3),
        (10 * T + B, 15_360, 2.2e-4, 1e-3, 0.1),
        (12.15 * T, 15_360, (2.2e-4 + 2.2e-5) / 2, 1e-3, 0.1),  # half of the cosine
        (14.3 * T - B, 15_360, 2.2e-5, 1e-3, 0.1),
        (14.3 * T + B, 15_360, 2.2e-5, 0.0, 0.1),
        (14.633 * T - B, 15_360, 2.2e-5, 0.0, 0.1),
        (14.633 * T + B, 15_360, 7.3e-6, 0.0, 0.1),
        (14.8 * T - B, 15_360, 7.3e-6, 0.0, 0.1),
        (14.8 * T + B, 1920, 7.3e-6, 0.0, 0.1),
        (14.8 * T + 64 * B, 480, 7.3e-6, 0.0, 0.1),
    ],
)
def test_rates_and_rows_of_v3_at_the_boundaries(plan, tokens: float, rows: int, lr: float, bias: float, mtp: float) -> None:
    update = plan.after(int(tokens))
    assert update.first_token <= tokens < update.first_token + update.tokens
    assert len(update.rows) == rows
    assert update.rates.lr == pytest.approx(lr, rel=1e-4)
    assert (update.rates.bias_update_rate, update.rates.mtp_loss_scale) == (bias, mtp)


def test_warm_up_of_v3_ends_after_2000_updates(plan) -> None:
    assert [plan.update(number).rates.lr for number in (1000, 2000, 2001)] == pytest.approx([1.1e-4, 2.2e-4, 2.2e-4])
    assert plan.update(1999).rates.lr < 2.2e-4


@pytest.mark.parametrize("number", range(20))
def test_every_row_is_trained_on_once_and_the_number_of_an_update_follows_from_its_tokens(number: int) -> None:
    import random

    draw = random.Random(number)
    phases = []
    for _ in range(draw.randint(1, 4)):
        full, increment = draw.randint(2, 12), draw.randint(1, 3)
        start = full - increment * draw.randint(0, (full - 1) // increment)
        ramp = {"start": start, "increment": increment, "tokens": draw.randint(1, 900)} if start < full else None
        limit = draw.choice([{"tokens": draw.randint(1, 1500)}, {"updates": draw.randint(1, 20)}])
        phases.append({"sequence_length": draw.choice([2, 8, 24]), "global_batch_size": full, "batch_ramp": ramp, **limit})
    plan = make(phases)
    token = 0
    updates = [plan.update(step) for step in range(1, plan.total_updates + 1)]
    for phase, group in itertools.groupby(updates, key=lambda update: update.phase):
        rows = [row for update in group for row in update.rows]
        assert rows == list(range(len(rows))) and len(rows) * phase.sequence_length == phase.tokens
        wanted = phase.settings
        assert phase.updates == wanted.updates if wanted.updates else 0 <= phase.tokens - wanted.tokens < 12 * 24
    for update in updates:
        assert update.first_token == token and plan.after(token) == plan.after(token + update.tokens - 1) == update
        token += update.tokens
        ramp = update.phase.settings.batch_ramp
        if ramp is not None:  # as Megatron-LM's, see `_levels`
            full, within = update.phase.settings.global_batch_size, update.first_token - update.phase.first_token
            steps = (full - ramp.start) // ramp.increment
            assert len(update.rows) == min(full, ramp.start + ramp.increment * (within * steps // ramp.tokens))
    assert token == plan.total_tokens


def test_without_phases_it_is_the_plan_of_before() -> None:
    plan = make([], steps=7, micro_batch_size=2, optimizer={"schedule": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1})
    assert plan.total_updates == 7 and plan.total_tokens == 7 * 32
    assert [plan.update(step).rows for step in (1, 2, 7)] == [range(4), range(4, 8), range(24, 28)]
    assert plan.update(9).rows == range(32, 36), "a gate's extra rounds go on"
    assert [plan.update(step).rates.lr for step in (1, 2, 7, 9)] == pytest.approx([0.5, 1.0, 0.1, 0.1])


def test_a_schedule_of_updates_goes_over_all_phases_and_own_parts_replace_it() -> None:
    phases = [{"updates": 4}, {"updates": 4, "learning_rate": [{"tokens": 64, "lr": 0.2, "shape": "linear"}, {"lr": 0.1}]}]
    plan = make([*phases, {"updates": 2}], optimizer={"schedule": "linear", "min_lr_ratio": 0.0})
    rates = [plan.update(step).rates.lr for step in range(1, 11)]
    assert rates == pytest.approx([0.9, 0.8, 0.7, 0.6, 1.0, 0.6, 0.1, 0.1, 0.1, 0.0])


def test_a_longer_phase_fits_fewer_sequences_into_a_forward_pass() -> None:
    phases = [{"updates": 1}, {"updates": 1, "sequence_length": 24}, {"updates": 1, "sequence_length": 64}]
    plan = make(phases, global_batch_size=8, micro_batch_size=8)
    assert [phase.micro_batch_size for phase in plan.phases] == [8, 2, 1]


@pytest.mark.parametrize("unit", ["tokens", "updates"])
@pytest.mark.parametrize("more", [1, 7, 300])
@pytest.mark.parametrize(
    "last",
    [
        {},
        {"batch_ramp": {"start": 1, "increment": 1, "tokens": 500}, "bias_update_rate": [{"tokens": 40, "value": 0.5}]},
        {
            "sequence_length": 24,
            "learning_rate": [{"tokens": 99, "lr": 0.1, "shape": "cosine"}],
            "mtp_loss_scale": [{"value": 1.0}],
        },
        {"learning_rate": [{"tokens": 500, "lr": 0.1, "shape": "linear"}, {"lr": 0.3}]},
    ],
)
def test_a_longer_last_phase_and_others_behind_it_leave_all_updates_before_as_they_were(last, more: int, unit: str) -> None:
    def plan(length: int, *behind: dict[str, Any]) -> PretrainPlan:
        return make([{"updates": 3, "learning_rate": [{"lr": 0.5}]}, {unit: length, **last}, *behind])

    short, longer = plan(11), plan(11 + more, {"updates": 2, "sequence_length": 32, "global_batch_size": 1})
    assert longer.total_updates > short.total_updates
    for step in range(1, short.total_updates + 1):
        was, found = short.update(step), longer.update(step)
        assert (was.rows, was.first_token, was.rates) == (found.rows, found.first_token, found.rates)
        assert (was.phase.number, was.phase.sequence_length) == (found.phase.number, found.phase.sequence_length)


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([{}], "pretrain.phases.0: give either its tokens or its updates"),
        ([{"updates": 1}, {"updates": 1, "tokens": 9}], "pretrain.phases.1: give either its tokens or its updates"),
        (
            [{"updates": 9, "batch_ramp": {"start": 1, "increment": 2, "tokens": 9}}],
            "pretrain.phases.0.batch_ramp: steps of 2 do not lead from 1 to 8 sequences",
        ),
        ([{"updates": 9, "batch_ramp": {"start": 8, "increment": 2, "tokens": 9}}], "do not lead from 8 to 8"),
        ([{"updates": 9, "batch_ramp": {"start": 9, "increment": 1, "tokens": 9}}], "do not lead from 9 to 8"),
        (
            [{"updates": 9, "batch_ramp": {"start": 5, "increment": 1, "tokens": 900}}],
            "pretrain.phases.0.batch_ramp: pretrain.micro_batch_size=2 does not divide its 5 sequences",
        ),
        ([{"updates": 9, "global_batch_size": 7}], "micro_batch_size does not divide pretrain.phases.0.global_batch_size"),
        (
            [{"updates": 9, "learning_rate": [{"lr": 1.0}, {"lr": 0.5}]}],
            "pretrain.phases.0.learning_rate.0.tokens is not set: only the last part",
        ),
        ([{"updates": 9, "bias_update_rate": [{"value": 1.0}, {"value": 0.5}]}], "phases.0.bias_update_rate.0.tokens is not set"),
        ([{"updates": 9, "learning_rate": [{"lr": 1.0, "shape": "cosine"}]}], "its last part is cosine, so it needs tokens"),
        ([{"updates": 9, "mtp_loss_scale": [{"value": 0.0}]}], "pretrain.phases.0.mtp_loss_scale: all values"),
    ],
)
def test_phases_that_contradict_themselves_are_one_line(phases: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(phases, global_batch_size=8, micro_batch_size=2)
    assert told in str(caught.value) and "\n" not in str(caught.value)
