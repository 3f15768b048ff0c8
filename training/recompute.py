"""Gradient checkpointing (Chen et al. 2016): what layers compute is not kept for the backward pass, but computed again in it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fast import FastContext, FastLlama, FastMemory
from longllama import Attended, Block, Cache, cross_batch_attention


def again(part: Callable, *args, **kwargs):
    """part(...), which has no state, computed anew when its gradient is asked for."""
    return checkpoint(part, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else part(*args, **kwargs)


class RecomputedBlock(Block):
    """Shares the modules of a block. Where a cache is read into, that is not done again: see `recomputed_cache`."""

    def __init__(self, block: Block):
        nn.Module.__init__(self)
        self.H, self.G, self.D, self.rotates = block.H, block.G, block.D, block.rotates
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend_to: Callable) -> Tensor:
        if attend_to.func is cross_batch_attention:  # has no state either
            return again(super().forward, x, rope, attend_to)
        return again(super().update, x, attend_to(*again(super().project, x, rope)))


class RecomputedContext(FastContext):
    def attend(self, *sets, **more) -> Attended:
        return again(super().attend, *sets, **more)


class RecomputedMemory(FastMemory):
    def attend(self, q: Tensor, real: Tensor | None) -> Attended:
        return again(super(RecomputedMemory, self.fork()).attend, q, real)  # a fork: this one goes on


def recompute_layers(model: FastLlama):
    for i, block in enumerate(model.layers):
        model.layers[i] = RecomputedBlock(block)


def recomputed_cache(model: FastLlama) -> Cache:
    """A new cache, attention to which is computed again, too: its scores are most of what a layer keeps."""
    return model.new_cache(RecomputedMemory, RecomputedContext)
