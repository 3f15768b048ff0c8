"""Weights in 8 and 4 bits: half and about a quarter of bfloat16's bytes, of which a token has to read every one.

    int8   each row of a matrix has a scale: its largest number is 127
    int4   each 32 numbers of a row have one: the largest of them is -8, as in llama.cpp's Q4_0. Embedding and head stay in int8.

Rows are rounded each by itself, so matrices that are fused here and apart in files come out the same. Only weights are rounded:
what is multiplied with them is not, but for bfloat16 where torch's kernels of a CPU take nothing else.
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.files import Weights

KINDS = ("int8", "int4")
GROUP = 32  # numbers of a row that share a scale in int4
ALWAYS_INT8 = ("embed_tokens", "lm_head")  # in int4, too: few bytes of a large model, and many of its errors
FEW = 32  # up to so many tokens at once the CPU's int8 kernel is the fastest way
MANY = 256  # from so many on its int4 kernel is not
BLOCKS = (64, 32)  # rows that the int4 kernel has together, with AVX-512, and with AVX2
AT_ONCE = 1 << 22  # numbers of a matrix that are rounded at once
PIECE = 1 << 20  # numbers of it that are whole again at once, on a CPU


def kind_of(module: str, kind: str) -> str:
    """What the matrix of a module is rounded to in a model of this kind."""
    return "int8" if module in ALWAYS_INT8 else kind


def quantise(matrix: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """matrix (N, K) -> int8 (N, K) and its scales (N, 1), or two of 4 bits in each uint8 (N, K/2) and scales (N, K/GROUP), which
    are bfloat16."""
    parts = matrix.split(max(AT_ONCE // matrix.shape[1], 1))
    return tuple(torch.cat(x) for x in zip(*map({"int8": to_int8, "int4": to_int4}[kind], parts)))


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.float()
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    return (rows / divisor(scale)).round().to(torch.int8), scale


def to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = rows.float().unflatten(1, (-1, GROUP))  # (n, K/GROUP, GROUP)
    largest = groups.take_along_dim(groups.abs().argmax(dim=2, keepdim=True), dim=2)
    scale = (largest / -8).bfloat16()  # whatever its sign
    whole = (groups / divisor(scale)).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(1)
    return whole[:, ::2] | whole[:, 1::2] << 4, scale.squeeze(2)


def divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale.float())


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave, as a matrix (N, K) of that dtype again."""
    if weight.dtype == torch.int8:
        return weight.to(dtype) * scale.to(dtype)
    return scaled(unpacked(weight), scale, dtype)


