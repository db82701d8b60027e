"""Part 4: GRPO's update on recorded responses, a checkpoint written beside training, a kill, and a run that goes on exactly."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.gpu.hour.ground import Ground
from tests.gpu.hour.training import batch, build, opened


def run(ground: Ground) -> None:
    """Three updates, against three of which a killed process made the first."""
    from megatron_r1.mcore.checkpoint import load_policy
    from megatron_r1.mcore.policy import ReferencePolicy

    killed = ground.start("tests.gpu.hour.resume:be_killed").wait(ground.pick(60, 120))
    ground.check("the process was killed in its second update", killed == -signal.SIGKILL, f"exit code {killed}")
    checkpoint = Path(ground.folder, "step_000001")
    ground.check("its checkpoint is whole all the same", checkpoint.is_dir())
    with opened(ground.kind) as session:
        policy = build(session, "deepseek_v3")
        samples = recorded(policy, ReferencePolicy(policy))
        stats = [update(policy, samples) for _ in range(3)]
        ground.say("loss of three updates", " ".join(f"{s.loss:.6f}" for s in stats))
        whole = {name: weight.cpu().clone() for name, weight in policy.weights()}
        resumed = with_extra_state(build(session, "deepseek_v3"))
        reference = ReferencePolicy(resumed)
        load_policy(resumed, checkpoint, reference)
        ground.check("updates so far come back", resumed.updates == 1)
        for _ in range(2):
            update(resumed, samples)
        differing = [name for name, weight in resumed.weights() if not torch.equal(weight.cpu(), whole[name])]
        ground.check("the resumed run is equal to the bit", not differing, f"{len(differing)} tensors differ" if differing else "")


def be_killed(ground: Ground) -> None:
    """One update, a checkpoint written beside the next, and then no end that anybody prepared."""
    from megatron_r1.mcore.checkpoint import plan_policy
    from megatron_r1.mcore.policy import ReferencePolicy
    from megatron_r1.runtime.saving import PendingCheckpoint

    with opened(ground.kind) as session:
        policy = with_extra_state(build(session, "deepseek_v3"))
        reference = ReferencePolicy(policy)
        samples = recorded(policy, reference)
        update(policy, samples)
        started = time.perf_counter()
        PendingCheckpoint(
            Path(ground.folder), 1, lambda folder: plan_policy(policy, folder, reference), {}, asynchronous=True
        )  # fmt: skip
        ground.say("training waits for an asynchronous checkpoint", time.perf_counter() - started, "s")
        while not Path(ground.folder, "step_000001").is_dir():
            time.sleep(0.05)
        ground.say("the checkpoint is sealed after", time.perf_counter() - started, "s")
        update(policy, samples)
        os.kill(os.getpid(), signal.SIGKILL)


def with_extra_state(policy: Any) -> Any:
    """The policy, with the empty state that Transformer Engine's layers keep beside their weights: a stand-in for them here."""
    classes: dict[type, type] = {}
    # Embedding and output layer are Megatron-Core's own on a GPU, too.
    for layer in (layer for module in policy.modules for layer in module.decoder.modules()):
        if isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            kind = type(layer)
            state = {"get_extra_state": lambda self: torch.empty(0, dtype=torch.uint8), "set_extra_state": lambda self, state: None}
            layer.__class__ = classes.setdefault(kind, type(kind.__name__, (kind,), state))
    return policy


def recorded(policy: Any, reference: Any) -> list[Any]:
    """Samples with advantages, and log-probabilities as if an engine had sampled them."""
    _, samples = batch()
    old, ref = policy.logprobs(samples), reference.logprobs(samples)
    return [
        replace(sample, advantage=(-1.0) ** number, rollout_logprobs=o, old_logprobs=o, ref_logprobs=r, name=f"response {number}")
        for number, (sample, o, r) in enumerate(zip(samples, old, ref, strict=True))
    ]


def update(policy: Any, samples: list[Any]) -> Any:
    """One update of GRPO with a KL term."""
    from megatron_r1.config.schema import Config
    from megatron_r1.training.grpo import update_policy
    from megatron_r1.training.parity import ParityGate

    stage = Config().grpo.model_copy(update={"kl_coef": 0.001})
    gate = ParityGate(Config().rollout, sampled_by=policy.updates, trainer=policy.updates)
    return update_policy(stage, policy, samples, gate)
