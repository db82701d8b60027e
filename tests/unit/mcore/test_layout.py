"""A layout is checked before anything is built, and what Megatron-Core gets silently wrong is refused with the reason."""

from __future__ import annotations

import pytest

from megatron_r1.config.model import ParallelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout, resolve_layout, stage_layers
from megatron_r1.model.presets import PRESETS, resolve_architecture
from tests.random_weights import full_architecture, qwen2_architecture


def resolve(world_size: int, *, mtp: bool = False, preset: str = "tiny", **sizes: object) -> Layout:
    return resolve_layout(ParallelConfig(**sizes), PRESETS[preset], world_size, mtp=mtp)


@pytest.mark.parametrize(
    ("world_size", "sizes", "expected"),
    [
        (1, {}, Layout()),
        (2, {}, Layout(dp=2, world_size=2)),
        (2, {"tp": 2}, Layout(tp=2, etp=2, sequence_parallel=True, world_size=2)),
        (2, {"pp": 2}, Layout(pp=2, world_size=2)),
        (2, {"ep": 2}, Layout(ep=2, dp=2, world_size=2)),
        (4, {"tp": 2, "ep": 2}, Layout(tp=2, ep=2, etp=1, dp=2, sequence_parallel=True, world_size=4)),
        (4, {"tp": 2, "ep": 2, "etp": 2}, Layout(tp=2, ep=2, etp=2, dp=2, sequence_parallel=True, world_size=4)),
        (4, {"tp": 2, "cp": 2}, Layout(tp=2, cp=2, etp=2, sequence_parallel=True, world_size=4)),
    ],
)
def test_what_is_left_is_data_parallel(world_size: int, sizes: dict, expected: Layout) -> None:
    assert resolve(world_size, **sizes) == expected


def test_interleaved_stages() -> None:
    assert resolve(2, pp=2, vpp=4, preset="small").vpp == 4


def test_the_671b_recipe() -> None:
    layout = resolve(2048, preset="671b", pp=16, ep=64, mtp=True)
    assert (layout.dp, layout.etp) == (128, 1)


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {"tp": 3}, "parallel.tp=3 x pp=1 x cp=1 does not divide the 4 processes"),
        (3, {"tp": 3}, "parallel.tp=3 does not divide num_attention_heads=4 of the model"),
        (2, {"ep": 4}, "parallel.ep=4 x etp=1 x pp=1 does not divide the 2 processes"),
        (3, {"ep": 3}, "parallel.ep=3 does not divide n_routed_experts=8 of the model"),
        (4, {"pp": 4}, "parallel.pp=4 x vpp=1 needs at least 4 layers, the model has 3"),
        (2, {"pp": 2, "vpp": 2}, "parallel.pp=2 x vpp=2 needs at least 4 layers, the model has 3"),
        (1, {"vpp": 2}, "parallel.vpp=2 needs parallel.pp above 1"),
        (2, {"tp": 2, "etp": 1}, "parallel.etp=1 with tp=2 needs parallel.ep above 1"),
        (2, {"etp": 2}, "parallel.etp=2 with tp=1 needs parallel.ep above 1"),
        (2, {"tp": 2, "sequence_parallel": False}, "parallel.sequence_parallel=false with tp=2"),
        (1, {"sequence_parallel": True}, "parallel.sequence_parallel=true needs parallel.tp above 1"),
        (1, {"mtp": True}, "moe.mtp_loss_scale above 0 needs a model with num_nextn_predict_layers above 0"),
    ],
)
def test_refusals_name_the_key(world_size: int, sizes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(world_size, **sizes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "overrides", "what"),
    [
        ({"tp": 2}, {"intermediate_size": 257}, "intermediate_size=257"),
        ({"tp": 2}, {"moe_intermediate_size": 63}, "the shared experts' width=63"),
        ({"tp": 2, "ep": 2, "etp": 2}, {"moe_intermediate_size": 63, "n_shared_experts": 2}, "moe_intermediate_size=63"),
    ],
)
def test_every_split_dimension_is_checked(sizes: dict, overrides: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=f"does not divide {what} of the model"):
        resolve_layout(ParallelConfig(**sizes), resolve_architecture("tiny", overrides), 4, mtp=False)


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (3, {"tp": 3}, "parallel.tp=3 does not divide num_key_value_heads=2 of the model"),
        (2, {"ep": 2}, "parallel.ep=2 needs a model with experts, qwen2 has none: leave it unset"),
        (1, {"mtp": True}, "moe.mtp_loss_scale above 0 needs a model with num_nextn_predict_layers above 0"),
    ],
)
def test_what_a_dense_model_cannot_have_is_refused(world_size: int, sizes: dict, message: str) -> None:
    mtp = sizes.pop("mtp", False)
    with pytest.raises(ConfigError, match=message):
        resolve_layout(ParallelConfig(**sizes), qwen2_architecture(), world_size, mtp=mtp)


def test_uneven_stages_give_the_first_ones_more() -> None:
    assert stage_layers(3, 2) == [2, 1]
    assert stage_layers(61, 16) == [4] * 13 + [3] * 3
    assert stage_layers(8, 4) == [2, 2, 2, 2]


STAGED = full_architecture(mtp=1)  # five layers


@pytest.mark.parametrize(
    ("text", "sizes", "layers"),
    [
        ("Et*2|t*3mL", {"pp": 2}, [2, 3]),
        ("E t, t | (t|)*2 t m L", {"pp": 4}, [2, 1, 1, 1]),
        ("E|(tt|)*2tmL", {"pp": 2, "vpp": 2}, [0, 2, 2, 1]),
        ("Et*5|mL", {"pp": 2}, [5, 0]),
    ],
)
def test_stages_by_a_layout_string(text, sizes, layers):
    layout = resolve_layout(ParallelConfig(**sizes), STAGED, 4, mtp=True, stages=text)
    assert layout.decoder_layers(STAGED.num_hidden_layers) == layers
    assert [word for stage in layout.stages for word in stage] == ["embedding", *["decoder"] * 5, "mtp", "loss"]


@pytest.mark.parametrize(
    ("text", "sizes", "says"),
    [
        ("Ettt|tmL", {"pp": 2}, "has 4 layers, the model 5"),
        ("Ett|ttt|mL", {"pp": 2}, "has 3 stages, parallel.pp=2 x vpp=1 are 2"),
        ("Ettttt|L", {"pp": 2}, "has 0 of multi-token prediction, the model 1"),
        ("Ettttm|tL", {"pp": 2}, "is out of order"),
        ("Et*4tm|L", {"pp": 2}, "put m into L's stage"),
        ("tE*1tttt|mL", {"pp": 2}, "is out of order"),
        ("Exttttt|mL", {"pp": 2}, "has x:"),
        ("E(t*9999)*9999|mL", {"pp": 2}, "too many layers"),
        ("", {"pp": 2}, "has 1 stages"),
        ("EtttttmL", {}, "needs parallel.pp above 1"),
    ],
)
def test_a_layout_string_that_does_not_fit_is_one_line(text, sizes, says):
    with pytest.raises(ConfigError) as raised:
        resolve_layout(ParallelConfig(**sizes), STAGED, 2, mtp=True, stages=text)
    assert says in str(raised.value) and "\n" not in str(raised.value)
