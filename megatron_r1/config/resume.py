"""What a run that goes on, stopped or finished, may have other settings of than it began with.

Every setting is of one kind:

    free      it does not change the result: the field is marked with `section.MAY_CHANGE`
    moves     the path of data or of a model: its content counts, not where it stands (`INPUTS`)
    longer    how long training goes on (`LENGTHS`), and what follows from that
    onward    what is done from the next round or update on (`ONWARD`); a finished run has none
    stays     it defines the result; `STAYS` says how

A setting in none of these lists stays, too; tests/unit/test_floors.py lets no setting be forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.keys import is_within, keys_that_may_change, known_keys
from megatron_r1.config.load import flatten_config
from megatron_r1.config.phases import are_longer, follow_schedule
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError

Kind = Literal["free", "moves", "longer", "onward", "stays"]

COMMON = ("run_dir", "seed", "model", "parallel", "runtime", "megatron", "data")  #: sections that every training command reads
#: training command -> the sections it reads: others may change between two starts of its run
READ_BY: Mapping[str, tuple[str, ...]] = {
    "pretrain": (*COMMON, "pretrain", "rollout", "reward", "evaluate", "checkpoint"),
    "sft": (*COMMON, "sft", "checkpoint"),
    "reward-model": (*COMMON, "reward_model", "checkpoint"),
    "grpo": (*COMMON, "grpo", "rollout", "reward", "evaluate", "checkpoint"),
}
#: training command -> (how long it trains, its optimizer)
LENGTHS: Mapping[str, tuple[str, str]] = {
    "pretrain": ("pretrain.steps", "pretrain.optimizer"),
    "sft": ("sft.epochs", "sft.optimizer"),
    "reward-model": ("reward_model.epochs", "reward_model.optimizer"),
    "grpo": ("grpo.rollouts", "grpo.optimizer"),
}
_PHASES = "pretrain.phases"
LONGER = frozenset({*(length for length, _ in LENGTHS.values()), _PHASES, "grpo.general_updates", "*.optimizer.decay_updates"})
ONWARD = frozenset({"rollout.max_response_tokens", "grpo.length_schedule", "*.optimizer.skip_grad_norm"})
INPUTS = frozenset(
    {"model.weights", "data.source", "data.tokenizer", "data.general_source", "data.evaluation_source", "data.blend", "sft.sources",
     "reward.helpful_model", "reward.safety_model"}
)  # fmt: skip
#: sections that no run with checkpoints reads: curation, evaluation and the recipe compare what they keep themselves
NOT_OF_A_RUN = ("curation", "recipe", "evaluate.benchmarks")
_LISTS = ("data.blend", "sft.sources")  # of inputs with weights
GENERATED = ("tally", "tally_chat")  #: values of `data.source` and `data.general_source` that are no path

#: why they must stay -> settings; `*` stands for every training stage
STAYS: Mapping[str, str] = {
    "all random draws follow from it": "seed",
    "it says what the model is": "model.preset model.overrides runtime.dtype megatron.fp8 megatron.fp8_recipe",
    "it says what is trained on, and in which order": """
        data.question_field data.answer_field data.text_field data.answer_format data.template data.general_share
        data.template_arguments data.system_prompt data.question_prefix data.question_suffix
        data.repeated data.overlong data.heldout_fraction data.split pretrain.sequence_length pretrain.mask_documents
        pretrain.fill_in_middle_rate
        sft.max_tokens sft.overlong sft.invalid
        sft.prompt_field sft.response_field sft.trained_turns
        sft.validation_fraction reward_model.kind reward_model.max_tokens
    """,
    "it says what an update does": """
        pretrain.global_batch_size sft.batch_size reward_model.batch_size grpo.prompts_per_rollout grpo.group_size
        grpo.minibatch_size grpo.inner_epochs grpo.loss grpo.clip_eps grpo.kl_coef grpo.normalization grpo.advantage_std
        grpo.importance_cap grpo.reference_update_interval grpo.freeze_router grpo.shuffle_rewards
        *.optimizer.lr *.optimizer.min_lr_ratio *.optimizer.warmup_steps *.optimizer.schedule *.optimizer.beta1 *.optimizer.beta2
        *.optimizer.wsd_decay_updates *.optimizer.wsd_decay_shape
        *.optimizer.eps *.optimizer.weight_decay *.optimizer.clip_grad
        megatron.exp_avg_dtype megatron.exp_avg_sq_dtype
        *.moe.bias_update_rate *.moe.aux_loss_coeff *.moe.mtp_loss_scale *.moe.mtp_trains_trunk
    """,
    "the average is part of every checkpoint, or of none": "pretrain.ema_decay",
    "the reference is part of every checkpoint, or of none": "grpo.measure_kl",
    "it says when training ends": "pretrain.gate_accuracy pretrain.gate_problems pretrain.gate_extra_steps",
    "it says which responses are sampled": "rollout.temperature rollout.top_p rollout.stop",
    "it says what a response is worth": """
        reward.accuracy_weight reward.format_weight reward.language_weight reward.model_weight reward.model reward.answer_location
        reward.format reward.format_pattern
        reward.length_penalty_weight reward.length_penalty_max_tokens reward.length_penalty_cache_tokens
        reward.repetition_penalty_weight reward.repetition_ngram reward.unscored_value reward.custom reward.domains
        reward.math.percent reward.math.units reward.math.rounding reward.math.list_order reward.math.several_answers
        reward.math.sentences reward.language.min_words reward.language.aside_words
        reward.code.language reward.code.float_tolerance reward.code.partial_credit
        reward.judge.model reward.judge.temperature reward.judge.seed reward.judge.json_schema
    """,
    "a program beyond it is wrong, so it is part of the reward": """
        reward.code.cpu_seconds reward.code.wall_seconds reward.code.memory_mb reward.code.output_mb reward.code.stack_mb
        reward.code.recursion_depth reward.code.program_seconds reward.code.most.cpu_seconds reward.code.most.wall_seconds
        reward.code.most.memory_mb reward.code.most.output_mb reward.code.most.stack_mb reward.code.most.recursion_depth
    """,
}
_REASONS = {name: reason for reason, names in STAYS.items() for name in names.split()}
_SHOWN = 5  # differences in an error


def kind_on_resume(key: str) -> Kind:
    """Of which kind a setting is."""
    if key in keys_that_may_change():
        return "free"
    if key in INPUTS:
        return "moves"
    names = {key, _of_every_stage(key)}
    if names & ONWARD:
        return "onward"
    return "longer" if names & LONGER else "stays"


def reason_to_stay(key: str) -> str:
    """How a setting that stays defines the result; "" for one that nobody has put into a list."""
    return _REASONS.get(key) or _REASONS.get(_of_every_stage(key), "")


def unsorted_keys() -> list[str]:
    """The settings that a run reads and that stand in no list of this module, or in two."""

    def places(key: str) -> int:
        names = {key, _of_every_stage(key)}
        lists = (INPUTS, ONWARD, LONGER)
        return sum((key in keys_that_may_change(), *(bool(names & entries) for entries in lists), bool(reason_to_stay(key))))

    return [key for key in known_keys() if not is_within(key, NOT_OF_A_RUN) and places(key) != 1]


def input_paths(config: Config, command: str) -> dict[str, str]:
    """The data and models that a run of this command is made from: setting -> path. An entry of a list has its number."""
    return {key: value for key, value in _inputs(config, command) if value is not None and not _is_generated(key, value)}


def check_settings(
    before: Config, now: Config, command: str, where: str, *, updates_per_epoch: float | None = None, finished: bool = False
) -> bool:
    """Compare the settings of a run with those it is to go on with. Paths of inputs are not compared: `runtime.inputs` does it.

    Args:
        where: begins the message, e.g. "run_dir X was started with".
        updates_per_epoch: of a command that counts epochs; None if it is not known.
        finished: whether the run is at its end, so that unless it is to be longer nothing comes that `ONWARD` could change.

    Returns:
        Whether the run is to be longer or shorter than it was.

    Raises:
        ConfigError: one line that names every setting that must stay, or what a longer run has to be told.
    """
    sections = READ_BY.get(command, tuple(Config.model_fields))
    old, new = flatten_config(before), flatten_config(now)
    changed = [key for key in old if is_within(key, sections) and (key not in new or old[key] != new[key])]
    other_length = _changed_length(before, now, command, where, changed)
    is_other_length = other_length is not None
    fixed = ("stays", "onward") if finished and not is_other_length else ("stays",)
    stays = [key for key in changed if kind_on_resume(key) in fixed or _changes_its_input(key, old[key], new[key])]
    if stays:
        told = ", and ".join(f"{key}={old[key]!s:.200}, now it is {new[key]!s:.200}" for key in stays[:_SHOWN])
        more = f", and {len(stays) - _SHOWN} more" if len(stays) > _SHOWN else ""
        reason = reason_to_stay(stays[0]) if len(stays) == 1 else ""
        kept = "value" if len(stays) == 1 else "values"
        raise ConfigError(f"{where} {told}{more}: {f'{reason}; ' if reason else ''}keep the {kept}, or choose another run_dir")
    if command not in LENGTHS:
        return False
    _check_length(before, now, command, where, updates_per_epoch, other_length)
    return is_other_length


def require_longer(before: Config, now: Config, command: str, where: str) -> None:
    """Raises ConfigError if a run of this command is to be shorter than it was."""
    length, _ = LENGTHS[command]
    if _has_phases(before, now, command):
        return  # `are_longer` has looked
    old, new = flatten_config(before)[length], flatten_config(now)[length]
    if new < old:
        raise ConfigError(f"{where} {length}={old}, now it is {new}: keep the value, raise it, or choose another run_dir")


def first_general_rollout(stage: GrpoConfig) -> int:
    """The round from which general prompts come: the last `general_updates` have them."""
    return max(0, stage.rollouts - math.ceil(stage.general_updates / stage.updates_per_rollout))


def _has_phases(before: Config, now: Config, command: str) -> bool:
    return command == "pretrain" and bool(before.pretrain.phases or now.pretrain.phases)


def _changed_length(before: Config, now: Config, command: str, where: str, changed: Sequence[str]) -> str | None:
    """The setting that says how long training goes on, if it is another now. Raises ConfigError for other phases."""
    if _has_phases(before, now, command):
        return _PHASES if are_longer(before.pretrain, now.pretrain, where) else None
    length = LENGTHS[command][0] if command in LENGTHS else ""
    return length if length in changed else None


def _check_length(
    before: Config, now: Config, command: str, where: str, updates_per_epoch: float | None, other_length: str | None
) -> None:
    """Args: `other_length`: see `_changed_length`."""
    length, optimizer = LENGTHS[command]
    old, new = flatten_config(before), flatten_config(now)
    decay = f"{optimizer}.decay_updates"
    scheduled = new[f"{optimizer}.schedule"] != "constant" and (command != "pretrain" or follow_schedule(now.pretrain))
    if other_length is None:
        if old[decay] != new[decay]:
            length = _PHASES if _has_phases(before, now, command) else length
            raise ConfigError(
                f"{where} {decay}={old[decay]}, now it is {new[decay]}: it changes only together with {length}; keep the value, or "
                "choose another run_dir"
            )
    elif scheduled and new[decay] is None:
        told, ends = f"{_PHASES} that now are longer", ["", ""]
        if other_length != _PHASES:
            updates = {"grpo": now.grpo.updates_per_rollout, "pretrain": 1}.get(command, updates_per_epoch)
            told = f"{length}={old[length]}, now it is {new[length]}"
            ends = [f"={round(tree[length] * updates)}" if updates else "" for tree in (old, new)]
        raise ConfigError(
            f"{where} {told}, and a {new[f'{optimizer}.schedule']} schedule must be told "
            f"how to go on: set {decay}{ends[0] or ' to the updates it fell over'} to keep the rate that it fell to, or "
            f"{decay}{ends[1] or ' to those of the whole run'} to let it fall over the whole run"
        )
    if command == "grpo" and now.data.general_source is not None:
        first = first_general_rollout(before.grpo)
        if first_general_rollout(now.grpo) != first:
            raise ConfigError(
                f"{where} grpo.rollouts={before.grpo.rollouts} and general prompts from round {first + 1} on, which would now "
                f"begin elsewhere: set grpo.general_updates={(now.grpo.rollouts - first) * now.grpo.updates_per_rollout}"
            )


def _changes_its_input(key: str, before: Any, now: Any) -> bool:
    """Whether more than the path of an input is another: there is none, or a generated one; other weights of the sources."""
    if kind_on_resume(key) != "moves":
        return False
    if key in _LISTS:
        return [source | {"path": ""} for source in before] != [source | {"path": ""} for source in now]
    return before is None or now is None or _is_generated(key, before) or _is_generated(key, now)


def _inputs(config: Config, command: str) -> Iterator[tuple[str, str | None]]:
    sections = READ_BY.get(command, tuple(Config.model_fields))
    for key, value in flatten_config(config).items():
        if not is_within(key, sections):
            continue
        if key == _PHASES:
            for number, phase in enumerate(value):
                yield from _token_files(f"{key}.{number}.blend", phase["blend"])
        if key not in INPUTS:
            continue
        if key == "sft.sources":
            yield from ((f"{key}.{number}", source["path"]) for number, source in enumerate(value))
        elif key == "data.blend":
            if command == "pretrain":
                yield from _token_files(key, value)
        elif not (key == "data.source" and command == "sft" and config.sft.sources):
            yield key, value


def _token_files(key: str, blend: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    return ((f"{key}.{i}{end}", source["path"] + end) for i, source in enumerate(blend) for end in (".idx", ".bin"))


def _is_generated(key: str, value: str) -> bool:
    return key in ("data.source", "data.general_source") and value in GENERATED


def _of_every_stage(key: str) -> str:
    """`grpo.optimizer.lr` -> `*.optimizer.lr`."""
    return f"*.{key.partition('.')[2]}"
