"""A trained reward model as a scorer: which part of a response it is given, batches, and the general route of the rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from megatron_r1.config.schema import Config, RewardModelConfig
from megatron_r1.data.chat import Message, encode_chat
from megatron_r1.data.preferences import JudgedDialogues
from megatron_r1.data.reward_packing import ScoredExample
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.build import build_reward_model, build_tokenizer, find_architecture
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.tags import find_summary
from megatron_r1.runtime.distributed import broadcast_object, world_size
from megatron_r1.training.reward_model import RewardModel
from megatron_r1.types import Prompt, Rollout


def scored_part(kind: str, response: str) -> str | None:
    """Helpfulness is judged by the final summary alone, safety by the whole response (v1 section 2.3.4); None: there is no summary.

    A response without a word is scored as such: published pairs have them.

    Raises:
        ConfigError: a reward model of another kind.
    """
    if kind not in ("helpful", "safety"):
        raise ConfigError(f"a reward model for {kind!r} does not tell which part of a response it scores: helpful or safety does")
    return find_summary(response) if kind == "helpful" and response.strip() else response


def encode_examples(examples: Sequence[JudgedDialogues], stage: RewardModelConfig, tokenizer: Tokenizer) -> list[ScoredExample]:
    """The examples as the reward model is trained on them.

    Raises:
        DataError: file and line of a response that is too long, or of which there is nothing to score.
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
        scored = ScoredExample(tuple(sequences), example.safe)
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
    """Scores responses in batches. All ranks call it with the same responses and get the same scores."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, kind: str) -> None:
        """Args: `kind` is "helpful" or "safety", as the model was trained."""
        scored_part(kind, "")
        self._model, self._tokenizer, self._kind = model, tokenizer, kind

    def score(self, responses: Sequence[tuple[Sequence[Message], str]]) -> list[float | None]:
        """r_phi of each (conversation, response); None where helpfulness is asked of a response without a summary.

        Any number, of any length that the model has positions for. Helpfulness: higher is better, on a scale of its own. Safety:
        above 0 is safe, the sigmoid is the probability.

        Raises:
            DataError: a conversation with its response has more tokens than the model has positions.
        """
        parts = [scored_part(self._kind, response) for _, response in responses]
        pairs = zip(responses, parts, strict=True)
        sequences = [encode_chat(self._tokenizer, messages, part) for (messages, _), part in pairs if part is not None]
        scores = iter(self._model.scores(sequences))
        return [None if part is None else next(scores) for part in parts]


def load_reward_scorer(config: Config, session: Session) -> RewardScorer:
    """The reward model in `model.weights` (a Hugging Face folder, a run or one of its checkpoints), ready to score.

    Raises:
        ConfigError: it is no reward model, or the layout does not fit.
        CheckpointError: it is missing, incomplete or corrupt.
    """
    if config.model.weights is None:
        raise ConfigError("model.weights is not set: give the folder of a reward model")
    arch = find_architecture(config)
    model = build_reward_model(config, session, label=None, optimizer=None, total_updates=0)
    return RewardScorer(model, build_tokenizer(config, arch), arch.score_label or Path(config.model.weights).name)


class ModelRewards:
    """The model component of general prompts (`rewards.compose.ModelReward`): responses wait until one's verdict is asked for, and are
    then scored together.

    On one rank nothing else is to be done. In a job of several, where rank 0 alone composes rewards and scoring is collective, all
    ranks call `flush` before rank 0 asks for a verdict.
    """

    def __init__(self, scorer: RewardScorer) -> None:
        self._scorer = scorer
        self._waiting: list[tuple[Prompt, Rollout, Future[Verdict]]] = []

    def __call__(self, prompt: Prompt, rollout: Rollout) -> Future[Verdict]:
        """Queue one response."""
        future = _WaitingVerdict(self)
        self._waiting.append((prompt, rollout, future))
        return future

    def flush(self) -> None:
        """Score everything that waits on rank 0. Collective."""
        waiting, self._waiting = self._waiting, []
        responses = broadcast_object([((Message("user", prompt.question),), rollout.text) for prompt, rollout, _ in waiting])
        try:
            scores = self._scorer.score(responses)
        except Exception as error:
            for _, _, future in waiting:
                future.set_exception(error)
            raise
        if waiting:
            for (_, _, future), score in zip(waiting, scores, strict=True):
                future.set_result(_verdict(score))


class _WaitingVerdict(Future[Verdict]):
    def __init__(self, rewards: ModelRewards) -> None:
        super().__init__()
        self._rewards = rewards

    def result(self, timeout: float | None = None) -> Verdict:
        if not self.done():
            assert world_size() == 1, "several ranks score together: all of them call flush first"
            self._rewards.flush()
        return super().result(timeout)


def _verdict(score: float | None) -> Verdict:
    """sigmoid(r), so that a response which cannot be scored, worth 0, is never better than one that can; how the paper scales r
    beside the other rewards is not stated. "correct" from r = 0."""
    if score is None:
        return Verdict(0.0, "wrong", "nothing follows the reasoning")
    reward = 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))
    return Verdict(reward, "correct" if score > 0 else "wrong", f"r = {score:.4f}")
