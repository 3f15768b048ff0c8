"""What the README and the docstrings claim, checked: python -m pytest

Truth comes from elsewhere wherever there is one: numbers recorded from the original LongLLaMA code (testdata/), transformers'
LlamaForCausalLM, SentencePiece itself, and float64 formulas of a few lines.
"""

import contextlib
import errno
import gc
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import convert
import generate
import longllama
from longllama import Cache, LongLlama, LongLlamaConfig, attend, cross_batch_attention, cross_batch_extra, merge
from tokenizer import StreamDecoder, Tokenizer

HERE = Path(__file__).resolve().parent
TESTDATA, TINY = HERE / "testdata", HERE / "tiny"
CASES = json.loads((TESTDATA / "cases.json").read_text())
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
REAL_TOKENIZERS = HERE.parent / "shared" / "tokenizers"  # too large to be kept here


@pytest.fixture(scope="session")
def expected():
    return load_file(TESTDATA / "expected.safetensors")


@pytest.fixture(params=[False, True], ids=["fast MKL", "slow MKL"])
def mkl(request, monkeypatch):
    """Once as on Intel's processors and once as on AMD's, whatever this one is."""
    monkeypatch.setattr(longllama, "MKL_IS_SLOW", request.param)
    monkeypatch.setattr(longllama, "HAS_AMX", not request.param)


@pytest.fixture(scope="session")
def tiny():
    return LongLlama.from_pretrained(TINY), Tokenizer(TINY / "tokenizer.model")


def small_config(**changes) -> LongLlamaConfig:
    """4 layers, 2 of them with memory, a window of 16."""
    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mem_layers": (1, 2),
        "max_position_embeddings": 16, "last_context_length": 8, "mem_dtype": "float32",
    }  # fmt: skip
    return LongLlamaConfig(**settings | changes)


def small_model(**changes) -> LongLlama:
    torch.manual_seed(0)
    return LongLlama(small_config(**changes)).eval()


@torch.no_grad()
def read(model, ids, segments, **options):
    """Logits of ids fed in segments, one cache carried along: (B, T, V)."""
    cache, logits = None, []
    for part in ids.split(segments, dim=1):
        out, cache = model(part, cache, **options)
        logits.append(out)
    return torch.cat(logits, dim=1)


# ------------------------------------------------------------------------------------------- Against the original code


def error_of(model, name, expected):
    """How far the logits of a recorded case are from the original's at most, the segments fed one after another."""
    case, device = CASES[name], model.norm.weight.device
    ids, mask = expected[f"{name}.input_ids"], expected.get(f"{name}.attention_mask")
    cache, logits, start = None, [], 0
    for n in case["segments"]:
        part = slice(start, start + n)
        real = mask[:, part].to(device) if case["padded"] else None
        out, cache = model(ids[:, part].to(device), cache, real, case["last_context_length"])
        logits.append(out.detach().float().cpu())
        start += n
    error = (torch.cat(logits, dim=1) - expected[f"{name}.logits"]).abs()
    return (error[mask[:, :start].bool()] if case["padded"] else error).max()


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_original(name, device, expected, mkl):
    changes = CASES[name]["config"]
    error = error_of(LongLlama.from_pretrained(TESTDATA, device, **changes), name, expected)
    assert error < (5e-4 if changes.get("mem_dtype") == "bfloat16" else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{"mem_topk": 1000}, {"mem_device": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["many_windows", "left_padded_batch_decode_past_overflow", "chunked_continuation"])
def test_memory_searched_or_kept_elsewhere_gives_the_originals_logits(
    name, changes, device, expected, monkeypatch, mkl
):
    """As many best keys as there are make all of attention. Small blocks: the search, and the copies, are of many."""
    monkeypatch.setattr(longllama.Memory, "BLOCK", 5)
    monkeypatch.setattr(longllama, "GATHERED", 10000)  # a few queries at once
    assert error_of(LongLlama.from_pretrained(TESTDATA, device, **changes), name, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, 40])
@pytest.mark.parametrize(
    "name", ["many_windows", "two_windows", "chunked_continuation", "left_padded_batch", "no_memory_positionals"]
)
def test_logits_to_keep_gives_the_same_last_logits(name, keep, expected):
    case, ids = CASES[name], expected[f"{name}.input_ids"]
    model, cache, start = LongLlama.from_pretrained(TESTDATA, **case["config"]), None, 0
    mask = expected.get(f"{name}.attention_mask")
    for n in case["segments"]:
        part = slice(start, start + n)
        logits, cache = model(ids[:, part], cache, None if mask is None else mask[:, part], logits_to_keep=keep)
        kept = min(keep, n)
        assert logits.shape[1] == kept
        right = expected[f"{name}.logits"][:, start + n - kept : start + n]
        real = torch.ones_like(right[..., 0]).bool() if mask is None else mask[:, start + n - kept : start + n].bool()
        assert (logits - right)[real].abs().max() < 1e-4
        start += n


def test_greedy_generation_is_that_of_the_original(expected):
    model = LongLlama.from_pretrained(TESTDATA)
    ids = expected["greedy_generation.input_ids"]
    generated = torch.stack(list(model.generate(ids, CASES["greedy_generation"]["generate"], temperature=0)), dim=1)
    assert generated.tolist() == expected["greedy_generation.generated"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["many_windows", "left_padded_batch_decode_past_overflow", "chunked_continuation"])
def test_the_plain_formula_and_small_memory_blocks_give_the_originals_logits_too(name, expected, monkeypatch):
    """Other ways to the same numbers: no fused kernel, as on devices that have none, and a memory of many small blocks."""
    monkeypatch.setattr(longllama, "ROWS", 7)
    monkeypatch.setattr(longllama.attend, "__defaults__", (None, False, 7))  # rows
    monkeypatch.setattr(longllama.Memory, "BLOCK", 5)
    with torch.enable_grad():  # kernels are not used where gradients may be wanted
        assert error_of(LongLlama.from_pretrained(TESTDATA), name, expected) < 1e-4


# ----------------------------------------------------------------------------------------------- Against transformers

LLAMAS = {
    "plain": {},
    "grouped_query": {"num_key_value_heads": 2},
    "one_key_value_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "rope_theta_1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "large_eps": {"rms_norm_eps": 1e-2},
    "heads_of_2": {"num_attention_heads": 32},
}


def hf_llama(folder, **changes):
    """A random LlamaForCausalLM, saved into folder as transformers saves it."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64,        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with contextlib.redirect_stderr(io.StringIO()):  # it shows progress there
        model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", LLAMAS)
def test_without_memory_layers_it_is_llama(name, tmp_path):
    reference = hf_llama(tmp_path, **LLAMAS[name])
    ids = torch.randint(97, (2, 50))
    logits = read(LongLlama.from_pretrained(tmp_path), ids, [20, 1, 1, 15, 13])
    assert (logits - reference(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_context_kept_local_is_llama_also_beyond_the_window(tmp_path):
    reference = hf_llama(tmp_path, num_key_value_heads=2)
    model = LongLlama.from_pretrained(tmp_path, mem_layers=(1,), max_position_embeddings=16)
    ids = torch.randint(97, (1, 60))
    logits, cache = model(ids, last_context_length=60)
    assert (cache.local_length, cache.memory_length) == (60, 0)
    assert (logits - reference(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_padding_on_the_left_changes_nothing_for_llama(tmp_path):
    reference = hf_llama(tmp_path)
    ids = torch.randint(97, (1, 30))
    padded, mask = F.pad(ids, (12, 0)), F.pad(torch.ones_like(ids), (12, 0))
    model = LongLlama.from_pretrained(tmp_path)
    logits, cache = model(padded[:, :40], attention_mask=mask[:, :40])
    more, _ = model(padded[:, 40:], cache)
    assert (torch.cat((logits, more), dim=1)[:, 12:] - reference(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_bfloat16_is_as_near_float32_as_that_of_transformers(tmp_path):
    reference = hf_llama(tmp_path, initializer_range=0.1)
    ids = torch.randint(97, (4, 60))
    right = reference(ids).logits
    theirs = (reference.to(torch.bfloat16)(ids).logits.float() - right).square().mean().sqrt()
    model = LongLlama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = (model(ids)[0].float() - right).square().mean().sqrt()
    assert model(ids)[0].dtype == torch.bfloat16
    assert ours < 1.1 * theirs


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_memory_stays_near_float32(dtype, device, expected):
    ids = expected["many_windows.input_ids"].to(device)
    logits, _ = LongLlama.from_pretrained(TESTDATA, device, dtype)(ids)
    right = expected["many_windows.logits"]
    assert (logits.float().cpu() - right).norm() / right.norm() < 8 * torch.finfo(dtype).eps


# ----------------------------------------------------------------------------------------------- Attention, in float64


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 200), (1, 5, 200), (3, 1, 200)])
def test_products_of_one_token_and_of_many_are_near_float64_and_leave_torchs_settings_alone(
    shape, dtype, enabled, device, monkeypatch, mkl
):
    x = torch.randn(shape).to(device, dtype)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    for rows in (320, 333):  # in parts, or not
        weight = torch.randn(rows, 200).to(device, dtype)
        out, right = longllama.linear(x, weight), x.double() @ weight.double().T
        assert out.dtype == dtype and out.shape == right.shape
        assert (out - right).abs().max() < 8 * torch.finfo(dtype).eps * right.abs().max()
    assert torch.backends.mkldnn.enabled == enabled


def naive(q, k, v, seen):
    """The formula: q (B, H, T, D), k and v (B, G, S, D), seen broadcast to (B, H, T, S)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v


@torch.no_grad()
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
        part = attend(q, k_i, v_i, real_i if padded else None, causal)
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
    k, v = (longllama.store((x,), S + 8, dtype, x.device)[:, :, :S] for x in (k, v))  # with heads of 16
    out, lse = attend(q, k, v, real if padded else None, causal)
    scores = (q.double() @ k[..., :D].double().repeat_interleave(2, dim=1).mT / D**0.5).masked_fill(~seen, -torch.inf)
    sees = seen.any(dim=-1)  # padding that sees nothing gets anything
    assert out.shape == q.shape and out.isfinite().all() and lse.isfinite().all()
    assert (lse[~sees] < -1e4).all()  # no share of what others see, once merged
    right, bound = naive(q, k[..., :D], v[..., :D], seen), 8 * torch.finfo(dtype).eps
    assert (out - right)[sees].norm() / right[sees].norm() < bound
    assert (lse - scores.logsumexp(dim=-1))[sees].abs().max() < bound


@torch.no_grad()
def test_a_query_that_sees_only_padding_gives_no_nan(mkl):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        part = attend(q.to(dtype), k.to(dtype), k.to(dtype), torch.zeros(1, 1, 3, 1, dtype=torch.bool))
        assert all(x.isfinite().all() for x in (*part, *merge(part, part)))


@pytest.mark.parametrize("G", [2, 4])
def test_cross_batch_attention_is_the_formula_and_gradients_flow_into_the_other_entries(G):
    torch.manual_seed(0)
    B, H, T, D, extra = 5, 4, 6, 8, [0, 1, 2, 0, 3]
    q, k, v, unrotated = (torch.randn(B, n, T, D, requires_grad=True) for n in (H, G, G, G))
    weight = torch.randn(B, H, T, D)
    out = cross_batch_attention(q, k, v, unrotated, extra)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v, unrotated))
    rights = []
    for b, n in enumerate(extra):
        keys = torch.cat([unrotated[i] for i in range(b - n, b)] + [k[b]], dim=1)
        values = torch.cat([v[i] for i in range(b - n, b + 1)], dim=1)
        seen = torch.ones(T, (n + 1) * T, dtype=torch.bool).tril(n * T)
        rights.append(naive(q[b : b + 1], keys[None], values[None], seen))
    right = torch.cat(rights)
    theirs = torch.autograd.grad((right * weight).sum(), (q, k, v, unrotated))
    assert (out - right).abs().max() < 1e-5
    for ours_i, theirs_i in zip(ours, theirs):
        assert (ours_i - theirs_i).abs().max() < 1e-4
    assert ours[3][2].abs().max() > 1e-3  # entry 2 is only seen by others unrotated: by entry 4


