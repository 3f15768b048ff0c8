"""Products with weights on a CPU, by whichever of torch's ways is fastest there: the same numbers, up to rounding.

Intel's processors multiply float32 fastest with MKL, which torch takes by itself. AMD's do not: there oneDNN is 8 to 25% faster
for many tokens, and for one token a weight goes through MKL's fast path as a batch of 16 parts. With Intel's AMX a token of the
3B shape takes 426 ms in bfloat16 as a matrix times a column, 545 otherwise. (All as measured when each was written.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Limits:
    """What decides between ways of computing the same. Of a model: `FastLlama.limits`."""

    slow_mkl: bool = torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")  # MKL is Intel's
    amx: bool = torch.cpu.get_capabilities().get("amx_bf16", False)  # Intel's matrix unit, for bfloat16
    rows: int = 128  # rows of scores that the plain formula holds at once for each key head, at most
    scores: int = 1 << 27  # scores that it holds at once, at most
    cast: int = 1 << 19  # numbers that a CPU casts at once: few enough to be still in its cache when they are used
    gathered: int = 1 << 24  # numbers of the best values that are gathered at once


LIMITS = Limits()
PARTS = 16  # where MKL is slow, a weight is read as this many blocks of rows, which the cores share


def linear(x: Tensor, weight: Tensor, limits: Limits = LIMITS) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out): F.linear, but for cases on a CPU where another of torch's ways is faster."""
    if x.device.type != "cpu":
        return F.linear(x, weight)
    rows, size = weight.shape
    one, onednn = x.numel() == size, torch.backends.mkldnn  # a single token; oneDNN's old name
    if (
        limits.slow_mkl and x.dtype == torch.float32 and one and rows % PARTS == 0
    ):  # a batch of matrices is read at full speed
        column = x.reshape(1, 1, size).expand(PARTS, 1, size).mT
        return (weight.view(PARTS, -1, size) @ column).view(*x.shape[:-1], rows)
    if not torch.compiler.is_compiling() and onednn.is_available() and onednn.enabled:
        if (
            limits.slow_mkl and x.dtype == torch.float32 and not torch.is_grad_enabled()
        ):  # oneDNN's operator has no gradient
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        if x.dtype == torch.bfloat16 and one and limits.amx:  # AMX is fastest with a matrix times a column
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], rows)
        if (
            x.dtype == torch.bfloat16 and one
        ):  # oneDNN, which torch takes for bfloat16, reads a weight slower than torch's own
            onednn.enabled = False
            try:
                return F.linear(x, weight)
            finally:
                onednn.enabled = True
    return F.linear(x, weight)


class FastLinear(nn.Linear):
    """Shares the weight of another nn.Linear without bias."""

    def __init__(self, other: nn.Linear, limits: Limits = LIMITS):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.limits = other.in_features, other.out_features, limits
        self.weight = other.weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.limits)


def use_fast_linear(model: nn.Module, limits: Limits):
    """Puts a `FastLinear` in the place of every nn.Linear of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, FastLinear(child, limits))