def scaled(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """0 to 15 (N, K), and scales (N, K/GROUP) -> (N, K)."""
    return ((whole.to(dtype) - 8).unflatten(1, (-1, GROUP)) * scale.to(dtype).unsqueeze(2)).flatten(1)


def unpacked(weight: Tensor) -> Tensor:
    """Two of 4 bits in each uint8 (N, K/2) -> 0 to 15, (N, K)."""
    return torch.stack((weight & 15, weight >> 4), dim=2).flatten(1)


def unlaid(weight: Tensor, block: int) -> Tensor:
    """Rows (N, K/2) as the int4 kernel has them -> 0 to 15, (N, K). `block` rows lie together, number by number, and those of the
    first half in the lower bits."""
    N, K = weight.shape[0], 2 * weight.shape[1]
    halves = weight.reshape(-1, K, block // 2)
    return torch.cat((halves & 15, halves >> 4), dim=2).mT.reshape(N, K)


# ------------------------------------------------------------------------------------------------------------ Modules


class Int8Linear(nn.Module):
    """An nn.Linear without bias, of a matrix in int8."""

    def __init__(self, other: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = other.in_features, other.out_features
        self.weight_int8, self.weight_scale = parameters(other.weight, "int8")

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, on_cpu = self.weight_int8, self.weight_scale, x.device.type == "cpu"
        rows, whole = x.flatten(0, -2), self.in_features % 16 == 0  # or the kernel reads past the end
        if on_cpu and len(rows) <= FEW and whole:
            out = torch._weight_int8pack_mm(rows.bfloat16(), weight, scale.flatten().bfloat16())
            return out.to(x.dtype).unflatten(0, x.shape[:-1])
        if on_cpu and not torch.compiler.is_compiling():  # in pieces, which are still in its cache when they are used
            pieces = (y.split(max(PIECE // self.in_features, 1)) for y in (weight, scale))
            return torch.cat([F.linear(x, dequantised(*piece, x.dtype)) for piece in zip(*pieces)], dim=-1)
        return F.linear(x, dequantised(weight, scale, x.dtype))  # compiled, a token reads the int8 alone


class Int4Linear(nn.Module):
    """An nn.Linear without bias, of a matrix in int4."""

    def __init__(self, other: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = other.in_features, other.out_features
        self.weight_int4, self.weight_scale = parameters(other.weight, "int4")
        self.register_buffer("scales_and_zeros", None, persistent=False)  # (in / GROUP, out, 2), for the kernel
        self.block = None  # as in `unlaid`, where that undoes the kernel's layout

    def pack(self):
        """Lays the matrix out as torch's kernel for this CPU has it, in its place, where that takes it: from now on it cannot be
        moved to another device, or saved."""
        if self.weight_int4.device.type == "cpu" and self.out_features % 16 == 0:
            whole = unpacked(self.weight_int4)
            packed = self.weight_int4.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 2))
            fits = (n for n in BLOCKS if self.out_features % n == 0 and torch.equal(unlaid(packed, n), whole))
            self.block = next(fits, None)
            scale = self.weight_scale.T.bfloat16()  # (in / GROUP, out)
            self.scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), dim=2)
            self.weight_scale = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scales_and_zeros is None:
            return F.linear(x, dequantised(self.weight_int4, self.weight_scale, x.dtype))
        rows = x.flatten(0, -2).bfloat16()  # (rows, in)
        if self.block and len(rows) >= MANY and not torch.compiler.is_compiling():
            step = max(PIECE // self.in_features // self.block, 1) * self.block
            pieces = zip(self.weight_int4.split(step), self.scales_and_zeros[..., 0].T.split(step))
            return torch.cat([F.linear(x, scaled(unlaid(w, self.block), s, x.dtype)) for w, s in pieces], dim=-1)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight_int4, GROUP, self.scales_and_zeros)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Embedding(nn.Module):
    """An nn.Embedding, of a matrix in int8."""

    def __init__(self, other: nn.Embedding):
        super().__init__()
        self.weight_int8, self.weight_scale = parameters(other.weight, "int8")

    def forward(self, ids: Tensor) -> Tensor:
        scale = F.embedding(ids, self.weight_scale)
        return F.embedding(ids, self.weight_int8).to(scale.dtype) * scale


def parameters(matrix: Tensor, kind: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The rounded numbers; and the scales, in the matrix's dtype, which stays the model's."""
    weight, scale = quantise(matrix, kind)
    return tuple(nn.Parameter(x, requires_grad=False) for x in (weight, scale.to(matrix.dtype)))


@torch.no_grad()
def use_quantised(model: nn.Module, kind: str):
    """Puts a quantised module in the place of every nn.Linear and nn.Embedding of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding):
                setattr(parent, name, Int8Embedding(child))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, Int4Linear(child) if kind_of(name, kind) == "int4" else Int8Linear(child))


# -------------------------------------------------------------------------------------------------------------- Files


def quantised_weights(weights: Weights, kind: str) -> Weights:
    """A model's weights by their names in files, each matrix rounded as it is read: X.weight becomes X.weight_int8 or
    X.weight_int4, and X.weight_scale."""

    @lru_cache(maxsize=1)  # mostly both are asked for one after the other
    def both(name: str, to: str) -> tuple[Tensor, Tensor]:
        return quantise(weights[name][2](), to)

    def rounded(name: str, to: str, i: int) -> Tensor:
        return both(name, to)[i]

    made: Weights = {}
    for name, (shape, dtype, read) in weights.items():
        if len(shape) != 2:
            made[name] = shape, dtype, read
            continue
        (N, K), to = shape, kind_of(name.split(".")[-2], kind)
        forms = ([N, K], torch.int8), ([N, 1], torch.bfloat16)
        if to == "int4":
            forms = ([N, K // 2], torch.uint8), ([N, K // GROUP], torch.bfloat16)
        for i, suffix in enumerate((to, "scale")):
            made[f"{name}_{suffix}"] = *forms[i], partial(rounded, name, to, i)
    return made


def dequantised_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """The other way: what `quantised_weights` gave, as matrices of that dtype."""

    def again(stem: str, kind: str) -> Tensor:
        return dequantised(*(weights[f"{stem}_{suffix}"][2]() for suffix in (kind, "scale")), dtype)

    made: Weights = {}
    for name, (shape, stored, read) in weights.items():
        stem, _, kind = name.rpartition("_")
        if kind in KINDS:
            made[stem] = [shape[0], shape[1] * (2 if kind == "int4" else 1)], dtype, partial(again, stem, kind)
        elif kind != "scale":
            made[name] = shape, stored, read
    return made