def test_stepping_and_packing_follow_the_rule():
    """Entry i of its pack sees min(i * ceil((c + 1) / (k - 1)), c) entries, as many as there are before it."""
    assert cross_batch_extra(8, 7, packing=4) == [0, 1, 2, 3, 0, 3, 6, 7]
    assert cross_batch_extra(4, 1, packing=2) == [0, 1, 0, 1]
    assert cross_batch_extra(5, 2, packing=1) == [0, 0, 0, 0, 0]
    assert cross_batch_extra(4, 3, packing=2) == [0, 1, 0, 3]
    assert cross_batch_extra(6, 0, packing=3) == [0] * 6


@pytest.mark.parametrize("extra", [[0], [0, 1, 2], [1, 0], [0, -1]])
def test_extra_contexts_that_there_are_not_are_refused(extra):
    with pytest.raises(ValueError, match="extra must say"):
        small_model().forward_cross_batch(torch.randint(61, (2, 8)), extra)


@torch.no_grad()
def test_training_shows_memory_layers_what_inference_remembers():
    """Chunks of one document that see all chunks before them get the logits of windows that are read one after another."""
    model = small_model(num_key_value_heads=2)
    ids = torch.randint(61, (1, 5 * 16))
    trained = model.forward_cross_batch(ids.view(5, 16), extra=[0, 1, 2, 3, 4])
    inferred, _ = model(ids, last_context_length=16)
    assert (trained.view(1, 80, 61) - inferred).abs().max() < 1e-4


@torch.no_grad()
def test_a_norm_in_bfloat16_is_exactly_that_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = torch.randn(50, 32).bfloat16(), torch.nn.Parameter(torch.rand(32).bfloat16())
    ours, theirs = longllama.RMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    ours.weight = theirs.weight = weight
    assert torch.equal(ours(x), theirs(x))


@torch.no_grad()
def test_many_queries_make_no_matrix_of_scores(mkl):
    q, (k, v) = torch.randn(1, 4, 200, 8), torch.randn(2, 1, 4, 1000, 8).bfloat16()
    with LargestTensor() as seen:
        attend(q, k, v)
    assert seen.numel <= k.numel()


@torch.no_grad()
def test_grouped_queries_copy_no_keys():
    q, (k, v) = torch.randn(1, 8, 1, 8), torch.randn(2, 1, 1, 4096, 8)
    with LargestTensor() as seen:
        attend(q, k, v)
    assert seen.numel <= 2 * k.numel()


@pytest.mark.parametrize("limit", ["SCORES", "CAST", "GATHERED"])
def test_limits_that_allow_nothing_leave_one_row_or_token_at_once(limit, monkeypatch):
    memories = [longllama.Memory(small_config(mem_topk=K, mem_dtype="float16")) for K in (None, 7)]
    q, k, v = torch.randn(3, 2, 4, 24, 8)
    with torch.no_grad():
        for memory in memories:
            memory.append(k, v)
        for few in (1, 24):
            right = [memory.attend(q[:, :, :few], None)[0] for memory in memories]
            with monkeypatch.context() as patch:
                patch.setattr(longllama, limit, 1)
                found = [memory.attend(q[:, :, :few], None)[0] for memory in memories]
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, right))


@torch.no_grad()
def test_values_that_are_cast_in_pieces_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(longllama, "CAST", 8)
    q = torch.zeros(1, 1, 1, 8).bfloat16()
    k, v = (x.to(torch.float8_e4m3fn) for x in 1 + torch.rand(2, 1, 1, 2000, 8))
    right = naive(q, k.float(), v.float(), torch.tensor(True))
    assert (attend(q, k, v)[0] - right).abs().max() < 1e-2 * right.abs().max()


# ------------------------------------------------------------------------------------------------- Windows and caches


@torch.no_grad()
@pytest.mark.parametrize(
    "T, last, local, memory", [(8, 8, 8, 0), (9, 8, 8, 1), (40, 8, 8, 32), (40, 40, 40, 0), (41, 3, 3, 38)]
)
def test_the_last_tokens_stay_local_and_the_rest_is_remembered(T, last, local, memory):
    _, cache = small_model()(torch.randint(61, (1, T)), last_context_length=last)
    assert (cache.local_length, cache.memory_length) == (local, memory)
    assert [layer.memory and layer.memory.length for layer in cache.layers] == [None, memory, memory, None]


@torch.no_grad()
def test_overflow_moves_the_whole_local_context_into_memory():
    model, lengths, cache = small_model(), [], None
    for n in (10, 6, 1, 1, 15, 40):
        _, cache = model(torch.randint(61, (1, n)), cache)
        lengths.append((cache.local_length, cache.memory_length))
    # The last call: 32 prefix tokens as two windows, then 8, each beginning a local context of its own.
    assert lengths == [(8, 2), (14, 2), (15, 2), (16, 2), (15, 18), (8, 65)]


