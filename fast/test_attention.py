"""Attention to one set of keys, by kernel and by formula, against the formula in float64."""

import pytest
import torch

from fast.attention import FEW_ROWS, attend, attend_topk, fold
from fast.linear import LIMITS, Limits
from fast.memory import FastMemory
from fast.storage import store
from fast.test_model import DEVICES, Watching, all_of, each_mkl, naive, small_config
from longllama import merge


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 8e-2)])  # scores up to 20, rounded
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_merged_over_sets_is_one_softmax_over_their_union(G, padded, dtype, bound, device, mkl):
    torch.manual_seed(0)
    B, H, T, D, sizes = 2, 6, 5, 16, (30, 1, 5)
    q, k, v = (torch.randn(B, n, S, D).to(device, dtype) for n, S in ((H, T), (G, 36), (G, 36)))
    q, real = q * 3, torch.ones(B, 1, 36, 1, dtype=torch.bool, device=device)
    if padded:
        real[0, :, :30] = False  # a whole set of padding, which must get no weight
        real[1, :, :7] = False
    parts = zip(*(x.split(sizes, dim=2) for x in (k, v, real)), (False, False, True))
    out, lse = None, None
    for k_i, v_i, real_i, causal in parts:
        part = attend(q, k_i, v_i, real_i if padded else None, causal, limits=Limits(**mkl))
        out, lse = part if out is None else merge((out, lse), part)
    seen = real.mT & torch.ones(T, 36, dtype=torch.bool, device=device).tril(31)
    assert (out - naive(q, k, v, seen)).abs().max() < bound


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [0, 300, 1024])
@pytest.mark.parametrize(
    "T, S, causal", [(1, 2048, False), (1024, 2048, False), (1024, 1024, True), (1000, 1024, False)]
)
def test_attention_of_many_queries_and_keys_is_near_float64(T, S, causal, padded, dtype, device):
    torch.manual_seed(0)
    B, H, G, D = 2, 4, 2, 12
    q, k, v = (torch.randn(B, n, tokens, D).to(device, dtype) for n, tokens in ((H, T), (G, S), (G, S)))
    real = torch.ones(B, 1, S, 1, dtype=torch.bool, device=device)
    real[0, :, :padded] = False
    seen = (real.mT & torch.ones(T, S, dtype=torch.bool, device=device).tril(0 if causal else S)).expand(B, H, T, S)
    k, v = (store((x,), S + 8, dtype, x.device)[:, :, :S] for x in (k, v))  # with heads of 16
    out, lse = attend(q, k, v, real if padded else None, causal)
    scores = (q.double() @ k[..., :D].double().repeat_interleave(2, dim=1).mT / D**0.5).masked_fill(~seen, -torch.inf)
    sees = seen.any(dim=-1)  # padding that sees nothing gets anything
    assert out.shape == q.shape and out.isfinite().all() and lse.isfinite().all()
    assert (lse[~sees] < -1e4).all()  # no share of what others see, once merged
    right, bound = naive(q, k[..., :D], v[..., :D], seen), 8 * torch.finfo(dtype).eps
    assert (out - right)[sees].norm() / right[sees].norm() < bound
    assert (lse - scores.logsumexp(dim=-1))[sees].abs().max() < bound


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("T", [1, FEW_ROWS // 2, FEW_ROWS])
def test_few_queries_and_many_of_keys_of_any_dtype_are_near_float64(T, stored, mkl):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 12), *torch.randn(2, 2, 2, 300, 12)
    real = torch.rand(2, 1, 300, 1) < 0.7
    k, v = (store((x,), 300, stored, x.device) for x in (k, v))
    right = naive(q, k[..., :12].float(), v[..., :12].float(), real.mT)
    for cast in (100, LIMITS.cast):  # in many pieces, and in one
        out, _ = attend(q, k, v, real, limits=Limits(**mkl, cast=cast))
        assert out.shape == q.shape and (out - right).abs().max() < 1e-5


@torch.no_grad()
@each_mkl
def test_a_query_that_sees_only_padding_gives_no_nan(mkl):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nothing = torch.zeros(1, 1, 3, 1, dtype=torch.bool)
        part = attend(q.to(dtype), k.to(dtype), k.to(dtype), nothing, limits=Limits(**mkl))
        assert all(x.isfinite().all() for x in (*part, *merge(part, part)))


@torch.no_grad()
@each_mkl
def test_many_queries_make_no_matrix_of_scores(mkl):
    q, (k, v) = torch.randn(1, 4, 200, 8), torch.randn(2, 1, 4, 1000, 8).bfloat16()
    with Watching() as seen:
        attend(q, k, v, limits=Limits(**mkl))
    assert 0 < seen.numel <= k.numel()


@torch.no_grad()
@each_mkl
def test_grouped_queries_copy_no_keys(mkl):
    q, (k, v) = torch.randn(1, 8, 1, 8), torch.randn(2, 1, 1, 4096, 8)
    with Watching() as seen:
        attend(q, k, v, limits=Limits(**mkl))
    assert 0 < seen.numel <= 2 * k.numel()


def test_queries_that_share_a_key_head_stand_side_by_side_and_are_padded_as_keys_are():
    q = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5).float()
    folded = fold(q, torch.empty(2, 2, 7, 8))
    assert folded.shape == (2, 2, 6, 8) and (folded[..., 5:] == 0).all()
    assert torch.equal(folded[1, 1, :, :5], torch.cat((q[1, 2], q[1, 3])))


