"""The draws of vLLM's CPU sampler with fewer calls of torch, and the same draws.

For every token of every request the sampler of vLLM 0.32 asks the request's generator for one number, by which the token is drawn.
Here one call gives the numbers of a request's next tokens.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

AHEAD = 32  #: numbers of one call, 1 KB for each running request
_BOUND = 2**31  #: vLLM's: numbers are below

Generators = dict[int, torch.Generator]  #: row of a step -> generator of its request


class DrawsAhead:
    """Numbers in the order in which single calls would give them.

    Nothing else may draw from the generators meanwhile: they are ahead.
    """

    def __init__(self) -> None:
        #: numbers of a request, and how many of them were used
        self._numbers: WeakKeyDictionary[torch.Generator, tuple[list[int], int]] = WeakKeyDictionary()

    def next(self, generator: torch.Generator) -> int:
        """The next number of a request."""
        numbers, used = self._numbers.get(generator, ([], 0))
        if used == len(numbers):
            numbers, used = torch.randint(0, _BOUND, (AHEAD,), generator=generator, dtype=torch.long).tolist(), 0
        self._numbers[generator] = numbers, used + 1
        return numbers[used]

    def take_back(self, generator: torch.Generator) -> None:
        """Let the next number be the one that was given last. Raises KeyError if none was."""
        numbers, used = self._numbers[generator]
        assert used, "taken back twice"
        self._numbers[generator] = numbers, used - 1


draws = DrawsAhead()


def draw_tokens(
    sampler: TopKTopPSampler, logits: torch.Tensor, generators: Generators, k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place of `TopKTopPSampler.forward_cpu`, for float32 noise.

    Args:
        logits: [rows, vocabulary].

    Returns:
        Token ids [rows], and what `logprobs_mode` asks for, or None.
    """
    logits = apply_top_k_top_p(logits, k, p)
    returned = None
    if sampler.logprobs_mode == "processed_logits":
        returned = logits
    elif sampler.logprobs_mode == "processed_logprobs":
        returned = logits.log_softmax(dim=-1, dtype=torch.float32)
    rows = logits.shape[0]
    if len(generators) == rows:
        seeds = torch.tensor([draws.next(generators[row]) for row in range(rows)], dtype=torch.long)
    else:
        seeds = torch.randint(0, _BOUND, (rows,), dtype=torch.long)
        for row, generator in generators.items():
            seeds[row] = draws.next(generator)
    return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), returned