def test_settings_out_of_range_are_refused_by_name():
    model, ids = small_model(), torch.ones(1, 4, dtype=torch.long)
    for setting in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.7}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            next(model.generate(ids, 1, **setting))
    for setting in ({"logits_to_keep": -1}, {"last_context_length": 0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            model(ids, **setting)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_heads_that_are_stored_padded_are_computed_with_in_half_precision_too(device):
    model, ids = small_model(hidden_size=48), torch.randint(61, (2, 60))  # heads of 12 numbers, stored as 16
    right = read(model, ids, [45, 5, 10])
    logits = read(model.to(device, torch.bfloat16), ids.to(device), [45, 5, 10])
    assert (logits.float().cpu() - right).norm() / right.norm() < 2e-2


@torch.no_grad()
def test_heads_that_are_stored_padded_give_the_same_logits_with_gradients_and_without():
    model, ids = small_model(hidden_size=48), torch.randint(61, (2, 60))
    _, cache = model(ids[:, :45])
    with torch.enable_grad():
        logits = torch.cat([model(part, cache)[0] for part in ids[:, 45:].split([5, 10], dim=1)], dim=1)
    assert cache.layers[1].memory.blocks[0][0].shape[3] == 16
    with torch.enable_grad():
        whole = model(ids, last_context_length=8)[0]
    assert (logits - read(model, ids, [45, 5, 10])[:, 45:]).abs().max() < 1e-5
    assert (whole - model(ids, last_context_length=8)[0]).abs().max() < 1e-5


class Copied(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            self.numel += out.numel()
        return out


@pytest.mark.parametrize("grad, moves", [(False, 3), (True, 14)])  # with gradients there is no room to grow in
def test_memory_moves_a_token_a_few_times_only_and_blocks_are_few(grad, moves):
    memory, n, windows, blocks = longllama.Memory(small_config()), 16, 1000, []
    window = torch.randn(1, 4, n, 8)
    with torch.set_grad_enabled(grad), Copied() as copied:
        for _ in range(windows):
            memory.append(window, window)
            blocks.append(len(memory.blocks))
    assert memory.length == sum(k.shape[2] for k, _ in memory.blocks) == n * windows
    assert max(blocks) <= 6  # 1 + log4(1000)
    assert windows * window.numel() < copied.numel <= 2 * windows * window.numel() * moves  # keys and values
    assert torch.equal(torch.cat([k for k, _ in memory.blocks], dim=2), window.repeat(1, 1, windows, 1))


@torch.no_grad()
@pytest.mark.parametrize("block", [5, 16, 40])
def test_no_memory_block_is_larger_than_the_limit(block, monkeypatch):
    monkeypatch.setattr(longllama.Memory, "BLOCK", block)
    memory = longllama.Memory(small_config())
    for n in (3, 100, 1, 1, 7, 16, 16):
        memory.append(*torch.randn(2, 1, 4, n, 8))
    assert memory.length == 144 and max(k.shape[2] for k, _ in memory.blocks) <= block


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("B, G, causal, heads", [(1, 4, False, 4), (3, 2, False, 2), (1, 4, True, 4), (3, 2, True, 4)])
def test_the_plain_formula_holds_few_scores_at_once(B, G, causal, heads, monkeypatch):
    """heads: of scores. Queries that share a key head stand side by side, but not where they are causal."""
    q, k, v = torch.randn(B, 4, 300, 8), *torch.randn(2, B, G, 300, 8)  # with gradients, so it is the plain formula
    whole = attend(q, k, v, causal=causal)
    monkeypatch.setattr(longllama, "SCORES", 300 * B * heads * 20)  # 20 rows of each; more than keys have numbers
    with LargestTensor() as seen:
        parts = attend(q, k, v, causal=causal)
    assert seen.numel == longllama.SCORES
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(whole, parts))


def test_no_tensor_of_prompt_times_vocabulary_or_prompt_or_window_times_memory():
    T, window = 16384, 256
    model = small_model(vocab_size=1000, max_position_embeddings=window, last_context_length=window)
    with LargestTensor() as seen:
        list(model.generate(torch.randint(1000, (1, T)), 3, temperature=0))
    block = T * model.config.hidden_size  # keys of all tokens
    widest = window * 2 * model.config.intermediate_size
    assert block // 2 <= seen.numel <= max(block, widest) < window * T < T * 1000


@torch.no_grad()
def test_a_prefix_leaves_nothing_behind_but_memory():
    model, T, live = small_model(mem_layers=(1,), num_key_value_heads=1, mem_dtype="bfloat16"), 1600, []
    cache = Cache(model.config)

    def count(*_):
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        live.append(sum(storages.values()))

    count()
    model.norm.register_forward_hook(count)  # just before the output head
    model(torch.randint(61, (1, T)), cache, logits_to_keep=1)
    hidden_states = T * model.config.hidden_size * 4
    assert live[1] - live[0] < cache.memory_bytes + hidden_states / 4


@torch.no_grad()
def test_forks_share_what_is_remembered_and_go_on_apart():
    model = small_model()
    prompt, a, b = (torch.randint(61, (1, n)) for n in (70, 30, 30))
    _, cache = model(prompt)
    fork = cache.fork()
    keys = [c.layers[1].memory.blocks[0][0].data_ptr() for c in (cache, fork)]
    mixed = {id(cache): [], id(fork): []}
    for part_a, part_b in zip(a.split(1, dim=1), b.split(1, dim=1)):  # interleaved, over the overflow of both
        for part, to in ((part_a, cache), (part_b, fork)):
            mixed[id(to)].append(model(part, to)[0])
    assert keys[0] == keys[1]
    for ids, to in ((a, cache), (b, fork)):
        alone = read(model, torch.cat((prompt, ids), dim=1), [70] + [1] * 30)[:, 70:]
        assert (torch.cat(mixed[id(to)], dim=1) - alone).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("G", [2, 4])
@pytest.mark.parametrize("K", [1, 7])
def test_a_query_attends_to_the_best_keys_of_memory_only(K, G, padded, monkeypatch):
    monkeypatch.setattr(longllama.Memory, "BLOCK", 9)
    torch.manual_seed(0)
    memory = longllama.Memory(small_config(mem_topk=K))
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, G, 40, 8), torch.randn(2, G, 40, 8)
    real = torch.rand(2, 1, 40, 1) < (0.5 if padded else 2)
    memory.append(k[:, :, :13], v[:, :, :13])
    memory.append(k[:, :, 13:], v[:, :, 13:])
    out, lse = memory.attend(q, real if padded else None)
    scores = (q @ k.repeat_interleave(4 // G, dim=1).mT).masked_fill(~real.mT, -torch.inf)
    best = scores >= scores.topk(K).values[..., -1:]
    assert (out - naive(q, k, v, best & real.mT)).abs().max() < 1e-5
    assert (lse - (scores / 8**0.5).masked_fill(~best, -torch.inf).logsumexp(dim=-1)).abs().max() < 1e-5


@torch.no_grad()
def test_float8_memory_scales_every_head_by_itself(monkeypatch):
    """Float8 keeps 4 binary digits, a rounding of 1/16 at most, of heads of any size, and of numbers that come later."""
    monkeypatch.setattr(longllama, "CAST", 7 * 2 * 4 * 8)  # 7 tokens of 50 at once: many pieces, the last one smaller
    torch.manual_seed(0)
    memory = longllama.Memory(small_config(mem_dtype="float8_e4m3fn"))
    size = torch.tensor([1e-4, 1e-1, 1.0, 1e3]).view(1, 4, 1, 1)
    k, v = torch.randn(2, 4, 50, 8) * size, torch.randn(2, 4, 50, 8) * size
    for part in range(0, 50, 10):
        memory.append(*(x[:, :, part : part + 10] * (1 + part // 10) for x in (k, v)))
    growth = 1 + torch.arange(50).view(50, 1) // 10
    assert memory.blocks[0][0].dtype == torch.float8_e4m3fn and memory.blocks[0][0].itemsize == 1
    q = torch.randn(2, 4, 3, 8) / size
    out, _ = memory.attend(q, None)
    kept = [torch.cat(x, dim=2).double() * scale for x, scale in zip(zip(*memory.blocks), memory.scales)]
    for x, right in zip(kept, (k * growth, v * growth)):
        coarse = right.abs() < size / 8  # a 32nd of the largest of the first ones
        assert ((x - right).abs() / right.abs())[~coarse].max() <= 1 / 16
    right = naive(q, *kept, torch.tensor(True))
    assert ((out - right).abs() / size).max() < 1e-4


@torch.no_grad()
def test_float8_memory_that_begins_with_the_smallest_token_keeps_the_others():
    """As when the bos token, whose values are small, is alone in the first window; or when a row begins with padding."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 4, 40, 8)
    k[:, :, 0] *= 0
    v[:, :, 0] *= 0.02
    memory = longllama.Memory(small_config(mem_dtype="float8_e4m3fn"))
    memory.append(k[:, :, :1], v[:, :, :1])
    memory.append(k[:, :, 1:], v[:, :, 1:])
    q = torch.randn(2, 4, 3, 8)
    right = naive(q, k, v, torch.tensor(True))
    assert (memory.attend(q, None)[0] - right).norm() / right.norm() < 5e-2


def test_float8_memory_refuses_gradients():
    model = small_model(mem_dtype="float8_e4m3fn")
    for T in (60, 3):  # also where nothing would be remembered yet: it would be later
        with pytest.raises(ValueError, match="no gradients"):
            model(torch.randint(61, (1, T)))


def test_a_cache_read_in_inference_mode_is_gone_on_from_outside_of_it():
    model = small_model()
    with torch.inference_mode():
        _, cache = model(torch.randint(61, (1, 60)))
    assert len(list(model.generate(torch.ones(1, 1, dtype=torch.long), 20, cache=cache, eos_token_id=None))) == 20


def test_float8_is_cast_exactly():
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None, None, :, None]
    finite = finite[:, :, ~finite.float().flatten().isnan()]
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(torch.cat(list(longllama.cast_pieces(finite, dtype)), dim=2), finite.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_what_stays_local_at_an_overflow_is_rotated_to_positions_from_0(layer, mem_positionals, dtype, bound):
    """Against the formula in float64, over memory, unrotated, and the local context, rotated from its new start."""
    torch.manual_seed(0)
    config = small_config(mem_positionals=mem_positionals, hidden_size=48)
    local, D = Cache(config).layers[layer], 12
    q, k, v = torch.randn(3, 2, 4, 14, D).to(dtype)

    def rotated(x, first):
        position = first + torch.arange(x.shape[2]).double()
        angle = position.outer(10000.0 ** -(torch.arange(0, D, 2).double() / D)) * config.rotates(layer)
        a, b = x.double().chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    def feed(start, stop):
        rope = longllama.rope_table(local.length, stop - start, config, q.device)
        turn = (lambda x: longllama.rotate(x, rope)) if config.rotates(layer) else (lambda x: x)
        part = slice(start, stop)
        return local.append_and_attend(turn(q[:, :, part]), turn(k[:, :, part]), v[:, :, part], k[:, :, part], None)

    feed(0, 7)
    feed(7, 12)
    local.restart(keep=5)
    out = feed(12, 14)
    remembered = 7 if layer in config.mem_layers else 0
    keys = torch.cat((k[:, :, :remembered].double(), rotated(k[:, :, 7:], 0)), dim=2)
    values = torch.cat((v[:, :, :remembered], v[:, :, 7:]), dim=2)
    seen = torch.ones(2, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 2)
    assert (out - naive(rotated(q[:, :, 12:], 5), keys, values, seen)).abs().max() < bound


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_the_newest_tokens_stay_local_at_an_overflow(padded):
    model, lengths, cache = small_model(keep_local=6), [], None
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[0, : 7 * padded] = 0
    ids, start = torch.randint(61, (2, 44)), 0
    for n in (10, 6, 1, 1, 1, 12, 13):
        _, cache = model(ids[:, start : start + n], cache, mask[:, start : start + n])
        lengths.append((cache.local_length, cache.memory_length))
        start += n
    # 8 + 6, + 1, + 1: full; 6 stay; of the next 12, 4 go first, and the other 8 find 6 + 5 tokens local, of which 6 stay
    assert lengths == [(8, 2), (14, 2), (15, 2), (16, 2), (7, 12), (14, 17), (14, 30)]
    for layer in cache.layers:
        assert layer.length == 14 and (layer.memory is None or layer.memory.length == 30)
    if padded:  # the row without padding is as if it were alone
        alone = small_model(keep_local=6)
        right = read(alone, ids[1:], [10, 6, 1, 1, 1, 12, 13])
        cache, logits = None, []
        for part, real in zip(ids.split([10, 6, 1, 1, 1, 12, 13], 1), mask.split([10, 6, 1, 1, 1, 12, 13], 1)):
            out, cache = alone(part, cache, real)
            logits.append(out)
        assert (torch.cat(logits, dim=1)[1:] - right).abs().max() < 1e-4


SAVED = {
    "float32": {}, "bfloat16": {"mem_dtype": "bfloat16"}, "float8": {"mem_dtype": "float8_e4m3fn"}, "topk": {"mem_topk": 5},
    "keep_local": {"keep_local": 6}, "padded_heads": {"hidden_size": 48, "num_key_value_heads": 2},
    "llama": {"mem_layers": (), "max_position_embeddings": 200},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_a_saved_memory_goes_on_as_if_there_had_been_no_stop(name, padded, tmp_path, monkeypatch):
    """Saved after every segment: the first in the first window, later ones with memory, full windows, and overflows."""
    monkeypatch.setattr(longllama.Memory, "BLOCK", 20)
    model = small_model(**SAVED[name])
    segments = [3, 40, 7, 1, 1, 1, 1, 30, 16, 1]
    ids = torch.randint(61, (2, sum(segments)))
    mask = torch.ones_like(ids)
    mask[0, : 2 * padded] = 0
    cache = resumed = None
    for i, (part, real) in enumerate(zip(ids.split(segments, dim=1), mask.split(segments, dim=1))):
        right, cache = model(part, cache, real)
        logits, resumed = model(part, resumed, real)
        assert (logits - right).abs().max() < 1e-5
        if i == 2:  # all in memory, and no local context
            cache.restart()
            resumed.restart()
        generate.save_memory(tmp_path / "memory", resumed.fork(), model)
        resumed = generate.load_memory(tmp_path / "memory", model)
        lengths = [(c.local_length, c.memory_length, c.memory_bytes) for c in (cache, resumed)]
        assert lengths[0] == lengths[1]


@torch.no_grad()
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped where")
def test_a_saved_memory_is_mapped_and_not_read_until_it_is_used(tmp_path):
    model = small_model()
    generate.save_memory(tmp_path / "memory", model(torch.randint(61, (1, 100)))[1], model)
    loaded = generate.load_memory(tmp_path / "memory", model)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(x, 16) for x in line[0].split("-")] for line in maps if line[-1] == str(tmp_path / "memory")]
    for x in loaded.layers[1].memory.blocks[0]:
        assert any(start <= x.data_ptr() < stop for start, stop in ranges)


@torch.no_grad()
def test_a_memory_of_another_model_or_of_other_settings_is_refused_by_name(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    generate.save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    for changes in (
        {"mem_layers": (1, 3)},
        {"mem_dtype": "float16"},
        {"max_position_embeddings": 8},
        {"rope_theta": 5.0},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            generate.load_memory(path, small_model(**changes))
    with pytest.raises(ValueError, match="made with dtype float32, and this is bfloat16"):
        generate.load_memory(path, small_model().to(torch.bfloat16))
    for name, parameter in model.named_parameters():  # any weight, also a part of it
        kept = parameter.clone()
        part = parameter[len(parameter) // 2 :]
        part.add_(torch.randn_like(part))
        with pytest.raises(ValueError, match="made with weights"):
            generate.load_memory(path, model)
        parameter.copy_(kept)
        assert generate.load_memory(path, model).memory_length == 22, name
    free = {
        "last_context_length": 3,
        "mem_topk": 4,
        "keep_local": 2,
        "mem_device": "cpu",
        "mem_attention_grouping": (1, 2),
    }
    generate.load_memory(path, small_model(**free))
    whole = path.read_bytes()
    for broken in (whole[:-9], whole[:40], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken"):
            generate.load_memory(path, model)
    for metadata in (None, {"longllama": "3"}, {"longllama": "{}"}, {"longllama": "{"}, {"other": "x"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match="no saved memory"):
            generate.load_memory(path, model)
    with pytest.raises(FileNotFoundError, match="no file"):
        generate.load_memory(tmp_path, model)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "local_length",
        "memory_length",
        "0.local.1",
        "1.memory.v.0",
        "heads",
        "flat",
        "dtype",
        "padding",
        "bits",
        "float",
    ],
)
@pytest.mark.parametrize("mem_dtype", ["float32", "float8_e4m3fn"])
def test_a_memory_that_lacks_something_is_refused(name, mem_dtype, tmp_path):
    model, path, mask = small_model(mem_dtype=mem_dtype), tmp_path / "memory", torch.ones(1, 30)
    mask[:, :2] = 0
    generate.save_memory(path, model(torch.randint(61, (1, 30)), attention_mask=mask)[1], model)
    with safe_open(path, framework="pt") as file:
        tensors, says = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["longllama"])  # noqa: SIM118
    variants = [says]
    if name in tensors:
        del tensors[name]
    elif name == "heads":
        tensors["0.local.0"] = tensors["0.local.0"][:, :2].clone()
    elif name == "dtype":
        tensors["1.memory.k.0"] = tensors["1.memory.k.0"].double()
    elif name == "padding":
        tensors["real"] = torch.ones(3, 3, dtype=torch.bool)
    elif name == "bits":
        tensors["real"] = tensors["real"].float()
    elif name == "flat":
        tensors["1.memory.k.0"] = torch.ones(3).to(getattr(torch, mem_dtype))
    elif name == "float":
        variants = [says | {"memory_length": float(says["memory_length"])}]
    else:
        variants = [says | {name: 7}, {key: value for key, value in says.items() if key != name}]
    for made_with in variants:
        save_file(tensors, path, {"longllama": json.dumps(made_with)})
        with pytest.raises(ValueError, match="its tensors are not those"):
            generate.load_memory(path, model)


@torch.no_grad()
@pytest.mark.parametrize("scales", [0, 1, 3, 4])
def test_a_float8_memory_has_two_scales_and_no_other_has_any(scales, tmp_path):
    model, path = small_model(mem_dtype="float8_e4m3fn" if scales else "float32"), tmp_path / "memory"
    generate.save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    with safe_open(path, framework="pt") as file:
        tensors, says = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    right = {f"1.memory.scale.{j}": torch.ones(1, 4, 1, 1) for j in range(3)}
    tensors = {name: x for name, x in tensors.items() if name not in right}
    if scales == 4:  # two, of another shape
        tensors |= {name: torch.ones(3) for name in list(right)[:2]}
    else:
        tensors |= dict(list(right.items())[: scales or 2])
    save_file(tensors, path, says)
    with pytest.raises(ValueError, match="its tensors are not those"):
        generate.load_memory(path, model)


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_an_interrupted_save_leaves_what_there_was(error, tmp_path, monkeypatch):
    model, path, written = small_model(), tmp_path / "memory", []
    path.write_text("before")
    cache = model(torch.randint(61, (1, 30)))[1]

    def stop_at_the_third(x):
        written.append(x)
        if len(written) == 3:
            raise error
        return x.clone(memory_format=torch.contiguous_format)

    monkeypatch.setattr(torch.Tensor, "contiguous", stop_at_the_third)
    with pytest.raises(type(error)) as raised:
        generate.save_memory(path, cache, model)
    assert isinstance(error, KeyboardInterrupt) or str(raised.value) == f"{path} cannot be written: {error.strerror}"
    assert len(written) == 3 and path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@torch.no_grad()
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_saving_replaces_nothing_but_the_file_that_is_meant(tmp_path, capsys):
    model = small_model()
    cache = model(torch.randint(61, (1, 30)))[1]
    pipe, link, target, notes = (tmp_path / name for name in ("pipe", "link", "target", "target.part"))
    os.mkfifo(pipe)
    link.symlink_to(target)
    notes.write_text("mine")
    with pytest.raises(OSError, match="not a regular file"):
        generate.save_memory(pipe, cache, model)
    assert run_main(generate.main, "--prompt", "The sea", "--save-memory", pipe) == 2
    assert "name a file" in capsys.readouterr().err and pipe.is_fifo()
    generate.save_memory(link, cache, model)
    assert link.is_symlink() and generate.load_memory(target, model).memory_length == cache.memory_length
    assert notes.read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


@torch.no_grad()
def test_a_saved_memory_is_as_readable_as_other_files(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    cache = model(torch.randint(61, (1, 30)))[1]
    with pytest.raises(OSError, match="missing"):
        generate.save_memory(tmp_path / "missing" / "memory", cache, model)
    generate.save_memory(path, cache, model)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_gradients_flow_through_memory():
    """The derivative along a random direction, of a loss that depends on the first windows through memory alone."""
    model = small_model()
    ids = torch.randint(61, (1, 60))
    embedded = torch.randn(1, 60, 32)
    direction = torch.randn(1, 60, 32) * (torch.arange(60) < 16)[None, :, None]  # only the first window changes

    def loss(step: float) -> torch.Tensor:
        x = (embedded + step * direction).requires_grad_()
        pieces = iter(x.split([16, 16, 16, 4, 8], dim=1))  # three windows, a short one, and the last tokens
        handle = model.embed_tokens.register_forward_hook(lambda *_: next(pieces))
        out = model(ids, logits_to_keep=8)[0].double().square().sum()
        handle.remove()
        return out, x

    value, x = loss(0.0)
    slope = (torch.autograd.grad(value, x)[0] * direction).sum()
    numeric = (loss(1e-2)[0] - loss(-1e-2)[0]) / 2e-2
    assert abs(numeric) > 1e-3
    assert abs(slope - numeric) < 2e-2 * abs(numeric)


def test_gradients_of_what_was_read_after_a_prefix_without_are_those_of_reading_it_in_any_pieces():
    model, ids, gradients = small_model(), torch.randint(61, (1, 46)), []
    for pieces in ([20], [3, 1, 16], [1, 3, 10, 6]):  # token 4 overflows the window, into a memory that had room
        with torch.no_grad():
            _, cache = model(ids[:, :26])
        logits = [model(part, cache, last_context_length=16)[0] for part in ids[:, 26:].split(pieces, dim=1)]
        torch.cat(logits, dim=1).square().sum().backward()
        gradients.append(model.layers[1].self_attn.qkv_proj.weight.grad.clone())
        model.zero_grad()
    scale = gradients[0].abs().max()
    assert scale > 1e-3 and all((g - gradients[0]).abs().max() < 1e-5 * scale for g in gradients)


def test_reading_on_without_gradients_does_not_disturb_those_of_before():
    model, ids, gradients = small_model(), torch.randint(61, (1, 40)), []
    for reads_on in (False, True):
        with torch.no_grad():
            _, cache = model(ids[:, :26])
        logits, _ = model(ids[:, 26:30], cache)
        if reads_on:
            before = cache.layers[1].memory.blocks[-1][0]
            with torch.no_grad():
                model(ids[:, 30:], cache)
            after = cache.layers[1].memory.blocks[-1][0]
            assert after.shape[2] > before.shape[2] and after.data_ptr() == before.data_ptr()  # grown in place
        logits.square().sum().backward()
        gradients.append(model.layers[1].self_attn.qkv_proj.weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-3 and torch.equal(*gradients)


@torch.no_grad()
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "at least one token"),
        (lambda m: m(torch.zeros(1, 4, dtype=torch.long), last_context_length=0), "last_context_length"),
        (lambda m: m(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 5)), "attention_mask"),
        (lambda m: m(torch.ones(2, 4).long(), m(torch.ones(1, 4).long())[1]), "2 rows"),
        (lambda m: next(m.generate(torch.ones(1, 2).long(), 1, attention_mask=torch.tensor([[1, 0]]))), "on the left"),
        (lambda m: LongLlama(small_config(mem_layers=()))(torch.zeros(1, 17, dtype=torch.long)), "window of 16"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model())


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 8])
def test_nothing_above_the_last_memory_layer_is_computed_for_a_prefix(keep):
    model, calls = small_model(), []
    model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 40, dtype=torch.long), logits_to_keep=keep)
    assert len(calls) == 1


@torch.no_grad()
def test_what_stays_local_is_computed_in_all_layers():
    model, ids, last = small_model(keep_local=6), torch.randint(61, (1, 60)), []
    for keep in (0, 1):
        _, cache = model(ids[:, :20])
        last.append(model(ids[:, 20:], cache, logits_to_keep=keep)[0][:, -1:])
    assert (last[0] - last[1]).abs().max() < 1e-5


@torch.no_grad()
def test_memory_layers_may_be_named_in_any_order():
    ids = torch.randint(61, (1, 60))
    a, b = (small_model(mem_layers=layers)(ids, logits_to_keep=1)[0] for layers in ((1, 2), (2, 1)))
    assert torch.equal(a, b)


@torch.no_grad()
def test_kept_tokens_and_a_window_never_exceed_the_window():
    model, ids, lengths = small_model(keep_local=6), torch.ones(1, 8, dtype=torch.long), []
    _, cache = model(ids)
    model.layers[0].register_forward_hook(lambda *_: lengths.append(cache.local_length))
    model(ids.repeat(1, 5), cache)
    assert lengths == [16, 16, 14]
    model(ids.repeat(1, 5), cache, last_context_length=40)  # all of it stays local, and nothing that was there
    assert cache.local_length == 40


@torch.no_grad()
def test_after_a_restart_new_tokens_join_one_local_context():
    model, ids = small_model(), torch.ones(1, 10, dtype=torch.long)
    _, cache = model(ids)
    cache.restart()
    model(ids, cache)
    assert (cache.local_length, cache.memory_length) == (10, 10)


@torch.no_grad()
def test_a_local_context_has_room_for_the_window_and_grows_in_place():
    model = small_model()
    _, cache = model(torch.ones(1, 4, dtype=torch.long))
    places = [x.data_ptr() for x in cache.layers[1].tensors]
    for _ in range(12):
        model(torch.ones(1, 1, dtype=torch.long), cache)
    assert [x.data_ptr() for x in cache.layers[1].tensors] == places


@torch.no_grad()
def test_padding_may_come_in_a_later_call_and_a_mask_of_ones_is_no_padding():
    model, ids = small_model(), torch.randint(61, (2, 40))
    mask = torch.ones(2, 10)
    _, cache = model(ids[:, :30], attention_mask=torch.ones(2, 30))
    assert cache.real is None
    mask[0, :3] = 0
    logits, _ = model(ids[:, 30:], cache, mask)
    alone = read(model, ids[1:], [30, 10])[:, 30:]
    assert (logits[1:] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("grouping, rows", [(None, 128), ((2, 8), 4), ((1, 1), 1)])
def test_grouping_bounds_the_rows_of_scores(grouping, rows):
    memory = longllama.Memory(small_config(mem_attention_grouping=grouping))
    memory.append(*torch.randn(2, 1, 4, 300, 8))
    with LargestTensor() as seen:
        memory.attend(torch.randn(1, 4, 200, 8), None)
    assert seen.numel == max(4 * rows * 300, 4 * 300 * 8)


@torch.no_grad()
def test_few_of_the_best_values_are_gathered_at_once(monkeypatch):
    monkeypatch.setattr(longllama, "GATHERED", 4 * 50 * 8 * 2)
    memory = longllama.Memory(small_config(mem_topk=50))
    memory.append(*torch.randn(2, 1, 4, 300, 8))
    with LargestTensor() as seen:
        memory.attend(torch.randn(1, 4, 100, 8), None)
    assert seen.numel <= 4 * 300 * 8


@torch.no_grad()
def test_float8_memory_scales_the_key_heads_of_grouped_queries():
    torch.manual_seed(0)
    memory = longllama.Memory(small_config(mem_dtype="float8_e4m3fn", num_key_value_heads=2))
    size = torch.tensor([1e-2, 1.0]).view(1, 2, 1, 1)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8) * size, torch.randn(2, 2, 40, 8) * size
    memory.append(k, v)
    out, right = memory.attend(q, None)[0], naive(q, k, v, torch.tensor(True))
    assert all((out - right)[:, h].norm() / right[:, h].norm() < 5e-2 for h in range(4))


@torch.no_grad()
def test_float8_memory_clamps_what_is_far_larger_than_its_first_tokens():
    memory, x = longllama.Memory(small_config(mem_dtype="float8_e4m3fn")), torch.randn(1, 4, 1, 8)
    memory.append(x, x)
    memory.append(1000 * x, 1000 * x)
    for n in (1, 20):  # read in pieces, and as a whole
        assert memory.attend(x.repeat(1, 1, n, 1), None)[0].isfinite().all()


def test_gradients_flow_through_memory_in_bfloat16(monkeypatch):
    monkeypatch.setattr(longllama, "CAST", 100)
    ids, gradients = torch.randint(61, (1, 60)), []
    for dtype in ("float32", "bfloat16"):
        model = small_model(mem_dtype=dtype)
        model(ids)[0].square().sum().backward()
        gradients.append(model.layers[1].self_attn.qkv_proj.weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()


def test_gradients_reach_all_weights(mkl):
    model = small_model()
    model(torch.randint(61, (1, 60)))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_with_gradients_memory_has_no_room_and_what_has_room_is_not_written_into():
    memory, q = longllama.Memory(small_config()), torch.randn(1, 4, 2, 8)
    with torch.no_grad():
        memory.append(*torch.randn(2, 1, 4, 40, 8))
    assert memory.room[0].shape[2] == 80
    total, parts = 0, torch.randn(2, 2, 1, 4, 8, 8, requires_grad=True)
    for k, v in parts:
        memory.append(k, v)
        total = total + memory.attend(q, None)[0].square().sum()
    total.backward()
    assert parts.grad.abs().min() > 0
    assert memory.room[0].shape[2] == memory.length


def test_float8_memory_of_a_model_without_memory_layers_does_not_hinder_training():
    small_model(mem_layers=(), mem_dtype="float8_e4m3fn")(torch.ones(1, 8, dtype=torch.long))[0].sum().backward()


# ---------------------------------------------------------------------------------------------------------- Generation


def test_sampling_respects_seed_top_k_and_top_p():
    model, ids = small_model(), torch.randint(61, (2, 20))

    def run(**options):
        return torch.stack(list(model.generate(ids, 12, eos_token_id=None, **options))).tolist()

    greedy = run(temperature=0)
    assert run(top_k=1) == run(top_p=1e-9) == greedy
    assert run(seed=3) == run(seed=3) != run(seed=4)


def test_top_p_draws_from_the_smallest_set_with_that_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {longllama.sample(logits, 1.0, None, 0.75, torch.Generator().manual_seed(i)).item() for i in range(200)}
    assert drawn == {0, 1}


def test_rows_end_at_eos_and_generation_when_all_have():
    model, ids = small_model(), torch.randint(61, (3, 20))
    free = torch.stack(list(model.generate(ids, 40, temperature=0, eos_token_id=None)), dim=1)
    eos = free[0, 5].item()
    ended = torch.stack(list(model.generate(ids, 40, temperature=0, eos_token_id=eos)), dim=1)
    for row, right in zip(ended.tolist(), free.tolist()):
        stop = right.index(eos) + 1 if eos in right else 40
        assert row[:stop] == right[:stop][: len(row)]
        assert set(row[stop:]) <= {model.config.pad_token_id}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"mem_layers": (1,)}, {"num_key_value_heads": 2}])
def test_a_cache_of_another_model_is_refused(changes):
    ids = torch.randint(61, (1, 60))
    cache = small_model(**changes)(ids)[1]
    with pytest.raises(ValueError, match="cache was made for a model of another shape"):
        small_model()(ids, cache)
    other_settings = small_model(mem_topk=1000)
    assert other_settings(ids, small_model()(ids)[1])[1].memory_length > 60


@torch.no_grad()
def test_another_number_of_rows_than_the_cache_has_is_refused(tmp_path):
    model, ids = small_model(), torch.randint(61, (3, 60))
    local = model(ids[:1])[1]
    remembered, forked = local.fork(), local.fork()
    remembered.restart()  # nothing is local
    generate.save_memory(tmp_path / "memory", remembered, model)
    for cache in (local, remembered, forked, generate.load_memory(tmp_path / "memory", model)):
        with pytest.raises(ValueError, match="input_ids has 3 rows, and the cache has 1"):
            model(ids[:, :20], cache)


def test_generation_goes_on_from_a_cache():
    model, ids = small_model(), torch.randint(61, (1, 50))
    whole = [i.item() for i in model.generate(ids, 20, temperature=0, eos_token_id=None)]
    cache = Cache(model.config)
    first = list(model.generate(ids, 9, temperature=0, eos_token_id=None, cache=cache))
    rest = list(model.generate(first[-1][:, None], 11, temperature=0, eos_token_id=None, cache=cache))
    assert [i.item() for i in first + rest] == whole


def test_temperature_flattens_or_sharpens():
    logits = torch.tensor([[0.6, 0.4]]).log().repeat(1000, 1)
    for temperature, share in ((0.05, 1.0), (0.5, 0.692), (1.0, 0.6), (2.0, 0.5505)):
        drawn = longllama.sample(logits, temperature, None, None, torch.Generator().manual_seed(0))
        assert abs((drawn == 0).float().mean() - share) < 0.04


def test_top_p_takes_no_id_beyond_the_one_that_makes_it_up():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    rng = torch.Generator().manual_seed(0)
    assert {longllama.sample(logits, 1.0, None, 0.5, rng).item() for _ in range(50)} == {0}


def test_ids_are_drawn_from_float32_and_are_ordinary_tensors(monkeypatch):
    dtypes, sample = [], longllama.sample
    monkeypatch.setattr(longllama, "sample", lambda x, *args: (dtypes.append(x.dtype), sample(x, *args))[1])
    ids = next(small_model().to(torch.bfloat16).generate(torch.ones(1, 4, dtype=torch.long), 1))
    assert dtypes == [torch.float32] and not ids.is_inference()


def test_generation_ends_with_eos_and_pads_rows_that_ended_before():
    model, ids = small_model(pad_token_id=7), torch.randint(61, (3, 20))
    free = torch.stack(list(model.generate(ids, 40, temperature=0, eos_token_id=None)), dim=1)
    alone = [i.item() for i in model.generate(ids[:1], 40, temperature=0, eos_token_id=free[0, 5].item())]
    assert alone == free[0].tolist()[: free[0].tolist().index(free[0, 5]) + 1]
    ended = torch.stack(list(model.generate(ids, 40, temperature=0, eos_token_id=free[0, 0].item())), dim=1)
    assert len(ended[0]) > 1 and set(ended[0, 1:].tolist()) == {7}


def test_generation_splits_its_prompt_where_it_is_told_to():
    model = small_model()
    cache = Cache(model.config)
    next(model.generate(torch.ones(1, 40, dtype=torch.long), 1, cache=cache, last_context_length=5))
    assert (cache.local_length, cache.memory_length) == (5, 35)


@pytest.mark.parametrize(
    "T, changes, message",
    [
        (2, {"temperature": 1e-6}, "temperature"),
        (2, {"attention_mask": torch.tensor([[1, 0], [1, 1]])}, "on the left"),
        (0, {"attention_mask": torch.ones(2, 0)}, "at least one token"),
    ],
    ids=str,
)
def test_generation_refuses_what_it_cannot_do(T, changes, message):
    with pytest.raises(ValueError, match=message):
        next(small_model().generate(torch.ones(2, T, dtype=torch.long), 1, **changes))


# ------------------------------------------------------------------------------------------------ Config and weights


@pytest.mark.parametrize(
    "changes",
    [
        {"mem_layers": [99]}, {"mem_layers": ["a"]}, {"mem_layers": 3}, {"mem_dtype": "int8"}, {"hidden_size": 30},
        {"mem_attention_grouping": [0, 4]}, {"mem_attention_grouping": [4]}, {"mem_attention_grouping": 4},
        {"num_key_value_heads": 3}, {"vocab_size": 0}, {"last_context_length": 0},
        {"rms_norm_eps": -1.0}, {"rms_norm_eps": math.inf}, {"eos_token_id": 61},
        {"intermediate_size": 2**40}, {"rms_norm_eps": 10**400},
        {"intermediate_size": True}, {"rms_norm_eps": True}, {"mem_layers": [True]}, {"mem_positionals": "false"},
        {"eos_token_id": 1.0}, {"hidden_size": 36}, {"mlp_bias": True},
        {"hidden_act": "gelu"}, {"attention_bias": True}, {"head_dim": 4}, {"model_type": "mistral"}, {"eos_token_id": [2, 3]},
        {"mem_topk": 0}, {"mem_device": "tape"}, {"keep_local": 16}, {"keep_local": -1},
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_type": "llama3"}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_by_name(changes, tmp_path):
    path = tmp_path / "config.json"
    convert.write_config(path, small_config(), torch.float32)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    name = "rope_type" if "rope" in next(iter(changes)) else next(iter(changes))
    with pytest.raises(ValueError, match=f"config.json: .*{name}"):
        LongLlamaConfig.from_json(path)


def test_json_nested_too_deep_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: "):
        LongLlamaConfig.from_json(path)
    path.rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="index.json is broken"):
        longllama.find_weights(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, [], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["b"]}}], ids=str
)
def test_an_index_that_names_no_files_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json is broken"):
        longllama.find_weights(tmp_path)


def test_defaults_are_those_of_transformers():
    ours, theirs = vars(LongLlamaConfig()), vars(LlamaConfig())
    same = [name for name in ours.keys() & theirs if name != "pad_token_id"]  # which is none there
    assert len(same) >= 11 and all(ours[name] == theirs[name] for name in same)
    assert ours["rope_theta"] == theirs["rope_parameters"]["rope_theta"]


def test_random_weights_have_one_size_and_norms_begin_at_1():
    for p in small_model(hidden_size=64).parameters():
        assert (p == 1).all() if p.dim() == 1 else 0.9 < p.std() * 64**0.5 < 1.1


def test_configs_of_transformers_5_and_of_older_releases_are_read(tmp_path):
    path = tmp_path / "config.json"
    new = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "head_dim": 128,
        "pad_token_id": None,
        "dtype": "float16",
    }
    path.write_text(json.dumps(new))
    assert LongLlamaConfig.from_json(path).rope_theta == 5e5
    old = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "unknown": 1, "pad_token_id": -1}
    path.write_text(json.dumps(old))
    config = LongLlamaConfig.from_json(path)
    assert (config.rope_theta, config.pad_token_id, config.last_context_length) == (1e6, 0, 1024)


def test_a_saved_model_comes_back_the_same(tmp_path):
    for dtype, changes in (torch.float32, {}), (torch.float64, {"tie_word_embeddings": True, "num_key_value_heads": 2}):
        model = small_model(**changes).to(dtype)
        convert.save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
        again = LongLlama.from_pretrained(tmp_path, dtype=dtype)
        assert again.config == model.config and not again.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_missing_unexpected_and_misshapen_tensors_are_named(damage, tmp_path):
    convert.save_pretrained(small_model(), tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.2.self_attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=name):
        LongLlama.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------- Conversion


def as_released(folder: Path, layout: str):
    """Turns what transformers saved into a layout of the released checkpoints, rotary tables included."""
    source = {}
    for path in sorted(folder.glob("*.safetensors")):
        source |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    source |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    names, kind = sorted(source), layout.split("_")[0]
    parts = [names[::2], names[1::2]] if layout.endswith("sharded") else [names]
    stem, save = ("pytorch_model", lambda x, path: torch.save(x, path)) if kind == "bin" else ("model", save_file)
    files = [
        f"{stem}-{i + 1:05}-of-{len(parts):05}.{kind}" if len(parts) > 1 else f"{stem}.{kind}"
        for i in range(len(parts))
    ]
    for part, file in zip(parts, files):
        save({name: source[name] for name in part}, folder / file)
    if len(parts) > 1:
        index = {"weight_map": {name: file for part, file in zip(parts, files) for name in part}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def test_a_whole_file_is_read_where_an_old_index_lies_beside_it(tmp_path):
    """As transformers does: the index is what is left of an earlier, sharded model."""
    hf_llama(tmp_path / "old")
    as_released(tmp_path / "old", "safetensors_sharded")
    new = LongLlama(LongLlamaConfig.from_json(tmp_path / "old" / "config.json"))
    convert.save_pretrained(new, tmp_path / "old")
    read = LongLlama.from_pretrained(tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), new.parameters()))
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "old").lm_head.weight, read.lm_head.weight)


def run_convert(*args):
    return run_main(convert.main, *args)


def run_main(main, *args):
    """Exit status of a program's main with these arguments."""
    argv, sys.argv = sys.argv, [f"{main.__module__}.py", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
    return 0


@torch.no_grad()
@pytest.mark.parametrize("layout", ["safetensors", "safetensors_sharded", "bin", "bin_sharded"])
def test_every_released_layout_converts_and_goes_back_to_transformers(layout, tmp_path, capsys):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    reference = hf_llama(theirs, num_key_value_heads=2)
    as_released(theirs, layout)
    config = json.loads((theirs / "config.json").read_text()) | {
        "mem_layers": [1],
        "last_context_length": 12,
        "mem_dtype": "float32",
    }
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    assert run_convert("--input", theirs, "--output", ours) == 0
    assert sorted(p.name for p in ours.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    ids = torch.randint(97, (1, 40))
    model = LongLlama.from_pretrained(ours)
    assert (model.config.mem_layers, model.config.last_context_length) == ((1,), 12)
    assert (model(ids, last_context_length=40)[0] - reference(ids).logits).abs().max() < 1e-4

    assert run_convert("--input", ours, "--output", back, "--to-hf", "--dtype", "bfloat16") == 0
    again = LlamaForCausalLM.from_pretrained(back)
    right = {name: x.to(torch.bfloat16) for name, x in reference.state_dict().items()}
    assert again.dtype == torch.bfloat16 and all(torch.equal(x, right[name]) for name, x in again.state_dict().items())
    assert LongLlamaConfig.from_json(back / "config.json") == model.config
    assert capsys.readouterr().out == ""


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    hf_llama(tmp_path / "theirs")
    monkeypatch.setattr(convert.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_conversion_refuses_a_folder_in_use_unless_forced(tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "diary.txt").write_text("dear diary")
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert "--force" in one_line(capsys)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--force") == 0
    assert (tmp_path / "ours" / "diary.txt").read_text() == "dear diary"
    tokenizer = tmp_path / "ours" / "tokenizer.model"
    tokenizer.write_bytes((TINY / "tokenizer.model").read_bytes())  # of another model: this one came without
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--force") == 0
    assert not tokenizer.exists()


def test_conversion_writes_on_the_disk_that_its_output_is_on(tmp_path, monkeypatch):
    """An existing folder may be a disk of its own, onto which no file can be moved from beside it."""
    hf_llama(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    replace, moved = os.replace, []
    monkeypatch.setattr(convert.os, "replace", lambda a, b: (moved.append((Path(a), Path(b))), replace(a, b)))
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0
    assert moved and all(source.is_relative_to(tmp_path / "ours") for source, _ in moved)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


def one_line(capsys) -> str:
    """What a failed program said: one line on standard error, and nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


@pytest.mark.parametrize(
    "damage",
    [
        "code",
        "cut",
        "empty",
        "text",
        "no_dictionary",
        "no_names",
        "sparse",
        "shard_outside",
        "broken_index",
        "missing",
        "no_config",
        "same_folder",
    ],
)
def test_conversion_refuses_bad_input_in_one_line(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf_llama(theirs)
    as_released(theirs, "bin_sharded" if damage in ("shard_outside", "broken_index") else "bin")
    weights, index = theirs / "pytorch_model.bin", theirs / "pytorch_model.bin.index.json"
    if damage == "code":
        torch.save({"model.norm.weight": Exploit()}, weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage in ("empty", "text"):
        weights.write_text("" if damage == "empty" else "version https://git-lfs.github.com/spec/v1")
    elif damage == "no_dictionary":
        torch.save([1, 2], weights)
    elif damage == "no_names":
        torch.save({1: torch.ones(2)}, weights)
    elif damage == "sparse":
        torch.save({"model.norm.weight": torch.ones(2).to_sparse()}, weights)
    elif damage == "shard_outside":
        index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    elif damage == "broken_index":
        index.write_text("{")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_config":
        (theirs / "config.json").unlink()
    assert run_convert("--input", theirs, "--output", theirs if damage == "same_folder" else ours) == 2
    said = one_line(capsys)
    assert said.startswith("convert.py: error: ") and "weights_only" not in said
    assert not ours.exists() and not Path("exploited").exists()


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_config", interrupted)
    assert run_convert("--input", TESTDATA, "--output", tmp_path / "ours") == 130
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_tied_weights_may_come_with_a_copy_which_is_not_converted(tmp_path):
    model = small_model(tie_word_embeddings=True)
    convert.save_pretrained(model, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    again = LongLlama.from_pretrained(tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_conversion_keeps_the_dtype_and_makes_the_folders(dtype, tmp_path, capsys):
    new = tmp_path / "new" / "folder"
    model = small_model().to(getattr(torch, dtype))
    convert.save_pretrained(model, tmp_path / "a")
    assert run_convert("--input", tmp_path / "a", "--output", new) == 0
    assert "has no tokenizer.model" in capsys.readouterr().err
    with safe_open(new / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in model.hf_tensors()} == {getattr(torch, dtype)}
        assert file.metadata() == {"format": "pt"}  # which transformers wants
    raw = json.loads((new / "config.json").read_text())
    assert (raw["torch_dtype"], raw["model_type"], raw["hidden_act"]) == (dtype, "longllama", "silu")


def test_conversion_is_refused_onto_its_input_and_onto_a_file_also_if_forced(tmp_path, capsys):
    convert.save_pretrained(small_model(), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    for source, target, said in (
        ("a", "link", "is the --input folder"), ("a", "file", "is a file: name a folder"), ("none", "b", "is not a folder"),
    ):  # fmt: skip
        assert run_convert("--input", tmp_path / source, "--output", tmp_path / target, "--force") == 2
        assert said in one_line(capsys)


def test_the_config_which_makes_a_folder_a_model_is_written_last(tmp_path, monkeypatch):
    convert.save_pretrained(small_model(), tmp_path / "a")
    moved, replace = [], os.replace
    monkeypatch.setattr(convert.os, "replace", lambda x, y: (moved.append(Path(y).name), replace(x, y)))
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert moved[-1] == "config.json"


@pytest.mark.parametrize("kind", ["sparse", "meta", "whole"])
def test_one_bad_tensor_among_all_is_refused(kind, tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    tensors = torch.load(file)
    x = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = {"sparse": x.to_sparse, "whole": x.int, "meta": lambda: x.to("meta")}[kind]()
    torch.save(tensors, file)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert "is not a dictionary of tensors" in one_line(capsys) and not (tmp_path / "ours").exists()


def test_bin_files_of_before_torch_1_6_are_read(tmp_path):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0


def test_tensors_of_all_sizes_are_aligned_in_a_file(tmp_path):
    dtypes = {"a": torch.float8_e4m3fn, "b": torch.float32, "c": torch.bool, "d": torch.float16}
    tensors = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    convert.write_safetensors(tmp_path / "file", convert.as_weights(tensors), {})
    raw = (tmp_path / "file").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0 and all(header[name]["data_offsets"][0] % x.itemsize == 0 for name, x in tensors.items())
    assert all(torch.equal(load_file(tmp_path / "file")[name].float(), x.float()) for name, x in tensors.items())


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (MemoryError(), convert.UserError, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), convert.UserError, "out of memory"),
        (RuntimeError("not enough memory: you tried"), convert.UserError, "out of memory"),
        (OSError(2, "No such file", "x"), convert.UserError, "x: No such file"),
        (ValueError("one\ntwo"), convert.UserError, "one$"),
        (ValueError(), convert.UserError, "ValueError"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
    ids=repr,
)
def test_users_mistakes_become_one_line_and_bugs_stay_what_they_are(error, kind, said):
    with pytest.raises(kind, match=said), convert.user_errors():
        raise error


# ---------------------------------------------------------------------------------------------------------- Tokenizer

TEXTS = [
    "My name is Julien",
    "",
    " ",
    "  two leading",
    "trailing ",
    "a\nb\n\nc",
    "naïve café — “quotes”…",
    "日本語",
    "👩\u200d👩\u200d👧 emoji",
    "</s><s>",
]


def tokenizers() -> list[Path]:
    return [TINY / "tokenizer.model", *sorted(REAL_TOKENIZERS.glob("*.model"))]


@pytest.mark.parametrize("path", tokenizers(), ids=lambda path: path.stem)
def test_ids_and_text_are_those_of_sentencepiece(path):
    import sentencepiece

    raw, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer(path)
    for text in TEXTS:
        ids = raw.encode(text)
        assert tokenizer.encode(text) == [1, *ids] and tokenizer.encode(text, bos=False, eos=True) == [*ids, 2]
        assert tokenizer.decode([1, *ids, 2, 10**6]) == raw.decode(ids)


@pytest.mark.parametrize("path", tokenizers()[1:], ids=lambda path: path.stem)
def test_recorded_ids_of_the_released_tokenizers(path):
    tokenizer = Tokenizer(path)
    cases = json.loads((REAL_TOKENIZERS.parent / "golden" / "tokenizer_cases.json").read_text())[path.name]
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("path", tokenizers(), ids=lambda path: path.stem)
def test_streamed_text_is_the_text_of_all_ids(path):
    tokenizer, rng = Tokenizer(path), random.Random(0)
    nasty = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\x80\xc0a "]
    nasty += [tokenizer.sp.piece_to_id("▁"), 0, 1, 2]
    for ids in [
        *map(tokenizer.encode, TEXTS),
        *([rng.choice([rng.randrange(tokenizer.vocab_size), *nasty]) for _ in range(9)] for _ in range(3000)),
    ]:
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_streaming_holds_back_only_unfinished_characters():
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    ids = tokenizer.encode("x € 😀y", bos=False)
    decoder, text = StreamDecoder(tokenizer), ""
    for i, _ in enumerate(ids):
        text += decoder.feed(ids[i])
        whole = tokenizer.decode(ids[: i + 1])
        assert text == whole.rstrip("\ufffd")  # which is how SentencePiece shows bytes that wait for more


def test_a_continuation_keeps_its_leading_space():
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    decoder = StreamDecoder(tokenizer, continues=True)
    assert "".join(map(decoder.feed, tokenizer.encode("the sea", bos=False))) == " the sea"


def special_tokenizer(path: Path, **options) -> Path:
    with path.open("wb") as file:
        sentences = iter(["the sea"] * 9)
        SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=9, minloglevel=1, **options
        )
    return path


def test_a_tokenizer_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no </s>"):
        Tokenizer(special_tokenizer(tmp_path / "m", eos_id=-1))


def test_ids_out_of_range_and_control_ids_are_no_text(tiny):
    for i in (-1, tiny[1].vocab_size, 0, 1, 2):
        assert tiny[1].decode([i]) == StreamDecoder(tiny[1]).feed(i) == "" and not tiny[1].is_text(i)


@pytest.mark.parametrize(
    "kept", [{"add_dummy_prefix": False, "remove_extra_whitespaces": False}, {}], ids=["kept", "dropped"]
)
def test_tokenizers_that_keep_or_drop_all_spaces_stream_the_text_of_all_ids(kept, tmp_path):
    tokenizer = Tokenizer(special_tokenizer(tmp_path / "m", **kept))
    space, rest = tokenizer.sp.piece_to_id("\u2581"), tokenizer.encode("sea", bos=False)
    for ids in ([space, space, *rest], [space, *rest, space, space, *rest], rest + rest, tokenizer.encode("  the sea")):
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == ("  the sea" if kept else "the sea")


# ------------------------------------------------------------------------------------------------------- Command line


def run_generate(*args):
    return run_main(generate.main, "--device", "cpu", *args)


def test_generate_writes_text_to_stdout_and_the_rest_to_stderr(capsys):
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 8, "--temperature", 0) == 0
    out, err = capsys.readouterr()
    model, tokenizer = generate.load(TINY, torch.device("cpu"))
    ids = [i.item() for i in model.generate(torch.tensor([tokenizer.encode("The sea")]), 8, temperature=0)]
    assert tokenizer.decode(tokenizer.encode("The sea") + ids) == "The sea" + out.removesuffix("\n")
    assert "prompt 3 tokens in 1 windows" in err and "tokens/s" in err and "peak" in err
    run_generate("--prompt", "The sea", "--max-new-tokens", 2, "--quiet")
    assert capsys.readouterr().err == ""


def test_generate_counts_windows_and_memory(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the whale " * 1000)
    assert run_generate("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 2, "--mem-dtype", "float32") == 0
    _, err = capsys.readouterr()
    T = 1 + len(Tokenizer(TINY / "tokenizer.model").encode("the whale " * 1000, bos=False))
    assert f"prompt {T:,} tokens in {-(-(T - 128) // 256) + 1} windows" in err
    assert f"memory {T - 128:,} tokens, {(T - 128) * 2 * 128 * 4 / 2**20:,.1f} MiB" in err


def test_statistics_leave_the_first_step_out_of_the_speed_of_decoding(capsys, monkeypatch):
    """A clock: the prompt of 3 tokens takes 2 seconds, the first step 10, the two after it a quarter each."""
    ticks = iter([0.0, 2.0, 12.0, 12.25, 12.5])
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 4, "--temperature", 0) == 0
    assert "prefill 2 tokens/s | decode 4.0 tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [[], ["--mem-dtype", "float8_e4m3fn"], ["--mem-topk", 32], ["--mem-device", "cpu"]], ids=str
)
def test_a_book_is_read_once_and_asked_later(flags, capsys, tmp_path):
    book = (TINY / "book.txt").read_text()[:40000]
    (tmp_path / "book.txt").write_text(book[:9000] + " The pass key is 71428. Remember it. " + book[9000:])
    reading = ("--prompt-file", tmp_path / "book.txt", "--max-new-tokens", 0, "--save-memory", tmp_path / "memory")
    assert run_generate(*reading, *flags) == 0
    assert capsys.readouterr().out == ""
    asking = ("--prompt", " What is the pass key? The pass key is", "--max-new-tokens", 6, "--temperature", 0)
    for _ in range(2):
        assert run_generate(*asking, "--load-memory", tmp_path / "memory", *flags) == 0
        out, err = capsys.readouterr()
        assert out.split() == ["71428"] and "prompt 11 tokens in 1 windows" in err


def test_standard_input_and_an_empty_prompt_are_prompts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The sea")))
    assert run_generate("--prompt-file", "-", "--max-new-tokens", 5, "--temperature", 0) == 0
    piped = capsys.readouterr().out
    run_generate("--prompt", "The sea", "--max-new-tokens", 5, "--temperature", 0)
    assert capsys.readouterr().out == piped != ""
    assert run_generate("--prompt", "", "--max-new-tokens", 5) == 0
    assert run_generate("--prompt", "x", "--max-new-tokens", 0) == 0


def test_streams_that_are_closed_or_lack_a_character_are_no_mistake(capsys, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(generate.StreamDecoder, "feed", lambda self, token: "é")
    for streams in ({"stdout": None}, {"stderr": None}, {"stdout": ascii_only}):
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            assert run_generate("--prompt", "The sea", "--max-new-tokens", 2) == 0
    assert ascii_only.buffer.getvalue().startswith(b"??")
    monkeypatch.setattr(sys, "stdin", None)
    assert run_generate("--prompt-file", "-") == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_settings_that_will_overflow_are_warned_of_with_the_value_that_avoids_it(capsys, tmp_path):
    run_generate("--prompt", "sea " * 300, "--max-new-tokens", 1, "--last-context-length", 256)
    assert "--last-context-length 255 avoids it" in capsys.readouterr().err
    run_generate("--prompt", "sea " * 300, "--max-new-tokens", 1, "--last-context-length", 255)
    assert "warning" not in capsys.readouterr().err
    memory = str(tmp_path / "memory")
    run_generate("--prompt", "sea " * 300, "--max-new-tokens", 0, "--last-context-length", 200, "--save-memory", memory)
    capsys.readouterr()
    run_generate("--prompt", " sea", "--max-new-tokens", 70, "--load-memory", memory)
    assert "at most 54 new tokens avoid it" in capsys.readouterr().err
    run_generate("--prompt", " sea", "--max-new-tokens", 54, "--load-memory", memory)
    assert "warning" not in capsys.readouterr().err
    run_generate("--prompt", "<s> sea", "--max-new-tokens", 1)
    assert "bos" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [], ["--prompt", "a", "--prompt-file", "b"], ["--prompt-file", "missing.txt"], ["--prompt-file", "latin1.txt"],
        ["--prompt-file", "."], ["--prompt", "a", "--top-p", "1.7"], ["--prompt", "a", "--top-p", "0"],
        ["--prompt", "a", "--top-k", "0"], ["--prompt", "a", "--temperature", "-1"], ["--prompt", "a", "--temperature", "nan"],
        ["--prompt", "a", "--max-new-tokens", "-3"], ["--prompt", "a", "--max-new-tokens", "many"],
        ["--prompt", "a", "--seed", "-1"], ["--prompt", "a", "--seed", str(2**63)], ["--prompt", "caf\udce9"],
        *(["--prompt", "a", "--device", name] for name in ("meta", "xla", "hpu", "vulkan", "cuda:99", "privateuseone")),
        ["--prompt", "a", "--dtype", "int8"], ["--prompt", "a", "--mem-dtype", "int8"], ["--prompt", "a", "--device", "abacus"],
        ["--prompt", "a", "--last-context-length", "0"], ["--prompt", "a", "--mem-attention-grouping", "0", "4"],
        ["--prompt", "a", "--model", "missing"], ["--prompt", "a", "--model", "empty"],
        ["--prompt", "a", "--mem-topk", "0"], ["--prompt", "a", "--mem-device", "tape"], ["--prompt", "a", "--keep-local", "-1"],
        ["--prompt", "a", "--keep-local", "256"], ["--prompt", "a", "--save-memory", "missing/file"],
        ["--prompt", "a", "--save-memory", "."], ["--prompt", "a", "--load-memory", "missing"],
        ["--prompt", "a", "--load-memory", "latin1.txt"], ["--prompt", "", "--load-memory", "latin1.txt"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_in_flags_get_one_line_and_status_2(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    assert run_generate(*flags) == 2
    assert one_line(capsys).startswith("generate.py: error: ")


@pytest.mark.parametrize(
    "damage, named",
    [
        ("config_broken", "config.json"), ("config_list", "config.json"), ("mem_layer_99", "mem_layers"),
        ("weights_cut", "cut short"),
        ("weights_missing", "model.safetensors"), ("weights_misshapen", "differ"), ("weights_nan", "no finite numbers"),
        ("weights_int8", "weight is I8"),
        ("many_layers", "100000000 layers"), ("rope_no_object", "rope_parameters"),
        ("tokenizer_missing", "tokenizer.model"),
        ("tokenizer_broken", "tokenizer.model"), ("tokenizer_no_bos", "no <s>"),
        ("tokenizer_too_large", "tokenizer has"), ("shard_outside", "outside"),
    ],
)  # fmt: skip
def test_broken_models_get_one_line_and_status_2(damage, named, capsys, tmp_path):
    for path in TINY.glob("*"):
        if path.suffix in (".json", ".safetensors", ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    raw = json.loads(config.read_text())
    if damage == "config_broken":
        config.write_text("{")
    elif damage == "config_list":
        config.write_text("[]")
    elif damage == "mem_layer_99":
        config.write_text(json.dumps(raw | {"mem_layers": [99]}))
    elif damage == "weights_cut":
        weights.write_bytes(weights.read_bytes()[:100000])
    elif damage == "weights_missing":
        weights.unlink()
    elif damage == "weights_misshapen":
        config.write_text(json.dumps(raw | {"intermediate_size": 360}))
    elif damage == "weights_nan":
        save_file({name: x * math.nan for name, x in load_file(weights).items()}, weights)
    elif damage == "weights_int8":
        save_file({name: x.to(torch.int8) for name, x in load_file(weights).items()}, weights)
    elif damage == "many_layers":
        config.write_text(json.dumps(raw | {"num_hidden_layers": 10**8}))
    elif damage == "rope_no_object":
        config.write_text(json.dumps(raw | {"rope_scaling": "linear"}))
    elif damage == "tokenizer_missing":
        (tmp_path / "tokenizer.model").unlink()
    elif damage == "tokenizer_broken":
        (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer")
    elif damage == "tokenizer_no_bos":
        with (tmp_path / "tokenizer.model").open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=iter(["the sea"] * 9), model_writer=file, vocab_size=9, bos_id=-1, minloglevel=1
            )
    elif damage == "tokenizer_too_large":
        config.write_text(json.dumps(raw | {"vocab_size": 1000}))
        tensors = load_file(weights)
        save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:1000].clone()}, weights)
    elif damage == "shard_outside":
        weights.rename(tmp_path.parent / "stolen.safetensors")
        index = {"weight_map": dict.fromkeys(("a", "b"), "../stolen.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run_generate("--prompt", "a", "--model", tmp_path) == 2
    assert re.search(named, one_line(capsys))


def test_running_out_of_memory_gets_one_line_and_status_2(capsys, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 10 TB"
        )

    monkeypatch.setattr(LongLlama, "forward", no_memory)
    assert run_generate("--prompt", "a") == 2
    assert "out of memory" in one_line(capsys)


def test_a_program_whose_output_nobody_reads_ends_quietly():
    script = "import argparse, convert\nwith convert.ending_well(argparse.ArgumentParser()):\n    print('x' * 9)"
    ours, theirs = os.pipe()
    os.close(ours)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, env=buffered, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_keeps_what_there_is(capsys, monkeypatch):
    forward, calls = LongLlama.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LongLlama, "forward", interrupted)
    assert run_generate("--prompt", "The sea", "--temperature", 0) == 130
    out, err = capsys.readouterr()
    assert len(out) > 4 and "Traceback" not in err


compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@compiles
@pytest.mark.parametrize("device, window", [("cpu", 16)] + [("cuda", 16), ("cuda", 1024)] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-5), (torch.bfloat16, 5e-2)])
def test_compiled_layers_give_the_same_logits(dtype, bound, device, window):
    """Windows, and one token at a time: compiled, on a GPU captured and replayed; memory begins, and a small window overflows."""
    model, compiled = (small_model(max_position_embeddings=window).to(device, dtype) for _ in range(2))
    generate.compile_layers(compiled)
    ids = torch.randint(61, (2, 70), device=device)
    with torch.inference_mode():
        for parts in ([5] + [1] * 65, [40] + [1] * 30):
            caches = [Cache(model.config) for _ in range(2)]
            for part in ids.split(parts, dim=1):
                a, b = (m(part, cache)[0] for m, cache in zip((model, compiled), caches))
                assert (a - b).norm() / b.norm() < bound


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "mem_topk": 9}, {"mem_dtype": "float8_e4m3fn", "keep_local": 5}]
)
def test_steps_with_lengths_in_tensors_give_the_same_logits(changes, monkeypatch):
    """What a CUDA graph would replay, done again and again: nothing but the tensors may tell one step from another."""
    prepared, store = [], longllama.store

    def captured(work, device):
        prepared.append(work)
        for _ in range(3):
            work()
        return work

    def store_before_nan(parts, *args, **kwargs):  # room without numbers may hold anything
        stored = store(parts, *args, **kwargs)
        stored[:, :, sum(x.shape[2] for x in parts) :] = torch.nan
        return stored

    monkeypatch.setattr(generate, "captured", captured)
    monkeypatch.setattr(longllama, "store", store_before_nan)
    model, stepping = small_model(**changes), small_model(**changes)
    stepping.forward = generate.Steps(stepping)
    ids = torch.randint(61, (2, 70))
    for parts in ([1] * 70, [40] + [1] * 30, [40, 1, 1, 3, 1, 1, 9, 1, 1, 12]):
        caches = [Cache(model.config) for _ in range(2)]
        for part in ids.split(parts, dim=1):
            (right, _), (logits, cache) = (m(part, cache) for m, cache in zip((model, stepping), caches))
            assert (logits - right).abs().max() < 1e-4
            assert caches[0].local_length == cache.local_length and caches[0].memory_length == cache.memory_length
    assert 8 <= len(prepared) <= 20  # once where a local context begins, or memory has moved
    forks = [cache.fork() for cache in caches for _ in range(2)]
    for i in (0, 1, 0, 1):  # each goes on by itself
        assert (model(ids[:, i : i + 1], forks[i])[0] - stepping(ids[:, i : i + 1], forks[i + 2])[0]).abs().max() < 1e-4


@torch.inference_mode()
def test_what_steps_cannot_do_goes_the_usual_way(monkeypatch):
    def captured(work, device):
        raise AssertionError("captured")

    monkeypatch.setattr(generate, "captured", captured)
    ids = torch.randint(61, (2, 30))
    usual, padded = longllama.LocalCache, F.pad(torch.ones(2, 27), (3, 0))
    looking_on = type("RecordingContext", (usual,), {})  # as in examples/look_at_memory.py
    for changes, mask, kind in (({"mem_device": "cpu"}, None, usual), ({}, padded, usual), ({}, None, looking_on)):
        model, stepping = small_model(**changes), small_model(**changes)
        stepping.forward = generate.Steps(stepping)
        (_, a), (_, b) = (m(ids, None, mask) for m in (model, stepping))
        for layer in b.layers:
            layer.__class__ = kind
        for i in range(3):
            assert (model(ids[:, i : i + 1], a)[0] - stepping(ids[:, i : i + 1], b)[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 rows, and the cache has 2"):
        stepping(ids[:1, :1], b)


def test_without_a_compiler_compile_is_refused(tmp_path):
    nothing_cached = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "generate.py", "--prompt", "The sea", "--device", "cpu", "--compile"]
    done = subprocess.run(command, cwd=HERE, env=nothing_cached, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("generate.py: error: --compile fails here: .*no-such-compiler.*\n", done.stderr)


@compiles
def test_compiled_layers_give_the_same_text(capsys):
    prompt = ["--prompt", "The sea " * 200, "--max-new-tokens", 10, "--temperature", 0, "--quiet"]
    run_generate(*prompt)
    eager = capsys.readouterr().out
    assert run_generate(*prompt, "--compile") == 0
    assert capsys.readouterr().out == eager


def stepping_pair(monkeypatch, **changes) -> tuple[LongLlama, LongLlama]:
    """A model, and the same that does single tokens as a CUDA graph would."""
    monkeypatch.setattr(generate, "captured", lambda work, device: work)
    model, stepping = small_model(**changes), small_model(**changes)
    stepping.forward = generate.Steps(stepping)
    return model, stepping


@pytest.mark.parametrize(
    "changes, last", [({"hidden_size": 48}, 8), ({}, 20)], ids=["padded heads", "beyond the window"]
)
def test_steps_of_padded_heads_or_beyond_the_window_and_in_either_mode_give_the_same_logits(changes, last, monkeypatch):
    pair, ids = stepping_pair(monkeypatch, **changes), torch.randint(61, (2, 60))
    caches = [Cache(pair[0].config) for _ in pair]
    for mode, parts in (torch.inference_mode, [50, 1, 1, 1, 1, 6]), (torch.no_grad, [57, 1, 1, 1]):
        with mode():
            for part in ids.split(parts, dim=1):
                a, b = (m(part, c, last_context_length=last)[0] for m, c in zip(pair, caches))
                assert (a - b).abs().max() < 1e-4 and caches[0].local_length == caches[1].local_length


@torch.inference_mode()
def test_steps_go_on_after_padding_and_after_a_capture_that_failed(monkeypatch):
    pair, ids = stepping_pair(monkeypatch), torch.randint(61, (2, 30))
    caches = [m(ids)[1] for m in pair]
    other = pair[1](ids)[1]

    def read(token, *mask):
        a, b = (m(ids[:, token : token + 1], c, *mask)[0] for m, c in zip(pair, caches))
        assert (a - b)[1].abs().max() < 1e-4  # the other row may be padding

    read(0)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(generate, "captured", lambda *_: 1 / 0)
        pair[1](ids[:, :1], other)
    read(1)
    read(2, torch.tensor([[0], [1]]))
    read(3)


def test_steps_leave_gradients_and_other_kinds_of_memory_alone(monkeypatch):
    monkeypatch.setattr(generate, "captured", lambda *_: pytest.fail("captured"))
    kind, model, ids = type("OtherMemory", (longllama.Memory,), {}), small_model(), torch.randint(61, (1, 30))
    model.forward = generate.Steps(model)
    with torch.no_grad():
        _, cache = model(ids)
    assert model(ids[:, :1], cache)[0].requires_grad
    with torch.inference_mode():
        cache = Cache(model.config, kind)
        model(ids, cache)
        model(ids[:, :1], cache)


def test_every_flag_is_used(monkeypatch):
    seen, load, run = {}, generate.load, LongLlama.generate
    monkeypatch.setattr(generate, "load", lambda *args, **named: (seen.update(named), load(*args, **named))[1])
    monkeypatch.setattr(LongLlama, "generate", lambda *args, **named: (seen.update(named), run(*args, **named))[1])
    flags = {
        "last_context_length": 9, "mem_dtype": "float16", "mem_attention_grouping": [2, 4], "mem_device": "cpu", "mem_topk": 5,
        "keep_local": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.25, "seed": 6,
    }  # fmt: skip
    words = ["--prompt", "The sea", "--max-new-tokens", 1]
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    assert run_generate(*words) == 0
    assert {name: seen.get(name) for name in flags} == flags


def test_a_memory_is_saved_also_where_text_is_written(tmp_path, capsys):
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 3, "--save-memory", tmp_path / "memory") == 0
    assert (tmp_path / "memory").exists() and capsys.readouterr().out.strip()


def test_text_after_an_empty_prompt_begins_without_a_space(tiny, capsys):
    for seed in range(3):
        assert run_generate("--prompt", "", "--max-new-tokens", 8, "--seed", seed) == 0
        ids = [i.item() for i in tiny[0].generate(torch.tensor([[1]]), 8, temperature=0.8, seed=seed)]
        assert capsys.readouterr().out == tiny[1].decode(ids) + "\n"


def test_overrides_of_0_are_taken_and_of_none_are_not(tmp_path):
    for file in ("model.safetensors", "tokenizer.model"):
        shutil.copyfile(TINY / file, tmp_path / file)
    raw = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"keep_local": 6}))
    for given, taken in (0, 0), (None, 6):
        assert generate.load(tmp_path, torch.device("cpu"), keep_local=given)[0].config.keep_local == taken


@torch.no_grad()
def test_overflow_is_warned_of_only_where_there_is_one_and_a_way_around_it():
    def warned(model, T, new, cache=None) -> list[str]:
        args = SimpleNamespace(max_new_tokens=new)
        return list(generate.warnings(args, "sea", T, model, cache or Cache(model.config)))

    assert warned(small_model(mem_layers=()), 10, 10) == warned(small_model(keep_local=2), 10, 10) == []
    model = small_model()
    assert "at most 8 new tokens avoid it" in warned(model, 30, 16)[0]
    assert "--last-context-length 1 avoids it" in warned(model, 30, 15)[0]
    _, cache = model(torch.ones(1, 15, dtype=torch.long), last_context_length=15)
    assert "at most 1 new tokens avoid it" in warned(model, 1, 4, cache)[0]


# -------------------------------------------------------------------------------------------------------- Tiny model


def test_a_pass_key_is_hidden_in_text_only(tmp_path, capsys):
    from examples import passkey

    (tmp_path / "book").write_bytes(b"caf\xe9")
    assert run_main(passkey.main, "--text", tmp_path / "book") == 2
    assert f"--text {tmp_path / 'book'} is not UTF-8 text (byte 3)" in one_line(capsys)


def test_the_pass_key_table_has_a_row_for_each_model_and_is_printed_where_one_fails(tmp_path, capsys):
    from examples import passkey

    other, plain = tmp_path / "tiny", tmp_path / "plain"
    for folder, changes in ((other, {}), (plain, {"mem_layers": []})):
        shutil.copytree(TINY, folder)
        config = json.loads((TINY / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    flags = ["--lengths", "512,512", "--trials", "2", "--filler", "grass", "--model"]
    assert run_main(passkey.main, *flags, TINY, other, TINY, plain) == 2
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if "grass" in line]
    assert [row.split(" | ")[0] for row in rows] == [f"| {TINY}", f"| {other}"]
    assert all(row.endswith("(2) |") for row in rows) and "exceed the window" in err


def test_tiny_finds_a_pass_key_hundreds_of_windows_back(tiny, capsys):
    from examples import passkey

    assert run_main(passkey.main, "--lengths", "64k", "--trials", "3", "--filler", "text", "--seed", "5") == 0
    assert "100% (3)" in capsys.readouterr().out
    model, tokenizer = tiny
    text, rng = tokenizer.encode((TINY / "book.txt").read_text(), bos=False), torch.Generator().manual_seed(0)
    blind = LongLlama.from_pretrained(TINY)
    blind.config.__dict__["mem_layers"] = ()  # the same question without what memory holds
    for depth in (0.1, 0.9):
        ids = torch.tensor([passkey.prompt_ids(tokenizer, 1 << 12, depth, "90417", text, rng)])
        assert ids.shape == (1, 1 << 12)
        found = tokenizer.decode([i.item() for i in model.generate(ids, 6, temperature=0)])
        lost = tokenizer.decode([i.item() for i in blind.generate(ids[:, -128:], 6, temperature=0)])
        assert found.strip() == "90417" != lost.strip()


@torch.no_grad()
def test_memory_lowers_the_perplexity_of_tiny_on_a_book_it_never_saw(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode((TINY / "book.txt").read_text())])[:, : 40 * 256]
    with_memory, _ = model(ids, last_context_length=256)
    without = model(ids.view(40, 256))[0].view_as(with_memory)
    losses = [F.cross_entropy(x[0, 256:-1], ids[0, 257:]).item() for x in (with_memory, without)]
    assert losses[0] < losses[1]