@pytest.mark.parametrize("limit", ["scores", "cast", "gathered", "rows"])
def test_limits_that_allow_nothing_leave_one_row_or_token_at_once(limit):
    q, k, v = torch.randn(3, 2, 4, 24, 8)
    with torch.no_grad():
        for K in (None, 7):
            config, found = small_config(mem_topk=K, mem_dtype="float16"), []
            for limits in (LIMITS, Limits(**{limit: 1})):
                memory = FastMemory(config, limits=limits)
                memory.append(k, v)
                found.append([memory.attend(q[:, :, :few], None)[0] for few in (1, 24)])
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(*found))


@torch.no_grad()
def test_values_that_are_cast_in_pieces_are_summed_in_float32():
    q = torch.zeros(1, 1, 1, 8).bfloat16()
    k, v = (x.to(torch.float8_e4m3fn) for x in 1 + torch.rand(2, 1, 1, 2000, 8))
    right = naive(q, k.float(), v.float(), all_of(q))
    assert (attend(q, k, v, limits=Limits(cast=8))[0] - right).abs().max() < 1e-2 * right.abs().max()


@pytest.mark.parametrize("B, G, causal, heads", [(1, 4, False, 4), (3, 2, False, 2), (1, 4, True, 4), (3, 2, True, 4)])
def test_the_plain_formula_holds_few_scores_at_once(B, G, causal, heads):
    """heads: of scores. Queries that share a key head stand side by side, but not where they are causal."""
    q, k, v = torch.randn(B, 4, 300, 8), *torch.randn(2, B, G, 300, 8)  # with gradients, so it is the plain formula
    whole = attend(q, k, v, causal=causal)
    limits = Limits(scores=300 * B * heads * 20)  # 20 rows of each; more than keys have numbers
    with Watching() as seen:
        parts = attend(q, k, v, causal=causal, limits=limits)
    assert seen.numel == limits.scores
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(whole, parts))
    seen_by_all = torch.ones(300, 300, dtype=torch.bool).tril(0 if causal else 300)
    assert (parts[0] - naive(q, k, v, seen_by_all)).abs().max() < 1e-5


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("G", [2, 4])
@pytest.mark.parametrize("K", [1, 7, 40])
def test_a_search_over_sets_finds_the_best_keys_of_all(K, G, padded, mkl):
    torch.manual_seed(0)
    q, (k, v), real = torch.randn(2, 4, 5, 12), torch.randn(2, 2, G, 40, 12), torch.rand(2, 1, 40, 1) < 0.5
    real = real | torch.tensor(not padded)
    stored = [store((x,), 40, x.dtype, x.device).split((3, 20, 17), dim=2) for x in (k, v)]  # one has fewer than K
    sets = zip(*stored, real.split((3, 20, 17), dim=2) if padded else [None] * 3)
    out, lse = attend_topk(q, iter(list(sets)), K, Limits(**mkl, cast=100))
    scores = (q @ k.repeat_interleave(4 // G, dim=1).mT / 12**0.5).masked_fill(~real.mT, -torch.inf)
    best = (scores >= scores.topk(K).values[..., -1:]) & real.mT
    assert out.shape == q.shape and (out - naive(q, k, v, best)).abs().max() < 1e-5
    assert (lse - scores.masked_fill(~best, -torch.inf).logsumexp(dim=-1)).abs().max() < 1e-5
