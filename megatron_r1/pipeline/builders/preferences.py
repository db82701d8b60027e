"""A trained reward model as a scorer: which part of a response it reads, batches, and the rewards of general prompts.

"R1 v1" and "R1 v2" are the versions of DeepSeek-R1 (arXiv 2501.12948).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np

from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import find_architecture
from megatron_r1.data.chat.messages import Message, Role
from megatron_r1.data.chat.template import encode_chat
from megatron_r1.data.preferences import LabelledDialogues
from megatron_r1.data.reward_packing import ScoredExample
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.builders.models import build_reward_model, build_tokenizer, require_weights
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.compose import Verdicts
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.runtime.distributed import any_rank, failing_together
from megatron_r1.tags import find_summary, whole_response
from megatron_r1.training.reward_model import RewardModel
from megatron_r1.types import PREFERENCES, Prompt, RolloutGroup

_CUT = Verdict(0.0, "wrong", "cut at the length limit")


def scored_part(kind: str, response: str) -> str | None:
    """What a reward model reads: for helpfulness the final summary, for safety the whole response (R1 v1 section 2.3.4).

    None: there is no summary. An empty response is scored as it is: published pairs hold some.

    Raises:
        ConfigError: a reward model of another kind.
    """
    if kind not in ("helpful", "safety"):
        raise ConfigError(f"a reward model for {kind!r} does not say which part of a response it scores: helpful or safety does")
    return find_summary(response) if kind == "helpful" and response.strip() else response


def encode_examples(examples: Sequence[LabelledDialogues], stage: RewardModelConfig, tokenizer: Tokenizer) -> list[ScoredExample]:
    """The examples as the reward model is trained on them.

    Raises:
        DataError: file and line of a response that is too long or has no summary to score.
    """
    encoded = []
    for example in examples:
        sequences = []
        for dialogue in example.dialogues:
            part = scored_part(stage.kind, dialogue.response)
            if part is None:
                raise DataError(
                    f"{example.where}: nothing follows the reasoning of a response, and helpfulness is judged by that alone"
                )
            sequences.append(encode_chat(tokenizer, dialogue.messages, part))
        scored = ScoredExample(tuple(sequences), example.safe, example.where)
        for limit, name, found in (
            (stage.max_tokens, "max_tokens", max(map(len, sequences))),
            (stage.micro_batch_tokens, "micro_batch_tokens", scored.num_tokens),
        ):
            if found > limit:
                raise DataError(
                    f"{example.where}: {found} tokens are more than reward_model.{name}={limit}; raise it or remove the example"
                )
        encoded.append(scored)
    return encoded


class RewardScorer:
    """Scores responses in batches. All ranks call it together, each with its own responses."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, kind: str) -> None:
        """Args: `kind` is "helpful" or "safety", as the model was trained."""
        scored_part(kind, "")
        self._model, self._tokenizer, self._kind = model, tokenizer, kind

    def score(self, responses: Sequence[tuple[Sequence[Message], str]]) -> list[float | None]:
        """r_phi of each (conversation, response); None for the helpfulness of a response without a summary.

        Helpfulness has no unit: higher is better. Safety is a logit: above 0 is safe, and its sigmoid is the probability.

        Raises:
            DataError: a conversation with its response has more tokens than the model has positions.
        """
        parts = [scored_part(self._kind, response) for _, response in responses]
        pairs = zip(responses, parts, strict=True)
        with failing_together():
            sequences = [
                np.array(encode_chat(self._tokenizer, messages, part), np.int32)
                for (messages, _), part in pairs
                if part is not None
            ]
        scores = iter(self._model.own_scores(sequences))
        return [None if part is None else next(scores) for part in parts]


def load_reward_scorer(config: Config, session: Session, kind: str | None = None, *, rests_on_host: bool = False) -> RewardScorer:
    """The reward model in `model.weights` (a Hugging Face folder, a run or one of its checkpoints), ready to score.

    Args:
        kind: what the reward model must have been trained for; None: anything.
        rests_on_host: it is on the device while it scores, and on the host otherwise.

    Raises:
        ConfigError: `model.weights` is not set, is no reward model or one of another kind; or the layout does not fit.
        CheckpointError: it is missing, incomplete or corrupt.
    """
    weights = require_weights(config.model, "the folder of a reward model")
    arch = find_architecture(config.model)
    if kind is not None and arch.score_label not in (kind, None):
        raise ConfigError(f"{weights} is a reward model for {arch.score_label}, {kind} is needed")
    model = build_reward_model(config, session, label=None, optimizer=None, total_updates=0)
    if rests_on_host:
        model.rest_on_host()
    return RewardScorer(model, build_tokenizer(config.data, config.model, arch), arch.score_label or weights.name)


