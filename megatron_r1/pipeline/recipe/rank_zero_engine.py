"""The job's rollout engines for work that rank 0 does alone: it calls them, and the other ranks take part in its calls.

A collective engine wants every call on every rank, but what makes data decides on rank 0 what is sampled next. So rank 0 tells each
call before it makes it, and the others, who wait for rank 0 to finish, make it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_r1.config.schema import Config
from megatron_r1.pipeline.builders.engine_weights import load_engine
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer
from megatron_r1.pipeline.session import Session
from megatron_r1.rollout.protocol import OnGroup, RolloutEngine
from megatron_r1.runtime.distributed import broadcast_object, failing_together, is_rank_zero
from megatron_r1.types import Prompt, RolloutGroup, Sampling

T = TypeVar("T")


class DrivenEngine:
    """Rank 0's hold on all engines of the job. It samples, nothing else."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. The groups of other ranks' engines come to `on_group` together, in the end."""
        told: set[int] = set()

        def tell(group: RolloutGroup) -> None:
            told.add(id(group))
            on_group(group)

        _tell("generate", prompts, sampling, seed)
        groups = self._engine.generate(prompts, sampling, seed, tell)
        for group in groups:
            if id(group) not in told:
                on_group(group)
        return groups


#: Opens the engines, loaded with the weights of a config's `model.weights`; the path takes an engine's output.
OpenEngine = Callable[[Config, Path], AbstractContextManager[DrivenEngine]]


def with_engines(session: Session, work: Callable[[OpenEngine], T]) -> T:
    """Run `work` on rank 0, and return its result, or raise its error, on every rank. All ranks call this."""
    if not is_rank_zero():
        return _take_part(session)
    result, error = None, None
    try:
        result = work(partial(_open_driven, session))
    except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
        error = caught
    _tell("done", result, error)
    if error is not None:
        raise error
    return result


@contextmanager
def _open_driven(session: Session, config: Config, log: Path) -> Iterator[DrivenEngine]:
    _tell("open", config, log)
    with _open_loaded(session, config, log) as engine:
        try:
            yield DrivenEngine(engine)
        finally:
            _tell("close")


def _tell(call: str, *arguments: object) -> None:
    broadcast_object((call, arguments))


def _take_part(session: Session) -> object:
    """Make every call that rank 0 tells of. An error in one is raised on rank 0 too, which tells of it when it is done."""
    with ExitStack() as opened:
        engine = None
        while True:
            call, arguments = broadcast_object(None)
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
        arch = build_architecture(config)
        tokenizer = build_tokenizer(config, arch)
    with open_engine(config, session, arch, tokenizer, log) as engine:
        load_engine(engine, config)
        yield engine
