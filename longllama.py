"""LongLLaMA: LLaMA with the memory layers of the Focused Transformer (FoT), the whole architecture in one file.

The idea (Tworkowski et al. 2023, "Focused Transformer: Contrastive Training for Context Scaling", arXiv:2307.03170):
a transformer reads a window of a few thousand tokens. FoT gives a few of its layers, the *memory layers*, a second set
of keys and values, those of every token before the window. Their queries attend with one softmax to both sets. There
are no new weights, and a model trained on 8k tokens reads 256k and more.

    memory (memory layers only)                        local context (every layer)
    k v  k v  k v  k v  k v  k v  ...  k v  k v    |   k v   k v   k v   k v  <- q
    keys unrotated, as if all at position 0        |   RoPE positions 0, 1, 2, 3 ...

Five ideas carry it, each a short function or class below:

  `Memory`                 Remembered keys lose their position: all stand where the local context starts.
  `attend`, `merge`        One softmax over both sets is the softmaxes over each, weighted by their log-sum-exps: exactly.
  `split_into_windows`     A long prompt is read window by window, each with the memory of all before it.
  `Cache.restart`          A local context ends: it moves into memory, and the next one starts at position 0.
  `cross_batch_attention`  Training mixes keys of the true past with those of other documents, to be told apart.

The axes of tensors: B batch, T new tokens, S tokens in any set of keys, H query heads, G key-value heads (fewer than H:
grouped-query attention), D head dim, C hidden size, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------- Config

MEM_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in safetensors files
LARGEST = 1 << 28  # of any size or length in a config: what is far beyond all use is refused, before it overflows


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


def is_count(value) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class LongLlamaConfig:
    """What shapes the computation, under the names of a Hugging Face config.json. Impossible values raise ValueError."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    max_position_embeddings: int = 2048  # "the window": as many tokens as the local context is meant for
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    last_context_length: int = 1024  # this many tokens at the end of a prompt stay local, the rest goes into memory
    mem_layers: tuple[int, ...] = ()  # the layers that have a memory; none: plain LLaMA
    mem_positionals: bool = True  # False: memory layers rotate nothing
    mem_dtype: str = "bfloat16"  # what memory is stored as; it is computed with in the model's dtype
    mem_attention_grouping: tuple[int, int] | None = None  # (heads, queries): at most their product of rows of scores at once
    mem_topk: int | None = None  # a query attends to this many remembered tokens, those with the best keys; None: all
    mem_device: str | None = None  # "cpu": memory is kept in main memory, and copied to a GPU in pieces, as it is used
    keep_local: int = 0  # when the window is full, this many of its newest tokens stay local
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self):
        heads = self.num_attention_heads
        groups = heads if self.num_key_value_heads is None else self.num_key_value_heads
        tuples = {name: tuple(value) for name, value in vars(self).items() if isinstance(value, list)}
        vars(self).update(tuples, num_key_value_heads=groups)  # frozen, but for this
        limits = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "vocab_size")
        limits["keep_local"] = "max_position_embeddings"
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if name in limits:
                fits = type(value) is int and 0 <= value < getattr(self, limits[name])
                require(fits, f"{name} must be one whole number, at least 0 and less than {limits[name]}, not {value!r}")
            elif field.type in (int, int | None):
                fits = is_count(value) and value <= LARGEST
                require(fits, f"{name} must be a whole number of 1 to {LARGEST}, not {value!r}")
            elif field.type is bool:
                require(type(value) is bool, f"{name} must be true or false, not {value!r}")
            elif field.type is float:
                fits = type(value) in (int, float) and 0 < value < 1e38
                require(fits, f"{name} must be above 0 and below 1e38, not {value!r}")
        require(self.hidden_size % (2 * heads) == 0, f"hidden_size {self.hidden_size} is not {heads} heads of even size")
        require(heads % self.num_key_value_heads == 0, "num_key_value_heads must divide num_attention_heads")
        chosen, layers = self.mem_layers, range(self.num_hidden_layers)
        known = isinstance(chosen, tuple) and all(type(i) is int and i in layers for i in chosen)
        require(known, f"mem_layers must be a list of layers, of 0 to {layers[-1]}, not {chosen!r}")
        require(self.mem_dtype in MEM_DTYPES, f"mem_dtype must be one of {MEM_DTYPES}, not {self.mem_dtype!r}")
        grouping = self.mem_attention_grouping
        fits = grouping is None or (isinstance(grouping, tuple) and len(grouping) == 2 and all(map(is_count, grouping)))
        require(fits, f"mem_attention_grouping must be null or [heads, queries] of at least 1, not {grouping!r}")
        require(self.mem_device in (None, "cpu"), f'mem_device must be null or "cpu", not {self.mem_device!r}')

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def rotates(self, layer: int) -> bool:
        return self.mem_positionals or layer not in self.mem_layers

    @classmethod
    def from_json(cls, path: str | Path, **overrides) -> "LongLlamaConfig":
        """Reads a config.json of transformers 4 or 5; refuses by name what this file does not compute."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            require(isinstance(raw, dict), "must be a JSON object")
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            require(isinstance(rope, dict), "rope_parameters or rope_scaling must be a JSON object")
            raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
            raw["rope_type"] = rope.get("rope_type", rope.get("type"))
            if raw.get("pad_token_id") == -1:  # none, in old LLaMA's configs
                del raw["pad_token_id"]
            kind = raw.get("model_type")
            require(kind in (None, "llama", "longllama"), f"model_type {kind!r} is not supported, only 'llama' and 'longllama'")
            config = cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
            computed = {"rope_type": "default", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
            for name, value in (computed | {"head_dim": config.head_dim}).items():
                require(raw.get(name) in (None, value), f"{name} {raw.get(name)!r} is not supported, only {value!r}")
        except (ValueError, RecursionError) as error:  # broken JSON is a ValueError, if it is not nested too deep
            raise ValueError(f"{path}: {error}") from None
        return replace(config, **overrides)


# ------------------------------------------------------------------------------------------- Linear, norm and RoPE

Rope = tuple[Tensor, Tensor]  # cos and sin, see `rope_table`
# On x86, torch multiplies float32 with Intel's MKL, which is slow on AMD's processors: there torch's other ways are faster.
MKL_IS_SLOW = torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")
HAS_AMX = torch.cpu.get_capabilities().get("amx_bf16", False)  # Intel's matrix unit, for bfloat16
PARTS = 16  # where MKL is slow, a weight is read as this many blocks of rows, which the cores share


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out): F.linear, but for cases on a CPU where another of torch's ways is faster. The
    product is the same, up to rounding."""
    if x.device.type != "cpu":
        return F.linear(x, weight)
    rows, size = weight.shape
    one, onednn = x.numel() == size, torch.backends.mkldnn  # a single token; oneDNN's old name
    if MKL_IS_SLOW and x.dtype == torch.float32 and one and rows % PARTS == 0:  # a batch of matrices is read at full speed
        column = x.reshape(1, 1, size).expand(PARTS, 1, size).mT
        return (weight.view(PARTS, -1, size) @ column).view(*x.shape[:-1], rows)
    if not torch.compiler.is_compiling() and onednn.is_available() and onednn.enabled:
        if MKL_IS_SLOW and x.dtype == torch.float32 and not torch.is_grad_enabled():  # oneDNN's operator has no gradient
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        if x.dtype == torch.bfloat16 and one and HAS_AMX:  # AMX is fastest with a matrix times a column
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], rows)
        if x.dtype == torch.bfloat16 and one:  # oneDNN, which torch takes for bfloat16, reads a weight slower than torch's own
            onednn.enabled = False
            try:
                return F.linear(x, weight)
            finally:
                onednn.enabled = True
    return F.linear(x, weight)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019): normalised in float32, cast back, then scaled (torch's own scales first)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight


def rope_table(start: int | Tensor, T: int, config: LongLlamaConfig, device: torch.device) -> Rope:
    """cos and sin of the angles at positions start to start + T - 1 (Su et al. 2021), float32: (T, D/2) each."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)  # (D/2,)
    angle = (start + torch.arange(T, device=device)).float().outer(frequency)  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its angle: the half-split layout of Hugging Face weights."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # computed with in float32, as cos and sin are
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------- Attention
#
# Attention over one set of keys gives an `Attended`: the output softmax(q k^T / sqrt(D)) v, (B, H, T, D), and the
# log-sum-exp of each query's scores, (B, H, T), which is all it takes to merge it with attention over another set.

Attended = tuple[Tensor, Tensor]
ROWS = 128  # rows of scores that the plain formula holds at once for each key head, at most
SCORES = 1 << 27  # scores that it holds at once, at most
FEW_ROWS = 16  # with at most this many queries, time goes into reading keys, not into arithmetic
CAST = 1 << 19  # numbers that a CPU casts at once: few enough to be still in its cache when they are used
GATHERED = 1 << 24  # numbers of the best values that are gathered at once
RECURRING = 1024  # cuDNN takes 60 ms to prepare for a new shape: it gets those that recur, one query or multiples of this


def store(parts: tuple[Tensor, ...], capacity: int, dtype: torch.dtype, device: torch.device, pin: bool = False) -> Tensor:
    """The parts, (B, G, n, D) each, concatenated into new storage (B, G, capacity, D), D padded to the multiple of 8 that fused
    kernels want (the 3B model's heads have 100). pin: main memory that can be copied to a GPU while that computes."""
    B, G, _, D = parts[-1].shape
    size, start = (B, G, capacity, -(-D // 8) * 8), 0
    with torch.inference_mode(False):  # a tensor made in that mode cannot be written into outside of it
        stored = torch.empty(size, dtype=dtype, device=device, pin_memory=pin)
    for x in parts:
        stored[:, :, start : start + x.shape[2], :D] = x[..., :D]
        start += x.shape[2]
    stored[..., D:] = 0
    return stored


def cast_pieces(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """x (B, G, S, D) in dtype, on a CPU in pieces of some tokens. A piece is good until the next one is asked for."""
    if x.dtype == dtype or x.device.type != "cpu" or torch.is_grad_enabled():  # autograd keeps all pieces, `room` holds one
        yield x.to(dtype)
        return
    parts = x.split(max(CAST * x.shape[2] // x.numel(), 1), dim=2)
    room = torch.empty_like(parts[0], dtype=dtype)
    copy_into = copy_float8 if x.dtype == torch.float8_e4m3fn else Tensor.copy_
    yield from (copy_into(room[:, :, : part.shape[2]], part) for part in parts)


def copy_float8(room: Tensor, x: Tensor) -> Tensor:
    """room.copy_(x) for finite float8_e4m3fn, eight times as fast as torch's on a CPU: its bits (sign, 4 of exponent, 3 of
    mantissa) moved into a float16's (5 and 10) make a number 256 times smaller."""
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).bitwise_right_shift_(1).bitwise_and_(~(1 << 14))
    return room.copy_(bits.view(torch.float16)).mul_(256)


def fold(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D) -> (B, G, H / G * T, D of k): queries that share a key head stand side by side, and no key is copied."""
    if k.shape[3] > q.shape[3]:  # contiguous: of heads of 2, each half is 1 wide, and torch may take q for channels-last
        q = F.pad(q, (0, k.shape[3] - q.shape[3])).contiguous()
    return q.reshape(len(q), k.shape[1], -1, k.shape[3])


def padding_bias(real: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to scores, (B, 1, 1, S). Padding gets half the least finite number, not -inf: a query that sees only padding
    gets something, and never NaN, also by a kernel that turns scores into powers of 2."""
    return None if real is None else (~real.mT).to(dtype) * (torch.finfo(dtype).min / 2)


def score(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Folded queries q (B, G, R, D), k (B, G, S, D) -> float32 (B, G, R, S)."""
    turned = MKL_IS_SLOW and q.device.type == "cpu" and k.dtype == q.dtype and q.shape[2] <= FEW_ROWS  # reads keys in order
    pieces = [(piece @ q.mT).mT if turned else q @ piece.mT for piece in cast_pieces(k, q.dtype)]
    scores = torch.cat(pieces, dim=3).float() * scale
    return scores if bias is None else scores + bias


def attend_plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, last: int | None) -> Attended:
    """The formula, with the softmax in float32: q (B, G, R, D) -> (B, G, R, D) and (B, G, R). last: the first query sees keys
    0 to last, each next one more; None: all see all."""
    scores = score(q, k, bias, scale)
    if last is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(last + 1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    weights, out, start = scores.softmax(dim=-1).to(q.dtype), 0, 0
    for piece in cast_pieces(v, q.dtype):
        out = out + (weights[..., start : start + piece.shape[2]] @ piece).float()
        start += piece.shape[2]
    return out, scores.logsumexp(dim=-1)


def fused_kernel(q: Tensor, k: Tensor, bias: Tensor | None) -> Callable[..., tuple] | None:
    """The fused kernel, with a log-sum-exp, for q (B, H, T, D) and k (B, G, S, D). None leaves it to the formula: with gradients;
    on a GPU in float32, before Ampere, or with padding that cuDNN does not take; on a CPU where the formula is faster."""
    aten, cuda = torch.ops.aten, torch.backends.cuda
    if torch.is_grad_enabled():  # the kernels' log-sum-exp has no gradient
        return None
    if q.device.type == "cpu":
        few = q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[1]
        plainly = few and (MKL_IS_SLOW or k.dtype != q.dtype)  # the formula reads keys faster
        return None if plainly else partial(aten._scaled_dot_product_flash_attention_for_cpu, attn_mask=bias)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and half and q.shape[3] <= 256 and cuda.is_flash_attention_available()):
        return None
    generation = torch.cuda.get_device_capability(q.device)[0]  # 8: Ampere; 9: Hopper, where cuDNN's attention is the fastest
    recurring = (q.shape[2] == 1 or q.shape[2] % RECURRING == 0) and k.shape[2] % RECURRING == 0
    built = torch.backends.cudnn.is_available() and torch.version.hip is None  # ROCm answers for cuDNN, and has none
    if generation == 9 and recurring and k.shape[3] <= 128 and built and cuda.cudnn_sdp_enabled():
        return partial(aten._scaled_dot_product_cudnn_attention, attn_bias=bias, compute_log_sumexp=True)
    return aten._scaled_dot_product_flash_attention if generation >= 8 and bias is None else None


def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, causal: bool = False, rows: int = ROWS) -> Attended:
    """Attention of q (B, H, T, D) over one set of keys k and values v (B, G, S, D). H is a multiple of G.

    real: (B, 1, S, 1), False where a key is padding; None: all real. causal: T = S, and query t sees keys 0 to t. k and v may
    be of another dtype than q, and padded as by `store`. Where no fused kernel computes it, the formula does, at most `rows` rows
    of scores at once.
    """
    B, H, T, D = q.shape
    if k.shape[1] != H and causal:  # folded, queries of several heads would stand in one causal triangle
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    bias = padding_bias(real, q.dtype)
    kernel, q = fused_kernel(q, k, bias), fold(q, k)
    if kernel is not None:
        out, lse = kernel(q, k.to(q.dtype), v.to(q.dtype), is_causal=causal, scale=D**-0.5)[:2]
    else:
        rows = max(min(rows, SCORES // (B * k.shape[1] * k.shape[2])), 1)
        starts = range(0, q.shape[2], rows)
        parts = [attend_plain(q[:, :, i : i + rows], k, v, bias, D**-0.5, i if causal else None) for i in starts]
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts))
    return out[..., :D].reshape(B, H, T, D), lse.reshape(B, H, T)


def attend_topk(q: Tensor, sets: Iterator[tuple[Tensor, Tensor, Tensor | None]], K: int) -> Attended:
    """kNN attention (paper, section 3.1): a query of q (B, H, T, D) attends to the K best keys of all sets (k, v, real), as in
    `attend`, by exact search: the best of each set compete with the best of those before it."""
    best, values, D = None, None, q.shape[3]
    for k, v, real in sets:
        new, at = score(fold(q, k), k, padding_bias(real, q.dtype), D**-0.5).topk(min(K, k.shape[2]))  # (B, G, H / G * T, K)
        b, g = (torch.arange(n, device=q.device) for n in k.shape[:2])
        found = v[b[:, None, None, None], g[:, None, None], at].to(q.dtype)  # (B, G, H / G * T, K, D)
        if best is not None:
            new, at = torch.cat((best, new), dim=-1).topk(min(K, best.shape[-1] + new.shape[-1]))
            found = torch.cat((values, found), dim=3).take_along_dim(at.unsqueeze(-1), dim=3)
        best, values = new, found
    out = (best.softmax(dim=-1).to(q.dtype).unsqueeze(-2) @ values)[..., :D]
    return out.reshape(q.shape), best.logsumexp(dim=-1).reshape(q.shape[:3])


def merge(a: Attended, b: Attended) -> Attended:
    """Attention over the union of two sets of keys from attention over each, exactly: one softmax over both gives set a the share
    exp(lse_a) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_a - lse_b)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share = (lse_a - lse_b).sigmoid().unsqueeze(-1)  # (B, H, T, 1)
    return out_b.float().lerp(out_a.float(), share), torch.logaddexp(lse_a, lse_b)


# -------------------------------------------------------------------------------------------- What a layer attends to
#
# `LocalCache.append_and_attend` and `cross_batch_attention` are each given a layer's new queries, keys, values and unrotated
# keys, and return what the queries got, (B, H, T, D).


def float8_scale(x: Tensor) -> Tensor:
    """What keys or values are divided by to be stored as float8, (B, G, 1, 1), from the first of them, x (B, G, n, D): for each
    head the power of two that puts the largest at 1/2 to 1. It rounds nothing, and float8 keeps all its digits up to 448."""
    largest = x.float().abs().amax(dim=(2, 3), keepdim=True)
    return torch.where(largest > 0, largest, 1).log2().ceil().exp2()


def stream(blocks: list[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The blocks on a device, one by one; each is good until the next one is asked for. From main memory to a GPU, a block is
    copied while the one before is computed with: there are two buffers."""
    if device.type != "cuda" or blocks[0][0].device == device or torch.is_grad_enabled():  # autograd keeps what it is given
        yield from ((k.to(device), v.to(device)) for k, v in blocks)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers = blocks[0][0].new_empty(2, 2, max(k.numel() for k, _ in blocks), device=device)
    used = [torch.cuda.Event(), torch.cuda.Event()]  # waiting for one that was never recorded returns at once
    copying.wait_stream(computing)  # which may still use the memory that the buffers now take
    for i, block in enumerate(blocks):
        with torch.cuda.stream(copying):  # computing with block i - 1 is queued by now, and goes on
            copying.wait_event(used[i % 2])
            rooms = zip(buffers[i % 2], block)
            block = tuple(room[: x.numel()].view(x.shape).copy_(x, non_blocking=True) for room, x in rooms)
        computing.wait_stream(copying)
        yield block
        used[i % 2].record(computing)


class Memory:
    """The unrotated keys and the values of everything before the local context, for one memory layer.

    They are kept in mem_dtype in blocks, (B, G, tokens, D) each, whose tokens never change, so that forks can share them. New
    tokens lengthen the last block while it has room. If not, they begin another, with room for as many tokens again. It takes in
    the blocks before it, newest first, as long as the next one is at most four times its own size, up to BLOCK: so few tokens
    are moved, and few blocks remain.

        after 6 windows   [. . . . . .]       after 8   [. . . . . .] [. .]       after 9   [. . . . . . . . . _ _ _ _ _ _ _ _ _]
    """

    BLOCK = 32768  # tokens: enough to keep a kernel busy, and the most that a GPU casts to the model's dtype at once
    merge = staticmethod(merge)  # of what blocks give; StepContext in generate.py puts a compiled one here

    def __init__(self, config: LongLlamaConfig):
        self.dtype, self.grouping, self.topk = getattr(torch, config.mem_dtype), config.mem_attention_grouping, config.mem_topk
        self.device = config.mem_device and torch.device(config.mem_device)
        self.blocks: list[tuple[Tensor, Tensor]] = []  # keys, values
        self.room: tuple[Tensor, Tensor] | tuple[()] = ()  # the last block and free space behind it, (B, G, capacity, D)
        self.scales: list[Tensor] = []  # float8 only: what keys and values were divided by, (B, G, 1, 1) each
        self.length = 0

    def append(self, k: Tensor, v: Tensor):
        """Remembers n tokens: unrotated keys and values (B, G, n, D)."""
        device, dtype, grad = self.device or k.device, self.dtype, torch.is_grad_enabled()
        self.length += k.shape[2]
        if dtype == torch.float8_e4m3fn:
            self.scales = self.scales or [float8_scale(k), float8_scale(v)]
            k, v = ((x / scale).clamp(-448, 448) for x, scale in zip((k, v), self.scales))
        self.blocks = list(self.blocks)  # forks share the old list
        for new in zip(k.split(self.BLOCK, dim=2), v.split(self.BLOCK, dim=2)):
            tokens = new[0].shape[2]
            if self.room and not grad and self.blocks[-1][0].shape[2] + tokens <= self.room[0].shape[2]:
                start = self.blocks.pop()[0].shape[2]
                tokens += start
                for room, x in zip(self.room, new):
                    room[:, :, start:tokens, : x.shape[3]] = x
            else:
                parts = [new]
                while self.blocks and self.blocks[-1][0].shape[2] <= min(4 * tokens, self.BLOCK - tokens):
                    parts.insert(0, self.blocks.pop())
                    tokens += parts[0][0].shape[2]
                # Streamed blocks are copied whole, and what has gradients cannot be written into.
                capacity = tokens if self.device or grad else min(2 * tokens, self.BLOCK)
                pin = k.is_cuda and device.type == "cpu"
                self.room = tuple(store(x, capacity, dtype, device, pin) for x in zip(*parts))
            # Autograd may have saved an earlier block, and refuses it once its storage is written to, even behind its tokens.
            # It does not see writes through .data.
            self.blocks.append(tuple((x if grad else x.data)[:, :, :tokens] for x in self.room))

    def attend(self, q: Tensor, real: Tensor | None) -> Attended:
        """Attention of q (B, H, T, D) over all tokens remembered, at least one; `real` begins with theirs, see `attend`."""
        if not self.scales:
            return self.attend_stored(q, real)
        repeats = q.shape[1] // self.scales[0].shape[1]  # query heads that share a key head
        k_scale, v_scale = (x.repeat_interleave(repeats, dim=1).to(q.dtype) for x in self.scales)  # (B, H, 1, 1) each
        out, lse = self.attend_stored(q * k_scale, real)  # q (k s) = (q s) k: the query carries the keys' scale
        return out * v_scale, lse

    def attend_stored(self, q: Tensor, real: Tensor | None) -> Attended:
        """`attend`, to keys and values as they are stored: float8's still divided by their scales."""
        B, H, _, D = q.shape
        heads, queries = self.grouping or (H, ROWS)
        rows = heads * queries // H  # of all heads, so as to make no more scores at once; 0 is taken as 1
        if self.topk is None:
            return reduce(self.merge, (attend(q, *block, rows=rows) for block in self.blocks_on(q.device, real)))
        K = min(self.topk, self.length)
        rows = max(min(rows, GATHERED // (B * H * K * D)), 1)  # streamed memory is copied anew for each part
        parts = [attend_topk(part, self.blocks_on(q.device, real), K) for part in q.split(rows, dim=2)]
        return tuple(torch.cat(x, dim=2) for x in zip(*parts))

    def blocks_on(self, device: torch.device, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The blocks on a device, each with its part of `real`: keys and values (B, G, n, D), and (B, 1, n, 1) or None."""
        sizes = [k.shape[2] for k, _ in self.blocks]
        parts = [None] * len(sizes) if real is None else real[:, :, : self.length].split(sizes, dim=2)
        yield from ((*block, part) for block, part in zip(stream(self.blocks, device), parts))


class LocalCache:
    """The local context of one layer, and its memory, or None. `tensors` are rotated keys, values and, with a memory, unrotated
    keys, (B, G, capacity, D) each: they hold `length` tokens, and have room for more, to be written in place."""

    def __init__(self, config: LongLlamaConfig, memory: Memory | None, rotates: bool):
        self.config, self.memory, self.rotates = config, memory, rotates
        self.tensors, self.length = [], 0

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, real: Tensor | None) -> Tensor:
        """T new tokens join the local context. They attend with one softmax to it and, in a memory layer, to all of memory
        (paper, section 3.1). real: (B, 1, tokens read so far, 1), see `attend`: memory's first, the local context's last."""
        k, v = self.append([k, v] if self.memory is None else [k, v, unrotated])
        T, S = q.shape[2], self.length
        sets = [k, v] if real is None else [k, v, real[:, :, -S:]]
        if T == 1 or T == S:  # one token sees everything; if T == S, nothing was there before
            attended = attend(q, *sets, causal=T == S)
        else:  # to what was there before, and causally to the new tokens themselves
            old, new = zip(*(x.split((S - T, T), dim=2) for x in sets))
            attended = merge(attend(q, *old), attend(q, *new, causal=True))
        if self.memory is not None and self.memory.length:
            attended = merge(self.memory.attend(q, real), attended)
        return attended[0]

    def append(self, new: list[Tensor]) -> list[Tensor]:
        """Adds n tokens, what `tensors` holds of them, (B, G, n, D) each; returns all rotated keys, and values."""
        old, start = self.filled(), self.length
        self.length += new[0].shape[2]
        window, grad = self.config.max_position_embeddings, torch.is_grad_enabled()
        if grad or not old or self.length > self.tensors[0].shape[2]:  # what autograd keeps must not be written into
            capacity = self.length if grad else max(self.length, window)
            self.tensors = [store(x, capacity, x[-1].dtype, x[-1].device) for x in (zip(old, new) if old else zip(new))]
        else:
            for tensor, x in zip(self.tensors, new):
                tensor[:, :, start : self.length, : x.shape[3]] = x
        return self.filled()[:2]

    def filled(self) -> list[Tensor]:
        return [x[:, :, : self.length] for x in self.tensors]

    def restart(self, keep: int):
        """All but the newest `keep` tokens move into memory, or are forgotten; those stay, at positions from 0 on."""
        if not self.tensors:  # a prefix leaves no local context above the last memory layer
            return
        moved, D = self.length - keep, self.config.head_dim
        old, kept = zip(*(x[..., :D].split((moved, keep), dim=2) for x in self.filled()))
        if self.memory is not None:
            _, v, unrotated = old
            self.memory.append(unrotated, v)
        self.tensors, self.length = [], 0
        if keep:
            k, *others = kept
            if self.rotates:  # RoPE's angles add up, so keys are turned back by as many positions as tokens moved
                k = rotate(k, rope_table(-moved, 1, self.config, k.device))
            self.append([k, *others])

    def fork(self) -> "LocalCache":
        twin = copy(self)
        if self.memory is not None:
            twin.memory = copy(self.memory)  # which shares its blocks
            twin.memory.room = ()
        twin.tensors = self.filled()  # without room: the twin never writes where this one does
        return twin


class Cache:
    """What a model knows of the tokens that it has read: every layer's local context, and the memory layers' memory. A model
    writes into the cache that it is given: to go on from one point more than once, go on from forks."""

    def __init__(self, config: LongLlamaConfig, new_memory: Callable[[LongLlamaConfig], Memory] = Memory):
        """new_memory: makes the memory of a layer, of `Memory` or a subclass."""
        self.config = config
        memories = [new_memory(config) if i in config.mem_layers else None for i in range(config.num_hidden_layers)]
        self.layers = [LocalCache(config, memory, config.rotates(i)) for i, memory in enumerate(memories)]
        self.local_length = 0  # tokens in the local context, and so the position of the next
        self.memory_length = 0  # tokens in memory
        self.batch_size: int | None = None  # rows; None: nothing was read yet
        self.real: Tensor | None = None  # (B, 1, memory_length + local_length, 1), False where padded; None: no padding

    @property
    def memory_bytes(self) -> int:
        return sum(x.nbytes for layer in self.layers if layer.memory for block in layer.memory.blocks for x in block)

    def restart(self, keep: int = 0):
        """The next local context starts at position 0. All but the newest `keep` tokens leave this one: into memory in memory
        layers, for good in the others. Those kept get positions 0, 1, ..."""
        moved = self.local_length - keep
        if moved > 0:
            for layer in self.layers:
                layer.restart(keep)
            self.memory_length += moved
            self.local_length = keep

    def fork(self) -> "Cache":
        """A cache that goes on by itself from here. What is remembered is shared, not copied; the futures are separate."""
        twin = copy(self)
        twin.layers = [layer.fork() for layer in self.layers]
        return twin


def cross_batch_attention(q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, extra: list[int]) -> Tensor:
    """FoT's training attention (paper, section 3.2): entry b sees itself, causally, and all of the extra[b] entries before.

    q (B, H, T, D); k, v and the unrotated keys (B, G, T, D) -> (B, H, T, D). The other entries' keys are unrotated, as
    they would be in memory. One softmax goes over them and the entry's own keys, and gradients flow into all of them.
    """
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if not any(extra):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    unrotated, values, outs = unrotated.unbind(), v.unbind(), []
    for b, n in enumerate(extra):
        keys_b = torch.cat((*unrotated[b - n : b], k[b]), dim=1)  # (G, (n + 1) * T, D), its own keys last
        values_b = torch.cat(values[b - n : b + 1], dim=1)
        seen = torch.ones(T, (n + 1) * T, dtype=torch.bool, device=q.device).tril(n * T)
        outs.append(F.scaled_dot_product_attention(q[b, None], keys_b[None], values_b[None], seen, enable_gqa=gqa))
    return torch.cat(outs)


def cross_batch_extra(B: int, cross_batch_range: int, packing: int) -> list[int]:
    """How many of the entries before it each of the B entries of a batch sees; at most cross_batch_range.

    `packing` consecutive entries are chunks of one document: the nearest extra contexts are the true past (positives), the
    others unrelated (negatives). Stepping: the later an entry in its document, the more it sees, so one batch trains all ranges.
    """
    step = -(-(cross_batch_range + 1) // max(packing - 1, 1))
    return [min(b % packing * step, cross_batch_range, b) for b in range(B)]  # before entry b there are b


# ----------------------------------------------------------------------------------------------------------- Block


class Attention(nn.Module):
    def __init__(self, config: LongLlamaConfig, rotates: bool):
        super().__init__()
        self.H, self.G, self.D, self.rotates = config.num_attention_heads, config.num_key_value_heads, config.head_dim, rotates
        self.qkv_proj = Linear(config.hidden_size, (self.H + 2 * self.G) * self.D, bias=False)
        self.o_proj = Linear(self.H * self.D, config.hidden_size, bias=False)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D); k, v, and k unrotated, (B, G, T, D) each."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.D)).transpose(1, 2)  # (B, H + 2 * G, T, D)
        unrotated, v = heads.split((self.H + self.G, self.G), dim=1)
        qk = rotate(unrotated, rope) if self.rotates else unrotated
        return qk[:, : self.H], qk[:, self.H :], v, unrotated[:, self.H :]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LongLlamaConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LongLlamaConfig, rotates: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rotates)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, attend_to: Callable[..., Tensor]) -> Tensor:
        """x (B, T, C) -> (B, T, C). attend_to: q, k, v and k unrotated -> what the queries got, (B, H, T, D). It has all the
        state: the parts before and after it have none, and can be compiled."""
        return self.update(x, attend_to(*self.project(x, rope)))

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def update(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, T, C) and what its queries got, (B, H, T, D) -> (B, T, C)."""
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2).to(x.dtype))
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------- Windows


def split_into_windows(T: int, last: int, cache: Cache, config: LongLlamaConfig) -> list[tuple[int, int, int]]:
    """How T new tokens are read: the prefix, all but the last `last`, in windows of max_position_embeddings, then the end. Each
    piece is (start, stop, keep): all but the newest `keep` local tokens move into memory, then tokens start to stop - 1 join the
    local context. On a fresh cache each piece is a local context of its own; otherwise it joins the one that is there if both
    fit one window, and if not, only the newest keep_local tokens of that stay. Without memory layers there is one piece."""
    window, local = config.max_position_embeddings, cache.local_length
    if not config.mem_layers:
        return [(0, T, local)]
    fresh, prefix, pieces = local + cache.memory_length == 0, max(T - last, 0), []
    for start, stop in pairwise([*range(0, prefix, window), prefix, T]):
        room, keep = window - (stop - start), 0
        if not fresh:
            keep = local if local <= room else max(min(config.keep_local, room), 0)
        local = keep + stop - start
        pieces.append((start, stop, keep))
    return pieces


# --------------------------------------------------------------------------------------------------------- Sampling


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, rng: torch.Generator | None) -> Tensor:
    """One id for each row of logits (B, V), float32 -> (B,). Raises ValueError for logits that are no numbers."""
    require(bool(logits.isfinite().all()), "logits are no finite numbers: weights are damaged, or overflow this dtype")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probs = logits.softmax(dim=-1)
    if top_p is not None:  # an id stays if those likelier sum to less than top_p: the first always does
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=rng)).squeeze(-1)


# --------------------------------------------------------------------------------------------------------- Loading


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file of weights in a Hugging Face folder, or else the shards that its index names. They must lie beside it."""
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{index} is broken: it must have a weight_map of tensor names to file names") from None
    require(not outside, f"{index} names a file outside of its folder, which is not followed: {outside[:1]}")
    return [folder / shard for shard in shards]


def find_weights(folder: Path) -> dict[str, tuple[Path, list[int], torch.dtype]]:
    """Name -> (file, shape, dtype) of the tensors in model.safetensors, or its shards; none is read."""
    found = {}
    for path in weight_files(folder, "model.safetensors"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: get it, or run convert.py if the weights are pytorch_model.bin files")
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    known = part.get_dtype() in WEIGHT_DTYPES  # and not whole numbers, say, that would need a scale
                    require(known, f"{path}: {name} is {part.get_dtype()}, which is not one of {', '.join(WEIGHT_DTYPES)}")
                    found[name] = path, part.get_shape(), WEIGHT_DTYPES[part.get_dtype()]
        except SafetensorError as error:
            raise ValueError(f"{path} is broken or cut short ({error}): get it again") from None
    return {name: at for name, at in found.items() if not name.endswith("rotary_emb.inv_freq")}


# ----------------------------------------------------------------------------------------------------------- Model


class LongLlama(nn.Module):
    """LLaMA with memory layers; without any, LLaMA."""

    def __init__(self, config: LongLlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.rotates(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.hidden_size**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, V)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(self.norm(x), head.weight)

    def forward(
        self, input_ids: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
        last_context_length: int | None = None, logits_to_keep: int = 0,
    ) -> tuple[Tensor, Cache]:
        """Reads input_ids (B, T) after what the cache holds; returns logits (B, T, V), and the cache, T tokens further on.

        attention_mask: (B, T), for the new tokens only; 0 is padding, on the left. last_context_length: instead of the
        config's. logits_to_keep: n > 0 gives the logits of the last n positions only, (B, n, V), and saves all work that
        only the others need. Logits at padding are undefined. Reading without gradients ends those of what was read before.
        Raises ValueError where shapes or lengths do not fit. After any other exception, Ctrl-C included, the cache is of no use:
        go on from a fork.
        """
        (B, T), window = input_ids.shape, self.config.max_position_embeddings
        cache = Cache(self.config) if cache is None else cache
        last = self.config.last_context_length if last_context_length is None else last_context_length
        length = cache.local_length + T
        require(T > 0, "input_ids must hold at least one token; an empty text starts from the bos token")
        require(is_count(last), f"last_context_length must be at least 1, not {last!r}")
        require(logits_to_keep >= 0, f"logits_to_keep must be at least 0, not {logits_to_keep}")
        float8 = self.config.mem_layers and self.config.mem_dtype == "float8_e4m3fn"
        require(not (float8 and torch.is_grad_enabled()), "float8 memory has no gradients: read under torch.no_grad()")
        fits = self.config.mem_layers or length <= window
        require(fits, f"{length} tokens exceed the window of {window}, and a model without mem_layers has no memory")
        require(cache.batch_size in (None, B), f"input_ids has {B} rows, and the cache has {cache.batch_size}")
        configs = self.config, cache.config
        shapes = {(c.num_hidden_layers, c.mem_layers, c.num_key_value_heads, c.head_dim) for c in configs}
        require(len(shapes) == 1, "the cache was made for a model of another shape")
        if attention_mask is not None:
            require(attention_mask.shape == (B, T), f"attention_mask must be {(B, T)}, not {tuple(attention_mask.shape)}")

        cache.batch_size = B
        if cache.real is not None or (attention_mask is not None and not attention_mask.all()):  # padding, before or now
            now = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            before = now.new_ones(B, 1, cache.memory_length + cache.local_length, 1) if cache.real is None else cache.real
            cache.real = torch.cat((before.bool(), now.bool()[:, None, :, None]), dim=2)
        wanted = T - logits_to_keep if logits_to_keep else 0  # the first position whose logits are wanted
        hidden = []
        pieces = split_into_windows(T, last, cache, self.config)
        for i, (start, stop, keep) in enumerate(pieces):
            cache.restart(keep)
            only_remember = stop <= wanted and pieces[i + 1][2] == 0  # so all of it moves into memory next
            x = self.read(input_ids[:, start:stop], cache, only_remember)
            if stop > wanted:
                hidden.append(x[:, max(wanted - start, 0) :])
        return self.logits(torch.cat(hidden, dim=1)), cache

    def read(self, input_ids: Tensor, cache: Cache, only_remember: bool) -> Tensor:
        """T tokens that join the local context, (B, T) -> hidden states (B, T, C). only_remember: all of it moves into memory
        next, and no logits are wanted, so what comes after the last memory layer's keys and values is left out, and the layers
        above get no local context."""
        T = input_ids.shape[1]
        rope = rope_table(cache.local_length, T, self.config, input_ids.device)
        cache.local_length += T
        x, real = self.embed_tokens(input_ids), cache.real
        if real is not None:  # without what this call reads after these tokens
            real = real[:, :, : cache.memory_length + cache.local_length]
        for i, (layer, context) in enumerate(zip(self.layers, cache.layers)):
            if only_remember and i == max(self.config.mem_layers):
                context.append(list(layer.project(x, rope)[1:]))
                break
            x = layer(x, rope, partial(context.append_and_attend, real=real))
        return x

    def forward_cross_batch(self, input_ids: Tensor, extra: list[int]) -> Tensor:
        """FoT training: input_ids (B, T) -> logits (B, T, V). Entries are local contexts, without caches; in the memory
        layers entry b also sees the extra[b] entries before it, see `cross_batch_extra`."""
        fits = len(extra) == len(input_ids) and all(0 <= n <= b for b, n in enumerate(extra))
        require(fits, f"extra must say how many of the entries before it each of {len(input_ids)} entries sees, not {extra}")
        rope = rope_table(0, input_ids.shape[1], self.config, input_ids.device)
        x = self.embed_tokens(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, partial(cross_batch_attention, extra=extra if i in self.config.mem_layers else []))
        return self.logits(x)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, seed: int | None = None, eos_token_id: int | None = -1, cache: Cache | None = None,
        attention_mask: Tensor | None = None, last_context_length: int | None = None,
    ) -> Iterator[Tensor]:
        """Continues input_ids (B, T): yields ids (B,), one for each row, at most max_new_tokens times.

        temperature 0 takes the likeliest. top_k, top_p: draw from the k likeliest only, and from the likeliest that make up
        probability p. Ends when all rows had eos_token_id (-1: the config's; None: never); a row that had it gets
        pad_token_id. Reads after the cache and writes into it all but the ids yielded last: to go on, begin with those.
        """
        require(temperature == 0 or temperature >= 1e-5, f"temperature must be 0, or at least 1e-5, not {temperature}")
        require(top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}")
        require(top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
        ends = attention_mask is None or attention_mask[..., -1:].all()
        require(ends, "attention_mask has padding at the end of a row: padding stands on the left")
        eos = self.config.eos_token_id if eos_token_id == -1 else eos_token_id
        rng = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # faster than no_grad; ids are drawn outside of it, to be ordinary tensors
                logits, cache = self(input_ids, cache, attention_mask, last_context_length, logits_to_keep=1)
            ids = sample(logits[:, -1].float(), temperature, top_k, top_p, rng).masked_fill(ended, self.config.pad_token_id)
            yield ids
            if eos is not None:
                ended |= ids == eos
                if ended.all():
                    return
            input_ids, attention_mask = ids[:, None], None

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu", dtype=torch.float32, **config_overrides) -> "LongLlama":
        """The model in a folder of config.json and model.safetensors (or Hugging Face's shards), straight onto the device. Raises
        FileNotFoundError or ValueError, naming the file, the field or the tensor."""
        folder = Path(folder)
        config = LongLlamaConfig.from_json(folder / "config.json", **config_overrides)
        found = find_weights(folder)
        model = cls.without_storage(config, {name: shape for name, (_, shape, _) in found.items()}, folder)
        model = model.to(dtype).to_empty(device=device)
        for name, tensor in model.hf_tensors().items():
            with safe_open(found[name][0], framework="pt", device=str(device)) as file:
                tensor.copy_(file.get_tensor(name))
        return model.eval()

    @classmethod
    def without_storage(cls, config: LongLlamaConfig, found: dict[str, list[int]], where: Path) -> "LongLlama":
        """A model that has shapes only. Raises ValueError where the tensors found, name -> shape, are not those of the model."""
        layers = config.num_hidden_layers
        require(layers <= len(found), f"{where}: config.json has {layers} layers, and there are {len(found)} tensors in all")
        with torch.device("meta"):
            model = cls(config)
        right = {name: list(tensor.shape) for name, tensor in model.hf_tensors().items()}
        names = (found.keys() | right) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        wrong = sorted(name for name in names if found.get(name) != right.get(name))
        listed = [f"{name} is {found.get(name, 'missing')}, not {right.get(name, 'expected')}" for name in wrong[:3]]
        require(not wrong, f"{where}: weights and config.json differ in {len(wrong)} tensors: {'; '.join(listed)}")
        return model

    def hf_tensors(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's names: views, since q, k, v and gate, up are one matrix each here, for speed."""
        config, tensors = self.config, {}
        kv = config.num_key_value_heads * config.head_dim
        fused = {
            "qkv_proj": (("q_proj", "k_proj", "v_proj"), (config.hidden_size, kv, kv)),
            "gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size, config.intermediate_size)),
        }
        for name, parameter in self.named_parameters():
            module, prefix = name.split(".")[-2], "" if name.startswith("lm_head") else "model."
            theirs, rows = fused.get(module, ((module,), (len(parameter),)))
            parts = zip(theirs, parameter.detach().split(rows))
            tensors |= {prefix + name.replace(module, their): part for their, part in parts}
        return tensors
