"""Model FLOPs: against torch's count of a model that runs, and against what DeepSeek counts for V3."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.flops import Work, active_parameters, forward_flops, rows_of, update_flops
from megatron_r1.model.presets import PRESETS
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture, further_families, llama_architecture, qwen2_architecture

host.activate("cpu")

from megatron_r1.mcore import parallel, provider

ROWS, TOKENS = 2, 24
MODELS = {
    "deepseek_v3": full_architecture(mtp=2),
    "no experts are shared, queries are not compressed": full_architecture(mtp=0).model_copy(
        update={"n_shared_experts": 0, "q_lora_rank": None, "first_k_dense_replace": 0}
    ),
    "qwen2, tied": qwen2_architecture(tied=True),
    "qwen2": qwen2_architecture(tied=False),
    "llama": llama_architecture(),
    **further_families(),
}


def count_by_torch(arch: Architecture, *, mtp: bool, trunk: bool, backward: bool) -> int:
    one_rank_world()
    layout = parallel.Layout()
    parallel.build_process_groups(layout, seed=1)
    moe = MoeTrainingConfig(mtp_loss_scale=0.3 * mtp, mtp_trains_trunk=trunk)
    model = provider.build_model(arch, layout, RuntimeConfig(), moe, seed=1)[0]
    tokens = torch.randint(arch.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        if backward:
            loss.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", list(MODELS))
def test_an_update_as_torch_counts_it(name: str) -> None:
    arch = MODELS[name]
    # torch counts the upper half of the scores, too, which causal attention does not need
    work = Work(ROWS * TOKENS, ROWS * TOKENS * TOKENS, ROWS * TOKENS)
    for trunk in (True, False) if arch.mtp_depth else (True,):
        mtp = arch.mtp_depth > 0
        assert update_flops(arch, work, mtp=mtp, mtp_trains_trunk=trunk) == count_by_torch(
            arch, mtp=mtp, trunk=trunk, backward=True
        )


def test_the_forward_pass_and_a_head_that_is_not_trained() -> None:
    arch = MODELS["deepseek_v3"]
    work = Work(ROWS * TOKENS, ROWS * TOKENS * TOKENS, ROWS * TOKENS)
    assert forward_flops(arch, work) == count_by_torch(arch, mtp=False, trunk=True, backward=False)
    assert update_flops(arch, work) == 3 * forward_flops(arch, work)


def test_causal_rows() -> None:
    assert rows_of(2, 3) == Work(tokens=6, pairs=2 * (1 + 2 + 3), predicted=6)


def test_what_is_published() -> None:
    v3 = PRESETS["671b"]
    assert round(update_flops(v3, rows_of(1, 4096)) / 4096 / 1e9) == 250  # arXiv 2505.09343, table 2
    assert 37.0e9 < active_parameters(v3) < 38.0e9  # "37B activated for each token", V3's abstract
    assert 3.3e9 < active_parameters(PRESETS["qwen3_30b_a3b"]) < 3.4e9  # "3.3B activated", its model card
    reward = PRESETS["qwen2.5_14b"].as_reward_model("helpful")
    head = 3 * 2 * reward.hidden_size * (reward.vocab_size - 1)
    assert update_flops(PRESETS["qwen2.5_14b"], rows_of(1, 1)) - update_flops(reward, rows_of(1, 1)) == head
