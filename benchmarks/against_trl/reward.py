"""The reward of both sides, which costs nothing and differs within a group, so that every response has an advantage.

It imports nothing of either side: TRL's process has only TRL's environment.
"""

from __future__ import annotations

from zlib import crc32


def score(prompt: object, response: str, reference: object, cut: bool = False) -> float:
    """A number in [0, 1] that depends on the response's text alone, also where it was cut. Called as a custom reward is."""
    return crc32(response.encode("utf-8", "surrogatepass")) % 1000 / 999
