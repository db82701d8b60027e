"""The GRPO loop (DeepSeek-R1, arXiv 2501.12948, section 2.1): R1-Zero and both RL stages of R1 run it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.algorithms.losses.contract import Metrics, PolicyBatch, PolicySettings, checked_result
from megatron_r1.algorithms.losses.registry import find_policy_loss
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.lengths import lengths_after
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.rewards.compose import describe_rewards
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Write
from megatron_r1.training.metrics import loss_metrics, mean_sampled_logprob, update_metrics
from megatron_r1.training.parity import ParityGate
from megatron_r1.training.protocols import Found, LossFn, Policy, PromptSource, Reference, Rewards, Stats
from megatron_r1.training.samples import fill_logprobs, find_nonfinite, plan_epochs, to_training_samples, with_logprobs
from megatron_r1.types import MicroBatch, RolloutGroup, Sampling, TrainingSample, filled


def train_grpo(
    stage: GrpoConfig,
    rollout: RolloutConfig,
    *,
    policy: Policy,
    reference: Reference | None,
    engine: RolloutEngine,
    rewards: Rewards,
    prompts: PromptSource,
    run: Run,
    save: Write,
    evaluate: Callable[[int], dict[str, float]],
    seed: int,
) -> None:
    """Train until `stage.rollouts` rounds are done, going on where `run` left off.

    One step of the run is one rollout round: sample, score, then several policy updates, each on another minibatch.

    Args:
        reference: None unless `stage.has_reference`.
        rewards: scores every group where it was sampled, from the moment it is.
        save: writes policy and reference, as `Run.checkpoint` takes it.
        evaluate: held-out metrics of a step; empty if none are due.

    Raises:
        WeightSyncError: the engine does not hold, or does not reproduce, the trainer's policy.
        NonFiniteUpdate: see `runtime.skip_nonfinite_updates`.
    """
    policy.offload()
    engine.load_weights(policy.shards(), version=policy.updates)
    if run.step == 0:
        run.record(0, evaluate(0))
    for step in run.steps(stage.rollouts, "GRPO"):
        lengths = lengths_after(stage, rollout, policy.updates)
        policy.micro_batch_tokens = lengths.micro_batch_tokens
        sampling = Sampling(stage.group_size, rollout.temperature, rollout.top_p, lengths.max_response_tokens)
        with run.timer("rollout"):
            batch = prompts.next(stage.prompts_per_rollout)
            own = engine.generate(batch, sampling, seed=_derive_seed(seed, step), on_group=rewards.submit)
            sampled = engine.metrics()
            engine.sleep()
        with run.timer("reward"):
            groups = rewards.collect(own, batch)  # what other ranks sampled: lengths and rewards alone
            if stage.shuffle_rewards:
                shuffle_rewards(groups, seed=f"{seed}/{step}")
            for group in groups:
                group.advantages_G = group_advantages(filled(group.rewards_G), stage.advantage_std, group.reward_magnitude)
        with run.timer("logprob"):
            samples = to_training_samples(groups)
            epochs = plan_epochs(len(samples), stage.minibatch_size, f"{seed}/{step}", stage.inner_epochs)
            samples = policy.place(samples, epochs[0])
            # A round's only update computes the policy's log-probs anyway, and compares them before it changes anything; where both
            # models' weights fit, the reference goes through its micro-batches with it.
            is_alone = stage.updates_per_rollout == 1
            rider = reference if is_alone and reference is not None and reference.fits_beside() else None
            if not is_alone:
                samples = with_logprobs(samples, policy, reference)
            elif reference is not None and rider is None:
                minibatch = [samples[i] for i in epochs[0][0]]  # in its order, so that it is packed as the update packs it
                fill_logprobs(minibatch, "ref_logprobs", reference.logprobs(minibatch))
        parity = ParityGate(rollout, sampled_by=groups[0].weights_version, trainer=policy.updates)
        if not is_alone:
            parity.check(samples, policy.reports)
        with run.timer("train"):
            stats = []
            for numbers in epochs:
                samples = policy.place(samples, numbers)
                stats += [update_policy(stage, policy, [samples[i] for i in batch], parity, rider) for batch in numbers]
        with run.timer("sync"):
            policy.check_weights()
            policy.offload()
            engine.load_weights(policy.shards(), version=policy.updates)
        if reference and is_due(policy.updates, len(stats), stage.reference_update_interval):
            reference.refresh()
        with run.timer("evaluate"):
            held_out = evaluate(step)
        run.count_tokens("rollout", sum(len(r.token_ids) for g in groups for r in g.rollouts))
        run.count_tokens("train", stage.inner_epochs * sum(s.num_targets for s in samples))
        run.count_flops(sum(update.flops for update in stats))
        run.save_rollouts(step, groups, samples)
        batches = [[samples[i] for i in batch] for numbers in epochs for batch in numbers]
        metrics = batch_metrics(groups, batches, stats) | sampled | parity.found.metrics(rollout)
        run.record(step, {**metrics, "updates": policy.updates, **held_out})
        if run.checkpoint_due(step, stage.rollouts):
            run.checkpoint(step, save, {"prompts": prompts.state_dict()})
        del own, groups, samples, batches  # or they would take their memory until the next round's are there


def update_policy(
    stage: GrpoConfig, policy: Policy, minibatch: list[TrainingSample], parity: ParityGate, rider: Reference | None = None
) -> Stats:
    """One update on the minibatch, which is left out if something in it is not finite, which every rank sees alike.

    Samples without the policy's log-probs get those of the update's own forward pass, which must pass the gate before the update.

    Args:
        rider: the reference, if samples have neither the policy's log-probs nor its own: they get them in the same walk.
    """

    def look(found: Found) -> str | None:
        problem = None
        if rider is not None:
            fill_logprobs(minibatch, "ref_logprobs", found["ref_logprobs"])
            problem = find_nonfinite(minibatch, policy.reports)
        fill_logprobs(minibatch, "old_logprobs", found["old_logprobs"])
        parity.check(minibatch, policy.reports)
        return problem

    gate = look if minibatch[0].old_logprobs is None else None
    problem = find_nonfinite(minibatch, policy.reports)
    if problem is None:
        return policy.train_step(minibatch, loss_of(stage, minibatch), gate, rider)
    if rider is not None:
        policys, references = rider.logprobs_of_both(minibatch)
        look({"old_logprobs": policys, "ref_logprobs": references})
    elif gate is not None:
        gate({"old_logprobs": policy.logprobs(minibatch)})
    return policy.skip_update(problem)


def loss_of(stage: GrpoConfig, minibatch: list[TrainingSample]) -> LossFn:
    """The loss that `stage.loss` names, with the settings of the stage and the denominators of this minibatch."""
    loss = find_policy_loss(stage.loss)
    settings = PolicySettings(stage.clip_eps, stage.kl_coef, stage.normalization, stage.importance_cap)
    tokens = sum(s.num_trained for s in minibatch)

    def compute(logprobs: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        fields = micro_batch.token_fields
        batch = PolicyBatch(
            logprobs=logprobs,
            old_logprobs=fields.get("old_logprobs", logprobs.detach()),
            rollout_logprobs=fields["rollout_logprobs"],
            ref_logprobs=fields.get("ref_logprobs"),
            advantages=fields["advantages"],
            loss_mask=micro_batch.loss_mask,
            sequence_ids=micro_batch.sequence_numbers(),
            sequence_lengths=fields["sequence_lengths"],
            num_sequences=len(micro_batch.sample_ids),
            minibatch_sequences=len(minibatch),
            minibatch_tokens=tokens,
        )
        return checked_result(loss(batch, settings), stage.loss)

    return compute


def is_due(updates: int, new_updates: int, interval: int) -> bool:
    """Whether the last `new_updates` of `updates` policy updates passed a multiple of `interval`; 0: never."""
    return bool(interval) and updates // interval > (updates - new_updates) // interval


def shuffle_rewards(groups: list[RolloutGroup], seed: str) -> None:
    """Permute rewards over the whole batch: a control experiment in which a reward says nothing about its response."""
    rewards = torch.cat([filled(g.rewards_G) for g in groups])
    order = list(range(len(rewards)))
    random.Random(seed).shuffle(order)
    magnitude = max(g.reward_magnitude for g in groups)
    for group, part in zip(groups, rewards[order].split([len(g.rollouts) for g in groups]), strict=True):
        group.rewards_G, group.reward_magnitude = part, magnitude


def batch_metrics(groups: list[RolloutGroup], batches: list[list[TrainingSample]], stats: list[Stats]) -> dict[str, float]:
    """The step's metrics that come from the groups and the updates, one on each batch."""
    rollouts = [r for g in groups for r in g.rollouts]
    trained = [sample for batch, update in zip(batches, stats, strict=True) if update.applied for sample in batch]
    applied = [update for update in stats if update.applied]
    reported = loss_metrics(applied, tokens=sum(s.num_trained for s in trained), samples=len(trained))
    return {
        **describe_rewards(groups),
        "reward/zero_variance_groups": _average([float(not filled(g.advantages_G).any()) for g in groups]),
        "response_length/mean": _average([len(r.token_ids) for r in rollouts]),
        "response_length/max": max(len(r.token_ids) for r in rollouts),
        "response/finished": _average([float(r.finished) for r in rollouts]),
        "kl/reference": reported.pop("kl/reference", 0.0 if applied else math.nan),
        **reported,
        "entropy/sampled": -mean_sampled_logprob(groups),
        **update_metrics(stats[-1]),
        "loss": _average([s.loss for s in applied]),
        "grad_norm": _average([s.grad_norm for s in applied]),
    }


def _average(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _derive_seed(seed: int, step: int) -> int:
    return random.Random(f"rollout/{seed}/{step}").getrandbits(31)
