"""Part 8: what the cross entropy takes beside its logits, at temperature 1 and at another."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.gpu.hour.ground import Ground
from tests.gpu.hour.training import opened


def run(ground: Ground) -> None:
    """The policy's own loss at the last stage: a share of V3's vocabulary at tp8, and Qwen2.5's whole one."""
    with opened(ground.kind):
        from megatron_r1.mcore import parallel

        parallel.build_process_groups(parallel.Layout(world_size=1), seed=0)
        for tokens, vocabulary in ground.pick(((32768, 16160), (32768, 151936)), ((64, 128),)):
            for temperature in (1.0, 0.7):
                _measure(ground, tokens, vocabulary, temperature)


def _measure(ground: Ground, tokens: int, vocabulary: int, temperature: float) -> None:
    from megatron.core import parallel_state

    from megatron_r1.mcore.gpt import R1GPTModel

    group = parallel_state.get_tensor_model_parallel_group()
    model = R1GPTModel.__new__(R1GPTModel)  # of the model its loss needs no more than this
    torch.nn.Module.__init__(model)
    model.logit_temperature, model.vocabulary = temperature, vocabulary
    model.pg_collection, model.config = SimpleNamespace(tp=group), SimpleNamespace(cross_entropy_loss_fusion=False)
    generator = torch.Generator(ground.device).manual_seed(0)
    made = torch.randn(tokens, 1, vocabulary, generator=generator, device=ground.device, dtype=torch.bfloat16)
    logits = made.requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens), generator=generator, device=ground.device)

    def loss() -> torch.Tensor:
        return R1GPTModel.compute_language_model_loss(model, labels, logits * 1.0)

    def work() -> None:
        loss().sum().backward()
        logits.grad = None

    what = f"[{tokens}, {vocabulary}] at temperature {temperature}"
    ground.say(f"{what}: logits", logits.nbytes / 1e9, "GB")
    ground.say_peak(f"{what}: peak of forward and backward beside them", work)
    ground.say(f"{what}: forward and backward", ground.seconds(work, times=1) * 1e3, "ms")
    few = slice(0, 64)
    exact = -(logits[few, 0].float() / temperature).log_softmax(-1).gather(1, labels[0, few, None])[:, 0]
    off = (loss()[0, few].float() - exact).abs().max().item()
    ground.check(f"{what}: is the exact one", off < 5e-2, f"off by {off:.1e}")
