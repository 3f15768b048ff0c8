"""The local context, written in place: a token joins it without a copy of those before.

On a CPU that is no faster than to concatenate, as longllama.py does (docs/speed.md); captured steps need places that stay.
"""

import torch
from torch import Tensor

from fast.attention import attend
from fast.linear import LIMITS, Limits
from fast.storage import store
from longllama import Attended, LocalCache, LongLlamaConfig, Memory


class FastContext(LocalCache):
    """`tensors` are (B, G, capacity, D padded to a multiple of 8) each: they hold `length` tokens, and have room for more.

    Room doubles when it is full, up to the window, since a window of millions of tokens would not fit. It is a power of two,
    or the window, so that captured steps see few sizes, and multiples of 1024 (see `fused_kernel`).
    """

    ROOM = 2048  # tokens, from the first on: the window of the 3B model, whose steps are captured once then

    def __init__(self, config: LongLlamaConfig, memory: Memory | None, rotates: bool, limits: Limits = LIMITS):
        super().__init__(config, memory, rotates)
        self.limits = limits

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, causal: bool = False) -> Attended:
        return attend(q, k, v, real, causal, limits=self.limits)

    def append(self, new: list[Tensor]) -> list[Tensor]:
        """As in LocalCache; what is returned is padded."""
        new = new if self.memory is not None else new[:2]
        old, start = self.filled(), self.length
        self.length += new[0].shape[2]
        window, grad = self.config.max_position_embeddings, torch.is_grad_enabled()
        if grad or not old or self.length > self.tensors[0].shape[2]:  # what autograd keeps must not be written into
            room = min(max(self.ROOM, 1 << self.length.bit_length()), window)  # more than there are, below the window
            capacity = self.length if grad else max(self.length, room)
            self.tensors = [store(x, capacity, x[-1].dtype, x[-1].device) for x in (zip(old, new) if old else zip(new))]
        else:
            for tensor, x in zip(self.tensors, new):
                tensor[:, :, start : self.length, : x.shape[3]] = x
        return self.filled()[:2]

    def filled(self) -> list[Tensor]:
        return [x[:, :, : self.length] for x in self.tensors]

    def restart(self, keep: int):
        self.tensors = [x[..., : self.config.head_dim] for x in self.filled()]
        super().restart(keep)

    def fork(self) -> "FastContext":
        twin = super().fork()
        twin.tensors = self.filled()  # without room: the twin never writes where this one does
        return twin

    def restore(self, tensors: list[Tensor], length: int):
        """Goes on from what was saved."""
        self.tensors, self.length = tensors, length
