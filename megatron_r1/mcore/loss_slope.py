"""The gradient of a micro-batch's loss by its tokens, while only some tokens are known.

The losses of pretraining and fine-tuning, and GRPO's, are sums over tokens of which each depends on its own log-prob. The gradient
by a token then is known as soon as the token's log-prob is. Of a loss that is no such sum, what is given here is wrong; whoever
takes it looks at the true gradient later (`fused_head.Slope`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_r1.mcore.fused_head import Slope
from megatron_r1.mcore.layout import Layout


def is_asked(device: torch.device, layout: Layout) -> bool:
    """Whether updates ask for it.

    It saves one of four matrix products of the output layer, which take the time on a CPU. On a GPU they are a hundredth of a large
    model's update, and the gradient of the layer's weight, which a guess keeps apart until it is known to be right, has no room.
    Under context parallelism a rank knows a part of each sequence alone.
    """
    return device.type == "cpu" and layout.cp == 1


class LossSlope:
    """Of one micro-batch.

    Args:
        loss: takes the model's output [b, s], -log p of every token, and gives what the backward pass begins with: a scalar.
        shape: b and s.
    """

    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor], shape: torch.Size) -> None:
        self._loss, self._shape = loss, shape

    def at(self, positions: torch.Tensor | None) -> Slope:
        """Asked for rows of these positions [N] of [s, b], as `R1GPTModel` has them; None: of all."""
        known: list[torch.Tensor] = []

        def slope(rows: slice, losses: torch.Tensor) -> torch.Tensor:
            if not known:
                known.append(losses.new_zeros(self._shape.numel()))
            places = rows if positions is None else positions[rows]
            known[0][places] = losses
            output = known[0].view(self._shape[1], self._shape[0]).t().contiguous().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self._loss(output), output)
            return gradient.t().reshape(-1)[places]

        return slope
