"""Fill in the middle on whole documents: prefix, suffix, then the middle (PSM), as DeepSeek-V3 (arXiv 2412.19437) section 4.2.

    <fim begin> prefix <fim hole> suffix <fim end> middle

The form is of Bavarian et al. (arXiv 2207.14255). They cut between characters; V3 does not say where it cuts, and here it is
between tokens, so that the tokens of a document are the same with and without it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

#: Begin, hole and end, by the names that published vocabularies have for them.
MARKS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)


class FillInMiddle:
    """Moves the middle of some documents to their end. What happens to one depends on seed and its number alone."""

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        """
        Args:
            tokenizer: has one of the sets of `MARKS`.
            rate: share of the documents; 0.1 in V3.
            seed: of the run.

        Raises:
            ConfigError: the tokenizer has no such tokens.
        """
        self.rate, self.seed = rate, seed
        self.begin = self.hole = self.end = -1
        if not rate:
            return
        sets = [[tokenizer.find_token(mark) for mark in marks] for marks in MARKS]
        complete = [[token for token in ids if token is not None] for ids in sets if None not in ids]
        if not complete:
            raise ConfigError(
                f"pretrain.fill_in_middle_rate={rate} needs a tokenizer with the tokens {' '.join(MARKS[0])}, or "
                f"{' '.join(MARKS[1])}: add them to data.tokenizer, or set the rate to 0"
            )
        self.begin, self.hole, self.end = complete[0]

    def cuts(self, length: int, number: int) -> tuple[int, int] | None:
        """Where the middle of a document of so many tokens begins and ends; None: the document stays as it is."""
        if not self.rate or not length:
            return None
        draw = random.Random(f"fill in the middle {self.seed} {number}")
        if draw.random() >= self.rate:
            return None
        first, second = sorted(draw.randint(0, length) for _ in range(2))
        return first, second

    def __call__(self, tokens: Sequence[int], number: int) -> list[int]:
        """A document's tokens, begin and end of sequence left out: as they are, or three more in the new order.

        Args:
            number: of the document, among all that training reads.
        """
        cuts = self.cuts(len(tokens), number)
        if cuts is None:
            return list(tokens)
        first, second = cuts
        return [self.begin, *tokens[:first], self.hole, *tokens[second:], self.end, *tokens[first:second]]
