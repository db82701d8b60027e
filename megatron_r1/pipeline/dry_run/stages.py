"""What differs between the stages in a dry run: their checks, their layout, and how their batches fall into micro-batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_r1.config.lengths import for_longest_response, length_phases
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import require_language_model, reward_architecture
from megatron_r1.data.fill_in_middle import ADDED
from megatron_r1.data.sft import token_limit
from megatron_r1.data.token_files import open_token_file
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import resolve_policy_layout
from megatron_r1.pipeline.builders.pretrain_rows import require_row, split_documents
from megatron_r1.pipeline.builders.rewards import check_custom_rewards
from megatron_r1.pipeline.dry_run.batches import idle_share, pack_lengths
from megatron_r1.pipeline.dry_run.found import Found, Rows
from megatron_r1.pipeline.stages.grpo import check_grpo
from megatron_r1.pipeline.stages.pretrain import check_phase, check_pretrain, phase_architecture, phase_layout
from megatron_r1.pipeline.stages.reward_model import check_reward_model
from megatron_r1.pipeline.stages.sft import check_sft
from megatron_r1.training.pretrain_plan import PretrainPlan


@dataclass(frozen=True)
class PlannedStage:
    """A training command as a dry run sees it."""

    check: Callable[[Config], None]  #: what the run checks at its start
    moe: Callable[[Config], MoeTrainingConfig]  #: how it trains router and multi-token prediction
    shape: Callable[[Config, Architecture], Architecture]  #: of the model that is trained, from the one that is found
    layout: Callable[[Config, Architecture, int], Layout]  #: on so many ranks
    batches: Callable[[Found], Rows]  #: how they are packed
    samples: Callable[[Config], Config | None]  #: the config that its engines are opened with; None: it has none
    packed: Callable[[Config], bool] = lambda config: True  #: whether micro-batches hold sequences of any length


def _grpo_batches(found: Found) -> Rows:
    stage, prompt = found.config.grpo, found.config.data.max_prompt_tokens
    outputs, updates = stage.prompts_per_rollout * stage.group_size, stage.updates_per_rollout
    round_of = f"{stage.prompts_per_rollout:,} prompts x {stage.group_size} = {outputs:,} outputs, {updates:,} updates"
    rows = [("round", f"{round_of} of {stage.minibatch_size:,}; {stage.rollouts:,} rounds, {stage.rollouts * updates:,} updates")]
    for phase in length_phases(stage, found.config.rollout):
        first, limit = math.ceil(phase.after_updates / updates) + 1, phase.max_response_tokens
        if first > stage.rollouts:
            rows.append(("look at", f"limits after {phase.after_updates:,} updates are not reached"))
            continue
        sample = f"prompt {prompt:,} + response {limit:,} - 1 = {prompt + limit - 1:,} tokens"
        rows.append((f"from {first:,}", f"{sample} of the {phase.micro_batch_tokens:,} of a forward pass"))
        for name, tokens in (("longest", limit), ("mean", found.job.mean_of(limit))):
            lengths = [prompt + tokens - 1] * stage.minibatch_size
            rows.append(("", f"{name} responses ({tokens:,}): {_packed(found.layout, lengths, phase.micro_batch_tokens)}"))
    return rows


def _sft_batches(found: Found) -> Rows:
    stage, limit = found.config.sft, token_limit(found.config.sft)
    rows = [("batch", f"{stage.batch_size:,} samples of at most {limit:,} tokens, {stage.micro_batch_tokens:,} in a forward pass")]
    for name, tokens in (("longest", limit), ("mean", found.job.mean_of(limit))):
        packed = _packed(found.layout, [tokens] * stage.batch_size, stage.micro_batch_tokens)
        rows.append(("", f"{name} samples ({tokens:,}): {packed}"))
    if limit > found.arch.max_position_embeddings:
        rows.append(("look at", f"samples may be longer than the model's {found.arch.max_position_embeddings:,} positions"))
    return rows


def _reward_model_batches(found: Found) -> Rows:
    stage = found.config.reward_model
    sequences = 2 if stage.kind == "helpful" else 1
    name = "pairs" if sequences == 2 else "responses"
    rows = [("batch", f"{stage.batch_size:,} {name} of at most {stage.max_tokens:,} tokens a response")]
    longest = sequences * stage.max_tokens
    if longest > stage.micro_batch_tokens:
        longest = stage.micro_batch_tokens
        rows.append(("look at", f"{name} of more tokens than reward_model.micro_batch_tokens={longest} are refused"))
    for what, tokens in (("longest", longest), ("mean", sequences * found.job.mean_of(longest // sequences))):
        packed = _packed(found.layout, [tokens] * stage.batch_size, stage.micro_batch_tokens)
        rows.append(("", f"{what} {name} ({tokens:,}): {packed}"))
    return rows


def _pretrain_batches(found: Found) -> Rows:
    config, rows = found.config, []
    plan = check_pretrain(config)
    for phase in plan.phases:
        arch = phase_architecture(found.arch, phase)
        layout = phase_layout(config, arch, phase, found.layout.world_size)
        counts = check_phase(config, phase, arch, layout)
        if config.pretrain.phases:
            tokens = f"{phase.tokens:,} tokens in {phase.updates:,} updates from {phase.first_update:,} on"
            rows.append((f"phase {phase.number}", f"{tokens}, cp {layout.cp}"))
        for level, count in list(zip(phase.levels, counts, strict=True))[:: max(1, len(counts) - 1)]:  # the first, the last
            sequences = f"{level.rows:,} sequences of {phase.sequence_length:,} tokens"
            on_ranks = f"{count:,} micro-batches of {phase.micro_batch_size:,} on each of {layout.dp} data-parallel rank(s)"
            label = "" if config.pretrain.phases else "batch"
            rows.append((label, f"{sequences}: {on_ranks}{_idle(idle_share(count, layout))}"))
    if config.pretrain.phases:
        rows.append(("in all", f"{plan.total_tokens:,} tokens in {plan.total_updates:,} updates"))
    return [*rows, *_describe_blends(config, plan)]


def _describe_blends(config: Config, plan: PretrainPlan) -> Rows:
    """The sources of all blends. Raises DataError if one that is here is not whole, or too short for a row."""
    stage, files = config.pretrain, {}
    rows: Rows = []
    blends = [(phase.settings.blend or config.data.blend, phase.sequence_length) for phase in plan.phases]
    for path in dict.fromkeys(source.path for blend in (config.data.blend, *(b for b, _ in blends)) for source in blend):
        if any(os.path.lexists(f"{path}{ending}") for ending in (".idx", ".bin", "")):
            files[path] = open_token_file(path)
            found = f"{files[path].documents:,} documents, {files[path].tokens:,} tokens"
        else:
            found = "is not here"
        rows.append(("" if rows else "blend", f"{path}: {found}"))
    for blend, length in blends:
        for path in (source.path for source in blend if source.path in files):
            parts = split_documents(files[path], config.data.split)
            for of_validation, documents in enumerate(parts if stage.validation.interval else parts[:1]):
                filled = 0 if of_validation or not stage.fill_in_middle_rate else ADDED * len(documents)  # at most
                tokens = files[path].tokens_of(documents) + filled
                require_row(path, len(documents), tokens, length, config.data.split, bool(of_validation))
    return rows


def _packed(layout: Layout, lengths: list[int], max_tokens: int) -> str:
    packing = pack_lengths(lengths, layout, max_tokens)
    on_ranks = f"{packing.micro_batches:,} micro-batches of {packing.width:,} on each of {layout.dp} data-parallel rank(s)"
    return f"{on_ranks}, {packing.filled:.0%} filled{_idle(packing.idle)}"


def _idle(share: float) -> str:
    return f", pipeline idle {share:.0%}" if share else ""


def _as_it_is(config: Config, arch: Architecture) -> Architecture:
    require_language_model(arch, config.model.weights)
    return arch


def _check_grpo(config: Config) -> None:
    check_grpo(config)
    check_custom_rewards(config.reward)


def _check_pretrain(config: Config) -> None:
    check_pretrain(config)
    check_custom_rewards(config.reward)


#: command -> what a dry run of it does
PLANNED: Mapping[str, PlannedStage] = {
    "pretrain": PlannedStage(
        _check_pretrain,
        lambda config: config.pretrain.moe,
        _as_it_is,
        lambda config, arch, size: resolve_policy_layout(config, arch, size, moe=config.pretrain.moe),
        _pretrain_batches,
        lambda config: config if config.pretrain.gate_accuracy else None,
        lambda config: config.pretrain.mask_documents,
    ),
    "sft": PlannedStage(
        check_sft,
        lambda config: config.sft.moe,
        _as_it_is,
        lambda config, arch, size: resolve_policy_layout(config, arch, size, moe=config.sft.moe),
        _sft_batches,
        lambda config: None,
    ),
    "reward-model": PlannedStage(
        check_reward_model,
        lambda config: config.reward_model.moe,
        lambda config, arch: reward_architecture(arch, config.model.weights, config.reward_model.kind),
        lambda config, arch, size: resolve_layout(config.parallel, arch, size, mtp=False),
        _reward_model_batches,
        lambda config: None,
    ),
    "grpo": PlannedStage(
        _check_grpo,
        lambda config: config.grpo.moe,
        _as_it_is,
        lambda config, arch, size: resolve_policy_layout(config, arch, size, moe=config.grpo.moe),
        _grpo_batches,
        for_longest_response,
    ),
}
