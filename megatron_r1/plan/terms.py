"""The parts that a plan is made of: how much of what, in which phase of a stage, and which setting cuts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One part of a sum."""

    name: str
    amount: float  #: bytes, or seconds
    setting: str = ""  #: the key whose change cuts it; "": nothing does


@dataclass(frozen=True)
class MemoryPhase:
    """What is held at the fullest moment of a phase, in bytes."""

    name: str
    device: tuple[Term, ...]  #: of the rank that needs most
    host: tuple[Term, ...] = ()  #: of the node that needs most

    @property
    def device_bytes(self) -> float:
        """Of the device of the fullest rank."""
        return sum(term.amount for term in self.device)

    @property
    def host_bytes(self) -> float:
        """Of the memory of the fullest node."""
        return sum(term.amount for term in self.host)

    def largest(self, *, host: bool = False, with_setting: bool = True) -> Term | None:
        """The largest term, of the device or the host; the largest that a setting cuts, if there is one. None: there is no term."""
        terms = self.host if host else self.device
        cut = [term for term in terms if term.setting and term.amount > 0] if with_setting else []
        return max(cut or terms, key=lambda term: term.amount, default=None)


@dataclass(frozen=True)
class TimePhase:
    """How long a phase takes, in seconds: its terms follow each other."""

    name: str
    terms: tuple[Term, ...]
    waits_for: tuple[str, ...] = ()  #: names of the phases that must have ended

    @property
    def seconds(self) -> float:
        """Of all terms."""
        return sum(term.amount for term in self.terms)

    def largest(self) -> Term | None:
        """The longest term; None: there is none."""
        return max(self.terms, key=lambda term: term.amount, default=None)
