"""Attention to one set of keys by the fastest kernel that there is for it, with its log-sum-exp.

On a CPU the fused kernel reads keys of the queries' dtype, and the plain formula, in pieces that stay in the cache, all others.
On Hopper cuDNN's kernel reads 2,048 queries x 32,768 keys twice as fast as FlashAttention (485 against 243 TFLOP/s on an H200).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.linear import LIMITS, Limits
from fast.storage import cast_pieces
from longllama import Attended

FEW_ROWS = 16  # with at most this many queries, time goes into reading keys, not into arithmetic
RECURRING = (
    1024  # cuDNN takes 60 ms to prepare for a new shape: it gets those that recur, one query or multiples of this
)


def fold(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D) -> (B, G, H / G * T, D of k): queries that share a key head stand side by side, and no key is copied."""
    if (
        k.shape[3] > q.shape[3]
    ):  # contiguous: of heads of 2, each half is 1 wide, and torch may take q for channels-last
        q = F.pad(q, (0, k.shape[3] - q.shape[3])).contiguous()
    return q.reshape(len(q), k.shape[1], -1, k.shape[3])


def padding_bias(real: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to scores, (B, 1 or G, 1, S). Padding gets half the least finite number, not -inf: a query that sees only
    padding gets something, and never NaN, also by a kernel that turns scores into powers of 2."""
    return None if real is None else (~real.mT).to(dtype) * (torch.finfo(dtype).min / 2)


def score(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, limits: Limits = LIMITS) -> Tensor:
    """Folded queries q (B, G, R, D), k (B, G, S, D) -> float32 (B, G, R, S)."""
    turned = (
        limits.slow_mkl and q.device.type == "cpu" and k.dtype == q.dtype and q.shape[2] <= FEW_ROWS
    )  # reads keys in order
    pieces = [(piece @ q.mT).mT if turned else q @ piece.mT for piece in cast_pieces(k, q.dtype, limits.cast)]
    scores = torch.cat(pieces, dim=3).float() * scale
    return scores if bias is None else scores + bias


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, first: int | None, limits: Limits = LIMITS
) -> Attended:
    """The formula, with the softmax in float32: q (B, G, R, D) -> (B, G, R, D) and (B, G, R). first: the first query sees
    keys 0 to first, each next one more; None: all see all."""
    scores = score(q, k, bias, scale, limits)
    if first is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    weights, out, start = scores.softmax(dim=-1).to(q.dtype), 0, 0
    for piece in cast_pieces(v, q.dtype, limits.cast):
        out = out + (weights[..., start : start + piece.shape[2]] @ piece).float()
        start += piece.shape[2]
    return out, scores.logsumexp(dim=-1)


def fused_kernel(q: Tensor, k: Tensor, bias: Tensor | None, limits: Limits = LIMITS) -> Callable[..., tuple] | None:
    """The fused kernel, with a log-sum-exp, for q (B, H, T, D) and k (B, G, S, D). None leaves it to the formula: with gradients;
    on a GPU in float32, before Ampere, or with padding that cuDNN does not take; on a CPU where the formula is faster."""
    aten, cuda = torch.ops.aten, torch.backends.cuda
    if torch.is_grad_enabled():  # the kernels' log-sum-exp has no gradient
        return None
    if q.device.type == "cpu":
        few = q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[1]
        plainly = few and (limits.slow_mkl or k.dtype != q.dtype)  # the formula reads keys faster
        return None if plainly else partial(aten._scaled_dot_product_flash_attention_for_cpu, attn_mask=bias)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not (q.is_cuda and half and q.shape[3] <= 256 and cuda.is_flash_attention_available()):
        return None
    generation = torch.cuda.get_device_capability(q.device)[
        0
    ]  # 8: Ampere; 9: Hopper, where cuDNN's attention is the fastest
    recurring = (q.shape[2] == 1 or q.shape[2] % RECURRING == 0) and k.shape[2] % RECURRING == 0
    built = torch.backends.cudnn.is_available() and torch.version.hip is None  # ROCm answers for cuDNN, and has none
    if generation == 9 and recurring and k.shape[3] <= 128 and built and cuda.cudnn_sdp_enabled():
        return partial(aten._scaled_dot_product_cudnn_attention, attn_bias=bias, compute_log_sumexp=True)
    return aten._scaled_dot_product_flash_attention if generation >= 8 and bias is None else None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None = None,
    causal: bool = False,
    rows: int | None = None,
    limits: Limits = LIMITS,
) -> Attended:
    """Attention of q (B, H, T, D) over one set of keys k and values v (B, G, S, D). H is a multiple of G.

    real: (B, 1 or G, S, 1), False where a key is padding; None: all real. causal: T = S, and query t sees keys 0 to t. k and
    v may be of another dtype than q, and padded as by `store`. Where no fused kernel computes it, the formula does, at most
    `rows` rows of scores at once (None: limits.rows).
    """
    B, H, T, D = q.shape
    if k.shape[1] != H and causal:  # folded, queries of several heads would stand in one causal triangle
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    bias = padding_bias(real, q.dtype)
    kernel, q = fused_kernel(q, k, bias, limits), fold(q, k)
    if kernel is not None:
        out, lse = kernel(q, k.to(q.dtype), v.to(q.dtype), is_causal=causal, scale=D**-0.5)[:2]
    else:
        rows = max(min(limits.rows if rows is None else rows, limits.scores // (B * k.shape[1] * k.shape[2])), 1)
        starts = range(0, q.shape[2], rows)
        parts = [
            attend_plain(q[:, :, i : i + rows], k, v, bias, D**-0.5, i if causal else None, limits) for i in starts
        ]
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts))
    return out[..., :D].reshape(B, H, T, D), lse.reshape(B, H, T)


def attend_topk(
    q: Tensor, sets: Iterator[tuple[Tensor, Tensor, Tensor | None]], K: int, limits: Limits = LIMITS
) -> Attended:
    """kNN attention (paper, section 3.1): a query of q (B, H, T, D) attends to the K best keys of all sets (k, v, real), as in
    `attend`, by exact search: the best of each set compete with the best of those before it."""
    best, values, D = None, None, q.shape[3]
    for k, v, real in sets:
        scores = score(fold(q, k), k, padding_bias(real, q.dtype), D**-0.5, limits)
        new, at = scores.topk(min(K, k.shape[2]))  # (B, G, H / G * T, K)
        b, g = (torch.arange(n, device=q.device) for n in k.shape[:2])
        found = v[b[:, None, None, None], g[:, None, None], at].to(q.dtype)  # (B, G, H / G * T, K, D)
        if best is not None:
            new, at = torch.cat((best, new), dim=-1).topk(min(K, best.shape[-1] + new.shape[-1]))
            found = torch.cat((values, found), dim=3).take_along_dim(at.unsqueeze(-1), dim=3)
        best, values = new, found
    out = (best.softmax(dim=-1).to(q.dtype).unsqueeze(-2) @ values)[..., :D]
    return out.reshape(q.shape), best.logsumexp(dim=-1).reshape(q.shape[:3])
