"""The job's rollout engines for work that rank 0 does alone: rank 0 calls them, and the other ranks take part in each call.

Every call of a collective engine must be made on every rank, but rank 0 alone decides what is sampled for new data. So rank 0
broadcasts each call before making it, and the other ranks, which wait for rank 0 to finish, make the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_r1.config.schema import Config
from megatron_r1.pipeline.builders.engine_weights import load_engine
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_tokenizer, require_weights
from megatron_r1.pipeline.session import Session
from megatron_r1.rollout.protocol import OnGroup, RolloutEngine
from megatron_r1.runtime.distributed import broadcast_object, failing_together, is_rank_zero, rank
from megatron_r1.runtime.exchange import add_tables
from megatron_r1.training.outlines import stream_groups
from megatron_r1.types import Prompt, RolloutGroup, Sampling

T = TypeVar("T")


class DrivenEngine:
    """All engines of the job, as rank 0 calls them. They sample, nothing else."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. `on_group` gets the groups of other ranks' engines at the end, one after the other."""
        _announce_call("generate", prompts, sampling, seed)
        return _generate(self._engine, prompts, sampling, seed, on_group)


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


def _generate(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
) -> list[RolloutGroup]:
    """This rank's groups. Rank 0 calls `on_group` with all ranks', and holds one at a time that is not its own. Collective."""
    own = engine.generate(prompts, sampling, seed, on_group)
    owners = np.zeros(len(prompts))
    owners[[group.position for group in own]] = rank()
    owners_P = add_tables(owners).astype(int).tolist()
    with closing(stream_groups(owners_P, own)) as groups:
        for group in groups:
            if group.owner and on_group is not None:
                on_group(group)
    return own


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
                    _generate(engine, *arguments)
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