class PreferenceRewards:
    """The reward component "model" of general prompts: the reward model of a prompt's set scores the responses (R1 v2 section 3.1).

    Args:
        scorers: a prompt's `preference` -> its reward model.
    """

    def __init__(self, scorers: Mapping[str, RewardScorer]) -> None:
        self._scorers = scorers

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[Verdicts]:
        """{"model": verdicts [G]} for groups of general prompts, {} for others. All ranks call it, each with its own groups.

        Raises:
            ConfigError: there is no reward model for a prompt.
        """
        verdicts: list[Verdicts] = [{} for _ in groups]
        for preference in PREFERENCES:
            chosen = [
                i for i, group in enumerate(groups) if group.prompt.kind == "general" and group.prompt.preference == preference
            ]
            if not any_rank(bool(chosen))[0]:
                continue
            with failing_together():
                if chosen and preference not in self._scorers:
                    raise ConfigError(
                        f"prompt {groups[chosen[0]].prompt.id!r} is judged by reward.{preference}_model, which is not set"
                    )
            rollouts = [(groups[i].prompt, rollout) for i in chosen for rollout in groups[i].rollouts]
            responses = [(_asked_messages(prompt), whole_response(prompt.text, rollout.text)) for prompt, rollout in rollouts]
            scores = iter(self._scorers[preference].score(responses))
            for i in chosen:
                row = zip(groups[i].rollouts, [next(scores) for _ in groups[i].rollouts], strict=True)
                verdicts[i] = {"model": [_verdict(score) if rollout.finished else _CUT for rollout, score in row]}
        return verdicts


@contextmanager
def open_preferences(config: Config, session: Session) -> Iterator[PreferenceRewards | None]:
    """The reward models of the config for the block; None if `reward.model` is not "reward_models".

    With "reward_models" in `runtime.offload` at most one of them is on the device at a time.

    Raises:
        ConfigError: no folder is set, or a folder holds no reward model of its kind.
    """
    if config.reward.model != "reward_models":
        yield None
        return
    folders = {"helpful": config.reward.helpful_model, "safety": config.reward.safety_model}
    if not any(folders.values()):
        raise ConfigError("reward.model=reward_models needs reward.helpful_model, reward.safety_model or both")
    scorers = {}
    for kind, folder in folders.items():
        if folder is not None:
            model = config.model.model_copy(update={"weights": folder, "overrides": {}})
            data = config.data.model_copy(update={"tokenizer": None})
            _check_positions(config, kind, find_architecture(model).max_position_embeddings)
            scorers[kind] = load_reward_scorer(
                config.model_copy(update={"model": model, "data": data}),
                session,
                kind,
                rests_on_host="reward_models" in config.runtime.offload,
            )
    yield PreferenceRewards(scorers)


def _check_positions(config: Config, kind: str, positions: int) -> None:
    """A reward model that cannot read the longest response would end the run at the first one, hours after its start."""
    needed = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if needed > positions:
        raise ConfigError(
            f"reward.{kind}_model has {positions} positions, fewer than the {needed} tokens of a prompt with a response at its "
            "limit (data.max_prompt_tokens + rollout.max_response_tokens): lower the limits, or train one with more positions"
        )


def _asked_messages(prompt: Prompt) -> tuple[Message, ...]:
    return (*(Message(cast(Role, role), text) for role, text in prompt.context), Message("user", prompt.question))


def _verdict(score: float | None) -> Verdict:
    """sigmoid(r), so that a response which cannot be scored, and gets 0, is never better than one which can. "correct" above r = 0.

    The paper does not state how r is scaled beside the other rewards.
    """
    if score is None:
        return Verdict(0.0, "wrong", "nothing follows the reasoning")
    reward = 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))
    return Verdict(reward, "correct" if score > 0 else "wrong", f"r = {score:.4f}")
