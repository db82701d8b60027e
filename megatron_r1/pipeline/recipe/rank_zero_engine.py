"""The job's rollout engines for work that rank 0 does alone: rank 0 calls them, and the other ranks take part in each call.

Every call of a collective engine must be made on every rank, but rank 0 alone decides what is sampled for new data. So rank 0
broadcasts each call before making it, and the other ranks, which wait for rank 0 to finish, make the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1.config.schema import Config
from megatron_r1.pipeline.builders.engine_weights import load_engine
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer, require_weights
from megatron_r1.pipeline.session import Session
from megatron_r1.rollout.protocol import OnGroup, RolloutEngine
from megatron_r1.runtime.distributed import broadcast_object, failing_together, is_rank_zero
from megatron_r1.types import Prompt, RolloutGroup, Sampling

T = TypeVar("T")


class DrivenEngine:
    """All engines of the job, as rank 0 calls them. They sample, nothing else."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. `on_group` gets the groups of other ranks' engines at the end, all at once."""
        take = on_group or (lambda group: None)
        passed_on: set[int] = set()

        def pass_on(group: RolloutGroup) -> None:
            passed_on.add(id(group))
            take(group)

        _announce_call("generate", prompts, sampling, seed)
        groups = self._engine.generate(prompts, sampling, seed, pass_on)
        for group in groups:
            if id(group) not in passed_on:
                take(group)
        return groups


#: Opens the engines with the weights of a config's `model.weights`. The path is the log of the engines' output.
OpenEngine = Callable[[Config, Path], AbstractContextManager[DrivenEngine]]


def with_engines(session: Session, work: Callable[[OpenEngine], T]) -> T:
    """Run `work` on rank 0, and return its result, or raise its error, on every rank. All ranks call this."""
    if not is_rank_zero():
        return _take_part(session)
    try:
        result = work(partial(_open_driven, session))
    except Exception as error:
        _announce_call("done", None, error)
        raise
    _announce_call("done", result, None)
    return result


@contextmanager
def _open_driven(session: Session, config: Config, log: Path) -> Iterator[DrivenEngine]:
    _announce_call("open", config, log)
    with _open_loaded(session, config, log) as engine:
        try:
            yield DrivenEngine(engine)
        finally:
            _announce_call("close")


def _announce_call(call: str, *arguments: object) -> None:
    broadcast_object((call, arguments))


def _receive_call() -> tuple[str, tuple]:
    return broadcast_object(None)


def _take_part(session: Session) -> Any:
    """Make every call that rank 0 announces, until it is done. An error in a call is raised on rank 0 too, which announces it."""
    engine: RolloutEngine
    with ExitStack() as opened:
        while True:
            call, arguments = _receive_call()
            if call == "done":
                result, error = arguments
                if error is not None:
                    raise error
                return result
            try:
                if call == "open":
                    engine = opened.enter_context(_open_loaded(session, *arguments))
                elif call == "generate":
                    engine.generate(*arguments)
                else:
                    opened.close()
            except Exception:  # noqa: BLE001, S110 - see above
                pass


@contextmanager
def _open_loaded(session: Session, config: Config, log: Path) -> Iterator[RolloutEngine]:
    with failing_together():
        arch = build_architecture(config.model)
        tokenizer = build_tokenizer(config.data, config.model, arch)
    with open_engine(config, session, arch, tokenizer, log) as engine:
        load_engine(engine, require_weights(config.model, "the model to sample"), config.runtime)
        yield engine
