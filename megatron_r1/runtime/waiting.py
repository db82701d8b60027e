"""How ranks wait for each other's long work: by signs of life in the meeting store, not in a collective, which would time out.

Engines of a few ranks may sample for hours while all other ranks have nothing to do. Whoever works gives signs of life, and whoever
waits does so as long as signs, or ranks that are done, keep coming. The limit is for the silence between them, not for the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_r1.errors import DeviceError, one_line

# 512 ranks cost the store at most 51 short requests a second as they work, and 256 as they wait.
_SIGN_SECONDS = 10.0  # between two signs of one rank in the store
_LOOK_SECONDS = 30.0  # between two looks of a waiting rank at the signs
_LONGEST_PAUSE = 2.0  # between two questions of a waiting rank whether all are there

_LISTENERS: list[Callable[[], None]] = []
_place: _WaitingPlace | None = None
_opened = 0  # places so far, the same on every rank


class _WaitingPlace:
    """Where the ranks of one job wait.

    Args:
        store: the meeting store.
        silence: seconds without a sign, or a rank that is done, after which a waiting rank gives up.
        name: of this place; a store, such as torchrun's, may outlive it.
    """

    def __init__(self, store: dist.Store, world_size: int, silence: float, name: str = "0") -> None:
        self._store, self._name = store, name
        self._world_size, self._silence = world_size, silence
        self._signed_at = 0.0
        self._number = 0  # of the meeting that comes next

    def sign(self) -> None:
        now = time.monotonic()
        if now - self._signed_at > min(_SIGN_SECONDS, self._silence / 4):
            self._signed_at = now
            self._store.add(self._keys()[1], 1)

    def wait(self) -> None:
        """Returns when all ranks are here."""
        arrived, signs, done = self._keys()
        look = min(_LOOK_SECONDS, self._silence / 4)
        self._number += 1
        if self._store.add(arrived, 1) == self._world_size:
            self._store.set(done, "")
            for key in self._keys(before=2):  # all ranks have left the meeting before this one
                self._store.delete_key(key)
            return
        began = looked_at = seen_at = time.monotonic()
        seen = (0, 0)
        while not self._store.check([done]):  # it answers at once: a wait in the store would hold up all else that asks it
            now = time.monotonic()
            if now - looked_at > look:
                looked_at, known = now, (self._store.add(arrived, 0), self._store.add(signs, 0))
                if known != seen:
                    seen, seen_at = known, now
                    _tell()
                elif now - seen_at > self._silence:
                    raise DeviceError(
                        f"{self._world_size - known[0]} of {self._world_size} ranks still work and gave no sign for "
                        f"{now - seen_at:.0f} s (runtime.collective_timeout_seconds)"
                    )
            time.sleep(min(_LONGEST_PAUSE, max(0.002, (now - began) / 50)))  # at most 2 % of the time waited is lost

    def _keys(self, before: int = 0) -> list[str]:
        """Keys in the store of the meeting that comes next, or of one before: ranks that are there, signs, all are there."""
        return [f"megatron_r1/waiting/{self._name}/{self._number - before}/{name}" for name in ("arrived", "signs", "done")]


def open_waiting_place(store: dist.Store, world_size: int, silence: float) -> None:
    """Let the ranks of a job wait for each other; `runtime.distributed` calls it when they have met."""
    global _place, _opened
    _opened += 1
    _place = _WaitingPlace(store, world_size, silence, str(_opened)) if world_size > 1 else None


def close_waiting_place() -> None:
    """The ranks part."""
    global _place
    _place = None


def give_sign() -> None:
    """This rank works, and within the limits of what it waits for itself. Cheap: call it at every step of a long work."""
    _tell()
    if _place is not None:
        try:
            _place.sign()
        except dist.DistError:  # rank 0, which holds the store, is gone: the next collective says so
            pass


def wait_for_all() -> None:
    """Wait until all ranks are here, for as long as those that are not give signs. Collective.

    Raises:
        DeviceError: no sign came for `runtime.collective_timeout_seconds`, or rank 0 is gone.
    """
    if _place is None:
        return
    try:
        _place.wait()
    except dist.DistError as error:
        raise DeviceError(f"the ranks' meeting store does not answer: {one_line(error)}") from None


def hear_signs(listener: Callable[[], None]) -> None:
    """Call the listener at every sign of this rank, and of those it waits for, until `stop_hearing`."""
    _LISTENERS.append(listener)


def stop_hearing(listener: Callable[[], None]) -> None:
    """Undo `hear_signs`."""
    if listener in _LISTENERS:
        _LISTENERS.remove(listener)


def _tell() -> None:
    for listener in _LISTENERS:
        listener()
