"""What the README and the docstrings claim of the model, checked: python -m pytest test_longllama.py

Truth comes from elsewhere: numbers recorded from the original LongLLaMA code (testdata/), transformers' LlamaForCausalLM,
formulas of a few lines in float64. `kind` is `LongLlama` and then `FastLlama`, which have to agree; what only the second has
is tested in fast/. Sizes of blocks and of what is computed at once are passed, or are of subclasses: nothing is patched.
"""

import ast
import gc
import json
import re
import sys
from copy import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM

import fast.attention
import longllama
from fast import FastConfig, FastContext, FastLlama, FastMemory
from fast.linear import Limits
from longllama import Cache, LocalCache, LongLlama, LongLlamaConfig, Memory, cross_batch_extra, split_into_windows
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
TESTDATA, TINY = HERE / "testdata", HERE / "tiny"
CASES, EXPECTED = json.loads((TESTDATA / "cases.json").read_text()), load_file(TESTDATA / "expected.safetensors")
MEMORIES = {LongLlama: Memory, FastLlama: FastMemory}
each_of = pytest.mark.parametrize

def each(*params):
    """A fixture: a test that names it is run with each of these."""
    return pytest.fixture(params=params, ids=lambda x: getattr(x, "__module__", None))(lambda request: request.param)

kind, attend = each(LongLlama, FastLlama), each(longllama.attend, fast.attention.attend)
device = each("cpu", *["cuda"] * torch.cuda.is_available())
padded, grad, G, mem_dtype = each(False, True), each(False, True), each(2, 4), each("float32", "bfloat16", "float16")

@pytest.fixture(autouse=True)
def alike_each_time():
    """The same random numbers; one thread, since more would wait for each other; gradients only where a test wants them."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)

def small_config(kind=LongLlama, **changes) -> LongLlamaConfig:
    """4 layers, 2 of them with memory, a window of 16."""
    return kind.config_class(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mem_layers": (1, 2), "max_position_embeddings": 16, "last_context_length": 8, "mem_dtype": "float32",
    } | changes)

def small_model(kind=LongLlama, **changes) -> LongLlama:
    torch.manual_seed(0)
    return kind(small_config(kind, **changes)).eval()

def small_ids(*shape: int) -> Tensor:
    return torch.randint(61, shape)

def mask_of(ids: Tensor, padding: int) -> Tensor:
    """Ones, but for as many zeros on the left of row 0."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask

def memory_class(kind, **attributes) -> type[Memory]:
    """The memory of a kind of model, changed as by a subclass."""
    return type("Own" + MEMORIES[kind].__name__, (MEMORIES[kind],), attributes)

def new_cache(model: LongLlama, **made_of) -> Cache:
    """An empty cache of other parts than the model's: new_memory, new_context."""
    return model.new_cache(**made_of) if isinstance(model, FastLlama) else Cache(model.config, **made_of)

def lengths(cache: Cache) -> tuple[int, int]:
    return cache.local_length, cache.memory_length

def read(model, ids, segments, cache=None, mask=None, **options) -> Tensor:
    """Logits (B, T, V) of ids (B, T) fed in segments, one cache carried along."""
    cache, masks = cache or model.new_cache(), [None] * len(ids[0]) if mask is None else mask.split(segments, dim=1)
    parts = zip(ids.split(segments, dim=1), masks)
    return torch.cat([model(part, cache, real, **options)[0] for part, real in parts], dim=1)

def generated(model, ids, n: int, **options) -> list[list[int]]:
    """At most n ids after each row."""
    return torch.stack(list(model.generate(ids, n, **options)), dim=1).tolist()

def error(a: Tensor, b: Tensor) -> Tensor:
    assert a.shape == b.shape
    return (a - b).abs().max()

def naive(q, k, v, seen=torch.tensor(True)) -> tuple[Tensor, Tensor]:  # noqa: B008, since it never changes
    """The formula in float64: q (B, H, T, D), k and v (B, G, S, D), seen broadcast to (B, H, T, S); and the log-sum-exp."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.double() @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -1e30)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)

def rotated(x: Tensor, first: int) -> Tensor:
    """RoPE in float64, as products of complex numbers: x (B, H, T, D) at positions from `first` on."""
    D, position = x.shape[-1], first + torch.arange(x.shape[2]).double()
    turn = torch.exp(1j * position.outer(10000.0 ** -(torch.arange(0, D, 2).double() / D)))
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)

class Watched(TorchDispatchMode):
    """Notes sizes, of the largest tensor made, of all copies, of scores at softmax; and dtypes of what is drawn from."""

    def __init__(self):
        super().__init__()
        self.largest, self.copied, self.scores, self.drawn = 0, 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        self.copied += out.numel() if name in ("cat", "copy_", "clone", "_to_copy") and out.is_floating_point() else 0
        self.scores += [out.numel()] if name == "_softmax" else []
        self.drawn += [args[0].dtype] if name == "multinomial" else []
        return out

# ------------------------------------------------------------------------------ 1. It computes what the original computes

def error_of(model, name: str, cache=None, keep=0) -> Tensor:
    """How far a recorded case's logits are from the original's; keep > 0: those of the last so many of each segment."""
    case, device, ids = CASES[name], model.norm.weight.device, EXPECTED[f"{name}.input_ids"]
    segments, mask = case["segments"], EXPECTED.get(f"{name}.attention_mask", torch.ones_like(ids))
    ids, mask = ids[:, : sum(segments)].to(device), mask[:, : sum(segments)]
    options = {"last_context_length": case["last_context_length"], "logits_to_keep": keep}
    logits = read(model, ids, segments, cache, mask.to(device) if case["padded"] else None, **options).float().cpu()
    right, real = (torch.cat([x[:, -keep:] for x in whole.split(segments, dim=1)], dim=1)
                   for whole in (EXPECTED[f"{name}.logits"], mask.bool()))
    return error(logits[real], right[real])

# Sums in another order differ by 1e-5, bfloat16 rounded another way by 1e-4; memory keys that were rotated would by 3 to 8.
@each_of("keep", [0, 1, 3, 40])
@each_of("name", CASES)
def test_logits_are_those_of_the_original_all_of_them_or_the_last(name, keep, kind, device):
    changes = CASES[name]["config"]
    bound = 5e-4 if changes.get("mem_dtype") == "bfloat16" else 1e-4
    assert error_of(kind.from_pretrained(TESTDATA, device, **changes), name, keep=keep) < bound

@each_of("name", ["many_windows", "left_padded_batch_decode_past_overflow", "chunked_continuation"])
def test_small_memory_blocks_and_few_rows_at_once_give_the_originals_logits_too(name, grad, kind, device):
    model = kind.from_pretrained(TESTDATA, device, mem_attention_grouping=(4, 11))
    few_rows = type("FewRows", (LocalCache,), {"attend": staticmethod(partial(longllama.attend, rows=11))})
    context = few_rows if kind is LongLlama else partial(FastContext, limits=Limits(rows=11))
    cache = new_cache(model, new_memory=memory_class(kind, BLOCK=20), new_context=context)
    with torch.set_grad_enabled(grad):  # no kernel is used where gradients may be wanted
        assert error_of(model, name, cache) < 1e-4
    assert len(cache.layers[1].memory.blocks) > 2

def test_greedy_generation_is_that_of_the_original(kind, device):
    model, ids = kind.from_pretrained(TESTDATA, device), EXPECTED["greedy_generation.input_ids"].to(device)
    right = EXPECTED["greedy_generation.generated"].tolist()
    assert generated(model, ids, CASES["greedy_generation"]["generate"], temperature=0) == right

@each_of("dtype", [torch.bfloat16, torch.float16])  # rounded in 4 layers, two sums each
def test_half_precision_with_memory_stays_near_the_original(dtype, kind, device):
    ids, right = EXPECTED["many_windows.input_ids"].to(device), EXPECTED["many_windows.logits"]
    logits, _ = kind.from_pretrained(TESTDATA, device, dtype)(ids)
    assert logits.dtype == dtype and (logits.float().cpu() - right).norm() / right.norm() < 8 * torch.finfo(dtype).eps

# --------------------------------------------------------------------------- 2. Without memory it is transformers' LLaMA

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 24}  # in windows of 64; some frequencies stay, some become slow, some are between
LLAMAS = {
    "plain": {}, "grouped_query": {"num_key_value_heads": 2}, "one_key_value_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True}, "large_eps": {"rms_norm_eps": 1e-2}, "heads_of_2": {"num_attention_heads": 32},
    "rope_theta_1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "heads_apart": {"head_dim": 24, "num_key_value_heads": 2}, "heads_small": {"head_dim": 8},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 32},
}

def hf_llama(folder, kind=LlamaForCausalLM, **changes) -> LlamaForCausalLM:
    """A random LlamaForCausalLM, or Mistral, saved into folder as transformers saves it."""
    torch.manual_seed(1)
    model = kind(kind.config_class(**{
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    } | changes)).eval()
    model.save_pretrained(folder)
    return model

@each_of("sliding_window", [None, 64])
def test_mistral_is_llama_where_its_window_slides_no_earlier_than_it_ends(sliding_window, kind, tmp_path):
    reference = hf_llama(tmp_path, MistralForCausalLM, sliding_window=sliding_window, head_dim=24, num_key_value_heads=2)
    ids = torch.randint(97, (2, 60))
    assert error(kind.from_pretrained(tmp_path)(ids)[0], reference(ids).logits) < 1e-4

@each_of("name", LLAMAS)
def test_without_memory_or_with_all_kept_local_it_is_llama_and_padding_changes_nothing(name, padded, kind, tmp_path):
    reference, ids, n = hf_llama(tmp_path, **LLAMAS[name]), torch.randint(97, (2, 50)), 12 * padded
    longer, mask = (F.pad(x, (n, 0)) for x in (ids, torch.ones_like(ids)))
    logits = read(kind.from_pretrained(tmp_path), longer, [20 + n, 1, 1, 15, 13], mask=mask)
    model = kind.from_pretrained(tmp_path, mem_layers=(1,), max_position_embeddings=16)
    kept, cache = model(longer, attention_mask=mask, last_context_length=62)
    assert lengths(cache) == (50 + n, 0)  # beyond the window
    for ours in (logits, kept):
        assert error(ours[:, n:], reference(ids).logits) < 1e-4  # float32 sums in another order, of logits up to 20

def test_a_head_of_its_own_is_kept_as_transformers_keeps_it_though_the_config_ties_it(kind, tmp_path):
    reference, ids = hf_llama(tmp_path, tie_word_embeddings=True), torch.randint(97, (1, 30))
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.randn(97, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    right, logits = LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, kind.from_pretrained(tmp_path)(ids)[0]
    assert error(logits, right) < 1e-4 and error(right, reference(ids).logits) > 1

def test_bfloat16_is_as_near_float32_as_that_of_transformers_and_a_norm_is_the_same_bit_by_bit(kind, tmp_path):
    reference, ids = hf_llama(tmp_path, initializer_range=0.1), torch.randint(97, (4, 60))
    right, model = reference(ids).logits, kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, theirs = model(ids)[0], reference.bfloat16()(ids).logits
    off, theirs_off = ((x.float() - right).square().mean().sqrt() for x in (ours, theirs))
    assert ours.dtype == torch.bfloat16 and off < 1.1 * theirs_off  # of 23,280 logits: the mean error is within 10%
    model.norm.weight = reference.model.norm.weight = torch.nn.Parameter(torch.rand(64).bfloat16())
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(model.norm(x), reference.model.norm(x))

def test_hidden_states_by_the_lines_in_the_docs_are_those_of_transformers_and_of_all_windows(kind, tmp_path):
    lines = re.search(r"```python\n(.*?register_forward_hook.*?)```", (HERE / "docs" / "inputs.md").read_text(), re.S)[1]
    reference, ids = hf_llama(tmp_path), torch.randint(97, (2, 50))

    def run_lines(**settings) -> dict:
        named = {"torch": torch, "model": kind.from_pretrained(tmp_path, **settings), "ids": ids}
        exec(lines, named)
        return named

    named, right = run_lines(), reference(ids, output_hidden_states=True).hidden_states[1:]
    *states, last = named["states"]
    for ours, theirs in zip((*states, named["model"].norm(last)), right, strict=True):
        assert error(ours, theirs) < 1e-4
    named = run_lines(mem_layers=(1,), max_position_embeddings=16, last_context_length=8)
    assert lengths(named["cache"]) == (8, 42) and error(named["model"].logits(named["states"][-1]), named["logits"]) < 1e-5

def test_the_loss_is_that_of_transformers(kind, tmp_path):
    reference, ids = hf_llama(tmp_path), torch.randint(97, (2, 50))
    model, labels = kind.from_pretrained(tmp_path), ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    theirs, (losses, cache) = reference(ids, labels=labels), model.token_losses(ids, labels)
    right = F.cross_entropy(theirs.logits[:, :-1].mT, labels[:, 1:], reduction="none")
    assert losses.shape == ids.shape and cache.local_length == 50 and not losses[:, 0].any()
    assert error(losses[:, 1:], right) < 1e-4 and abs(model(ids, labels=labels)[0] - theirs.loss) < 1e-5

@torch.enable_grad()
@each_of("T, window", [(60, 16), (1100, 256)], ids=["one piece of logits", "several"])
def test_the_loss_has_the_gradients_of_the_plain_formula_through_memory_too_and_is_0_if_no_label_counts(T, window, kind):
    model, ids = small_model(kind, max_position_embeddings=window), small_ids(2, T)
    labels, weights = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100), list(model.parameters())
    right = F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss, cache = model(ids, labels=labels)
    assert cache.memory_length == T - 8 and abs(loss - right) < 1e-5
    for ours, theirs in zip(*(torch.autograd.grad(x, weights) for x in (loss, right))):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm() != 0  # float32, summed in another order
    for few in (ids[:, :1], ids[:, :20]):
        loss, _ = model(few, labels=torch.full_like(few, -100))
        assert loss.item() == 0 and not any(x.any() for x in torch.autograd.grad(loss, weights, materialize_grads=True))

@torch.enable_grad()
def test_losses_and_their_gradients_make_no_tensor_of_text_times_vocabulary(kind):
    V, kept = 2000, []
    model, ids = small_model(kind, vocab_size=V, max_position_embeddings=256), torch.randint(V, (1, 3072))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x), Watched() as seen:
        model(ids, labels=ids)[0].backward()
    assert seen.largest == 1024 * V > max(kept)  # logits of a third of the text, computed again for their gradients

# ---------------------------------------------------------------------------- 3. Attention is the formula, in float64

@each_of("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 8e-2)])  # scores up to 20, rounded
@each_of("G", [1, 2, 6])
def test_attention_merged_over_sets_is_one_softmax_over_their_union(G, padded, dtype, bound, attend, device):
    q, k, v = (torch.randn(2, n, S, 16).to(device, dtype) for n, S in ((6, 5), (G, 36), (G, 36)))
    q, real = q * 3, torch.ones(2, 1, 36, 1, dtype=torch.bool, device=device)
    real[0, :, : 30 * padded] = real[1, :, : 7 * padded] = False  # a whole set of padding, which must get no weight
    sets = zip(*(x.split((30, 1, 5), dim=2) for x in (k, v, real)), (False, False, True))
    a, b, c = (attend(q, k_i, v_i, real_i if padded else None, causal) for k_i, v_i, real_i, causal in sets)
    out, _ = longllama.merge(longllama.merge(a, b), c)
    seen = real.mT & torch.ones(5, 36, dtype=torch.bool, device=device).tril(31)
    assert error(out, naive(q, k, v, seen)[0]) < bound

@each_of("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_of("padding", [0, 100, 300, 1030])
@each_of("T, S, causal", [(1, 1030, False), (300, 1030, False), (300, 300, True)])
def test_attention_is_near_float64_and_padding_alone_has_no_share(T, S, causal, padding, dtype, grad, attend, device):
    q, k, v = (torch.randn(2, n, tokens, 16).to(device, dtype) for n, tokens in ((4, T), (2, S), (2, S)))
    real = mask_of(torch.ones(2, S, device=device), padding).bool()[:, None, :, None]
    seen = (real.mT & torch.ones(T, S, dtype=torch.bool, device=device).tril(0 if causal else S)).expand(2, 4, T, S)
    with torch.set_grad_enabled(grad):
        out, lse = part = attend(q, k, v, real if padding else None, causal)
    sees = seen.any(dim=-1)
    assert out.shape == q.shape and all(x.isfinite().all() for x in (out, lse, *longllama.merge(part, part)))
    assert (lse[~sees] < -1e4).all()  # no share of what others see, once merged
    (right, right_lse), bound = naive(q, k, v, seen), 8 * torch.finfo(dtype).eps  # of scores, of weights, and of the sum
    assert (out - right)[sees].norm() / right[sees].norm() < bound
    assert error(lse[sees], right_lse[sees]) < bound

# Queries that share a key head stand side by side, but not where they are causal: then every query head has its own scores.
@torch.enable_grad()  # so it is the plain formula
@each_of("B, G, causal, heads", [(1, 4, False, 4), (3, 2, False, 2), (1, 4, True, 4), (3, 2, True, 4)])
def test_the_plain_formula_makes_as_many_rows_of_scores_at_once_as_it_is_told_to(B, G, causal, heads, attend):
    q, k, v = torch.randn(B, 4, 300, 8), *torch.randn(2, B, G, 300, 8)
    whole = attend(q, k, v, causal=causal)
    with Watched() as seen:
        parts = attend(q, k, v, causal=causal, rows=20)
    assert set(seen.scores) == {B * heads * 20 * 300}
    assert all(error(x, y) < 1e-5 for x, y in zip(whole, parts))

def test_many_queries_make_no_matrix_of_scores_and_grouped_queries_copy_no_keys(attend):
    q, (k, v) = torch.randn(1, 8, 200, 8), torch.randn(2, 1, 2, 2000, 8)
    for queries in (q, q[:, :, :1]):
        with Watched() as seen:
            attend(queries, k, v)
        assert seen.largest <= k.numel() < 8 * 200 * 2000

@each_of("dtype, bound", [(torch.float32, 5e-4), (torch.bfloat16, 3e-2)])
def test_keys_are_turned_by_their_position_in_pairs_half_a_head_apart(dtype, bound):
    x, config = torch.randn(2, 3, 5, 12).to(dtype), LongLlamaConfig(hidden_size=48, num_attention_heads=4)
    turned = longllama.rotate(x, longllama.rope_table(2000, 5, config, x.device))  # far on, where angles are coarser
    assert turned.dtype == dtype and error(turned, rotated(x, 2000)) < bound

@each_of("mem_positionals", [True, False])
@each_of("layer", [0, 1], ids=["without memory", "with memory"])
@each_of("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_memory_keys_are_unrotated_and_local_ones_have_positions_from_0(layer, mem_positionals, dtype, bound, kind):
    model = small_model(kind, mem_positionals=mem_positionals, hidden_size=48)
    local, qkv = model.new_cache().layers[layer], torch.randn(3, 2, 4, 14, 12).to(dtype)
    q, k, v = qkv
    rotates = mem_positionals or layer == 0
    for start, stop, keep in ((0, 7, 0), (7, 12, 7), (12, 14, 5)):
        if keep == 5:
            local.restart(keep)
        rope, new = longllama.rope_table(keep, stop - start, model.config, q.device), qkv[..., start:stop, :]
        turned = [longllama.rotate(x, rope) if rotates else x for x in new[:2]]
        out = local.append_and_attend(*turned, new[2], new[1], None)
    remembered, turned = 7 if layer == 1 else 0, rotated if rotates else lambda x, first: x.double()
    keys = torch.cat((k[:, :, :remembered].double(), turned(k[:, :, 7:], 0)), dim=2)
    values = torch.cat((v[:, :, :remembered], v[:, :, 7:]), dim=2)
    seen = torch.ones(2, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 2)
    assert error(out, naive(turned(q[:, :, 12:], 5), keys, values, seen)[0]) < bound

@torch.enable_grad()
@each_of("detached", [False, True])
def test_cross_batch_attention_is_the_formula_and_gradients_flow_into_the_other_entries_unless_detached(detached, G):
    B, H, T, D, extra, rights = 5, 4, 6, 8, [0, 1, 2, 0, 3], []
    q, k, v, unrotated, weight = (torch.randn(B, n, T, D, requires_grad=True) for n in (H, G, G, G, H))
    others = [x.detach() if detached else x for x in (unrotated, v)]  # constants, or not
    for b, n in enumerate(extra):
        keys, values = (torch.cat([*past[b - n : b], own[b]], dim=1)[None] for past, own in zip(others, (k, v)))
        seen = torch.ones(T, (n + 1) * T, dtype=torch.bool).tril(n * T)
        rights.append(naive(q[b : b + 1], keys, values, seen)[0])
    out, right = longllama.cross_batch_attention(q, k, v, unrotated, extra, detached), torch.cat(rights)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v, unrotated), materialize_grads=True) for x in (out, right)]
    assert error(out, right) < 1e-5 and all(error(a, b) < 1e-4 for a, b in zip(*grads))
    assert (grads[0][3][2].abs().max() > 1e-3) != detached  # entry 2 is seen by others unrotated only: by entry 4
    alone = naive(q, k, v, seen[:, -T:])[0]
    assert error(longllama.cross_batch_attention(q, k, v, unrotated, [0] * B), alone) < 1e-5

# ------------------------------------------------------- 4. How a text is cut does not matter where the rules say so

def test_training_shows_memory_layers_what_inference_remembers(kind):
    """Chunks of one document that see all chunks before them get the logits of windows that are read one after another."""
    model, ids = small_model(kind, num_key_value_heads=2), small_ids(1, 5 * 16)
    trained = model.forward_cross_batch(ids.view(5, 16), extra=[0, 1, 2, 3, 4])
    assert error(trained.view(1, 80, 61), model(ids, last_context_length=16)[0]) < 1e-4

def test_detached_training_has_the_gradients_of_reading_on_after_a_memory_that_is_fixed(kind):
    model, ids = small_model(kind, num_key_value_heads=2), small_ids(4, 16)
    cache, trained = model.new_cache(), [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        full, detached = (model.forward_cross_batch(ids, [0, 1, 2, 3], detached) for detached in (False, True))
        flow, ours = (torch.autograd.grad(logits.logsumexp(-1).sum(), trained) for logits in (full, detached))
    assert torch.equal(full, detached)
    right = [torch.zeros_like(p) for p in trained]
    for row in ids[:, None]:
        with torch.enable_grad():
            logits, _ = model(row, cache.fork(), last_context_length=16)
            new = torch.autograd.grad(logits.logsumexp(-1).sum(), trained)
        right = [a + b for a, b in zip(right, new)]
        model(row, cache, last_context_length=16)
        cache.restart()
    assert all(error(a, b) < 1e-3 for a, b in zip(ours, right)) and any(error(a, b) > 1 for a, b in zip(ours, flow))

@each_of("size", [32, 48], ids=["heads of 8", "heads of 12, stored as 16 by the fast model"])
def test_tokens_that_join_one_local_context_may_come_in_any_pieces(padded, size, kind):
    model, ids = small_model(kind, hidden_size=size), small_ids(2, 46)
    right, *others = (read(model, ids, [38, *pieces], mask=mask_of(ids, 9 * padded)) for pieces in ([8], [3, 1, 4], [1] * 8))
    assert all(error(other[:, 38:], right[:, 38:]) < 1e-5 for other in others)

def test_forks_share_what_is_remembered_and_go_on_apart(kind):
    model, prompt, texts = small_model(kind), small_ids(1, 70), small_ids(2, 1, 30)
    _, cache = model(prompt)
    caches, mixed = (cache, cache.fork()), ([], [])
    assert len({x.data_ptr() for c in caches for x in c.layers[1].memory.blocks[0][:2]}) == 2  # keys and values
    for i in range(30):  # interleaved, over the overflow of both
        for text, to, logits in zip(texts, caches, mixed):
            logits.append(model(text[:, i : i + 1], to)[0])
    for text, logits in zip(texts, mixed):
        assert error(torch.cat(logits, dim=1), read(model, torch.cat((prompt, text), dim=1), [70] + [1] * 30)[:, 70:]) < 1e-5

def test_rows_of_an_expanded_cache_go_on_as_forks_of_it(padded, G, kind):
    model, prompt, ids = small_model(kind, num_key_value_heads=G, hidden_size=48), small_ids(1, 70), small_ids(3, 40)
    _, cache = model(prompt, attention_mask=mask_of(prompt, 30 * padded))
    rows, pieces = cache.expand(3), [1, 3, 1, 17, 1, 16, 1]
    together = read(model, ids, pieces, rows)
    assert rows.memory_length > cache.memory_length == 62  # theirs grew, and this one's did not
    assert error(together, torch.cat([read(model, row[None], pieces, cache.fork()) for row in ids])) < 1e-5

def test_a_cache_is_gone_on_from_in_generation_and_outside_of_inference_mode(kind):
    model, ids, options = small_model(kind), small_ids(1, 80), {"temperature": 0, "eos_token_id": None}
    cache, split = model.new_cache(), model.new_cache()
    [first] = generated(model, ids, 9, cache=cache, **options)
    [rest] = generated(model, torch.tensor([first[-1:]]), 11, cache=cache, **options)
    assert [first + rest] == generated(model, ids, 20, **options)
    generated(model, ids, 1, cache=split, last_context_length=5)
    assert lengths(split) == (5, 75)  # its prompt was split where that says
    with torch.inference_mode():
        logits, cache = model(ids[:, :60])
    later = read(model, ids[:, 60:], [1] * 20, cache)
    assert error(torch.cat((logits, later), dim=1), read(model, ids, [60] + [1] * 20)) < 1e-5

@each_of("keep_local", [0, 6])
def test_nobody_attends_to_padding_and_rows_beside_it_are_read_as_if_alone_whenever_it_comes(keep_local, kind):
    model, ids, pieces = small_model(kind, keep_local=keep_local), small_ids(2, 70), [10, 6, 1, 1, 1, 38, 13]
    other = torch.cat((torch.cat((small_ids(1, 7), ids[:1, 7:]), dim=1), ids[1:]))  # has other ids where it is padded
    logits, same = (read(model, x, pieces, mask=mask_of(ids, 7)) for x in (ids, other))
    assert error(logits[1:], read(model, ids[1:], pieces)) < 1e-4 and error(logits[0, 7:], same[0, 7:]) < 1e-5
    _, cache = model(ids[:, :30], attention_mask=torch.ones(2, 30))
    assert cache.real is None  # for a mask of ones is no padding
    with pytest.raises(ValueError, match="of the new tokens alone"):  # and not, as elsewhere, of all tokens
        model(ids[:, 30:40], cache, torch.ones(2, 40))
    logits, _ = model(ids[:, 30:40], cache, mask_of(torch.ones(2, 10), 3))
    assert error(logits[1:], read(model, ids[1:, :40], [30, 10])[:, 30:]) < 1e-5

@torch.enable_grad()
def test_gradients_flow_through_memory(kind):
    """The derivative along a random direction, of a loss that depends on the first window through memory alone."""
    model, ids = small_model(kind), torch.cat((torch.arange(16), 16 + torch.randint(45, (44,)))).unsqueeze(0)
    embedded, direction = model.embed_tokens.weight, torch.randn(61, 32) * (torch.arange(61) < 16)[:, None] / 6
    def loss(step: float) -> Tensor:  # ids 0 to 15 stand in the first window only
        moved = {"embed_tokens.weight": embedded + step * direction}
        return torch.func.functional_call(model, moved, ids, {"logits_to_keep": 8})[0].double().square().sum()
    slope = (torch.autograd.grad(loss(0.0), embedded)[0] * direction).sum()
    numeric = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(numeric) > 1e-3 and abs(slope - numeric) < 2e-2 * abs(numeric)  # the curve's bend over a step of 1e-2

@torch.enable_grad()
def test_gradients_reach_all_weights_and_through_memory_in_bfloat16_are_near_those_in_float32(kind):
    found, ids = [], small_ids(1, 60)
    for dtype in ("float32", "bfloat16"):
        model = small_model(kind, mem_dtype=dtype)
        model(ids)[0].square().sum().backward()
        assert all(p.grad.any() for p in model.parameters())
        found.append(model.layers[1].qkv_proj.weight.grad)
    assert 0 < (found[0] - found[1]).norm() < 2e-2 * found[0].norm()  # keys and values rounded by 2 to the -9

@torch.enable_grad()
def test_gradients_of_what_was_read_after_a_prefix_without_are_those_of_reading_it_in_any_pieces(kind):
    model, ids, found = small_model(kind), small_ids(1, 70), []
    for pieces in ([20], [20], [3, 1, 16], [1, 3, 10, 6]):  # token 4 overflows the window, into a memory that had room
        with torch.no_grad():
            _, cache = model(ids[:, :26])
        logits = read(model, ids[:, 26:46], pieces, cache, last_context_length=16)
        if found:  # all but the first read on, and what autograd keeps is left alone
            with torch.no_grad():
                read(model, ids[:, 46:], [1, 20, 3], cache)
        found += torch.autograd.grad(logits.square().sum(), model.layers[1].qkv_proj.weight)
    scale = found[0].abs().max()
    assert scale > 1e-3 and all(error(x, found[0]) < 1e-5 * scale for x in found)

# ----------------------------------------------------------------------------------- 5. Windows follow the five rules

LENGTHS = [  # of the calls (0: a restart); last_context_length; changes of the config; local and memory length after each
    ([8], 8, {}, [(8, 0)]), ([9], 8, {}, [(8, 1)]), ([40], 8, {}, [(8, 32)]), ([40], 40, {}, [(40, 0)]),
    ([41], 3, {}, [(3, 38)]), ([20], 99, {}, [(20, 0)]), ([9, 6, 1], None, {"mem_layers": ()}, [(9, 0), (15, 0), (16, 0)]),
    ([10, 0, 10], None, {}, [(8, 2), (0, 10), (10, 10)]),  # not (8, 12), as on a fresh cache: they join one local context
    # The whole local context moves at an overflow. The last call: two windows and 8, each a local context of its own.
    ([10, 6, 1, 1, 15, 40], None, {}, [(8, 2), (14, 2), (15, 2), (16, 2), (15, 18), (8, 65)]),
    # 8 + 6, + 1, + 1: full; 6 stay; of the next 12, 4 go first, and the other 8 find 6 + 5 tokens local, of which 6 stay.
    ([10, 6, 1, 1, 1, 12, 13], None, {"keep_local": 6}, [(8, 2), (14, 2), (15, 2), (16, 2), (7, 12), (14, 17), (14, 30)]),
]

@each_of("pieces, last, changes, right", LENGTHS, ids=str)
def test_the_last_tokens_stay_local_and_others_move_into_memory_by_the_rules(pieces, last, changes, right, kind):
    model, found = small_model(kind, **changes), []
    cache = model.new_cache()
    for n in pieces:
        model(small_ids(1, n), cache, last_context_length=last) if n else cache.restart()
        found.append(lengths(cache))
        assert {layer.length for layer in cache.layers} == {cache.local_length}
        remembered = {layer.memory.length for layer in cache.layers if layer.memory is not None}
        assert remembered == ({cache.memory_length} if model.config.mem_layers else set())
    assert found == right

def test_windows_are_cut_as_the_docstring_says_and_pieces_join_what_is_local_if_both_fit(kind):
    config, says = small_config(max_position_embeddings=256), split_into_windows.__doc__
    pieces = split_into_windows(1000, 128, Cache(config), config)
    assert pieces == [(0, 256, 0), (256, 512, 0), (512, 768, 0), (768, 872, 0), (872, 1000, 0)]
    assert re.findall(r"T = (\d+), last = (\d+),\s.*?window\D*(\d+)", says) == [("1000", "128", "256")]
    assert [tuple(map(int, found)) for found in re.findall(r"\((\d+), (\d+), (\d+)\)", says)] == pieces
    model = small_model(kind, keep_local=6)
    _, cache = model(small_ids(1, 30))  # 8 are local
    for T, last, right in (
        (8, 8, [(0, 8, 8)]), (9, 9, [(0, 9, 6)]), (10, 2, [(0, 8, 8), (8, 10, 6)]), (16, 16, [(0, 16, 0)]),
        (12, 12, [(0, 12, 4)]), (30, 30, [(0, 30, 0)]), (20, 3, [(0, 16, 0), (16, 17, 6), (17, 20, 7)]),
    ):
        assert split_into_windows(T, last, cache, model.config) == right

def test_kept_tokens_and_a_window_never_exceed_the_window_and_are_computed_in_all_layers(kind):
    model, ids, seen = small_model(kind, keep_local=6), small_ids(1, 60), []
    every, last = (model(ids[:, 20:], model(ids[:, :20])[1], logits_to_keep=keep)[0][:, -1:] for keep in (0, 1))
    assert error(every, last) < 1e-5
    _, cache = model(ids[:, :8])
    model.layers[0].register_forward_hook(lambda *_: seen.append(cache.local_length))
    model(ids[:, :40], cache)
    assert seen == [16, 16, 14]
    model(ids[:, :40], cache, last_context_length=40)  # all of it stays local, and nothing that was there
    assert lengths(cache) == (40, 48)

def test_lengths_that_do_not_fit_are_a_value_error_that_says_so(kind):
    model, llama, ids = small_model(kind), small_model(kind, mem_layers=()), small_ids(1, 20)
    local, full = model(ids)[1], llama(ids[:, :16])[1]
    remembered = local.fork()
    remembered.restart()  # nothing is local
    for reads, x, cache, last, says in (
        (llama, ids[:, :17], None, None, "17 tokens exceed the window of 16"),
        (llama, ids[:, :1], full, None, "17 tokens exceed the window of 16"),
        (model, ids[:, :0], None, None, "at least (1|one)"), (model, ids, None, 0, "last_context_length"),
        *((model, small_ids(3, 20), c, None, "has 3 rows, and the cache has 1") for c in (local, remembered, local.fork())),
    ):
        with pytest.raises(ValueError, match=says):
            reads(x, cache, last_context_length=last)

@each_of("mem_layers", [(1, 2), (2, 1)])  # in any order
@each_of("keep", [1, 8])
def test_nothing_above_the_last_memory_layers_keys_is_computed_for_a_prefix(keep, mem_layers, kind):
    model, ids, calls = small_model(kind, mem_layers=mem_layers), small_ids(1, 40), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
        layer.down_proj.register_forward_hook(lambda *_, i=i: calls.append(f"mlp {i}"))
    logits, _ = model(ids, logits_to_keep=keep)  # two windows, and the last tokens
    assert [calls.count(i) for i in range(4)] == [calls.count(f"mlp {i}") for i in range(4)] == [3, 3, 1, 1]
    assert torch.equal(logits, small_model(kind)(ids, logits_to_keep=keep)[0])

def test_a_prefix_leaves_nothing_behind_but_memory(kind):
    model, T, live = small_model(kind, mem_layers=(1,), num_key_value_heads=1, mem_dtype="bfloat16"), 1600, []
    cache = model.new_cache()
    def count(*_):
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and type(x) is not torch.nn.Parameter]
        live.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()))
    count()
    model.norm.register_forward_hook(count)  # just before the output head
    model(small_ids(1, T), cache, logits_to_keep=1)
    assert 0 < live[1] - live[0] - cache.memory_bytes < T * model.config.hidden_size  # a fourth of its hidden states' bytes

def test_no_tensor_of_prompt_times_vocabulary_or_of_window_times_memory_is_made(kind):
    T, window = 16384, 256
    model = small_model(kind, vocab_size=1000, max_position_embeddings=window, last_context_length=window)
    with Watched() as seen:
        generated(model, torch.randint(1000, (1, T)), 3, temperature=0)
    keys = T * model.config.hidden_size
    assert keys // 4 <= seen.largest <= keys < window * T < T * 1000

@each_of("given, pairs", [
    ((8, 6, 4), [(0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 2), (2, 4), (3, 3)]),  # the docstring's
    ((8, 3, 4), [(0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 1), (2, 1), (3, 0)]),  # the paper's 3B recipe
    ((8, 7, 4), [(0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 2), (2, 4), (3, 4)]),
    ((4, 1, 2), [(0, 0), (1, 0), (0, 0), (1, 0)]), ((4, 3, 2), [(0, 0), (1, 0), (0, 0), (1, 2)]),
    ((3, 2, 1), [(0, 0)] * 3), ((6, 0, 3), [(0, 0)] * 6),
], ids=str)
def test_entries_see_their_past_and_then_other_documents_as_the_paper_steps_them(given, pairs):
    """(positives, negatives) of each entry: entry i of its pack sees min(i * ceil((c + 1) / (k - 1)), c) before it."""
    extra, says = cross_batch_extra(*given), " ".join(cross_batch_extra.__doc__.split())
    assert [(min(b % given[2], n), n - min(b % given[2], n)) for b, n in enumerate(extra)] == pairs
    if given == (8, 6, 4):
        assert f"{given} gives {extra}" in says
        assert [tuple(map(int, found)) for found in re.findall(r"\((\d),(\d)\)", says)] == pairs

# ------------------------------------------------------------------------------------------------------- 6. Memory

@each_of("n", [1, 16, 100])
def test_blocks_join_as_the_digits_of_a_binary_number_carry(n):
    memory, window, sizes = Memory(small_config()), torch.randn(1, 4, n, 8), {}
    for windows in range(1, 12):
        memory.append(window, window)
        sizes[windows] = [k.shape[2] // n for k, *_ in memory.blocks]
        assert sizes[windows] == [2**i for i in reversed(range(4)) if windows & 2**i]
    drawn = re.findall(r"after (\d+) (?:windows)?((?: +\[[ .]*\])+)", Memory.__doc__)
    drawn = {int(w): [block.count(".") for block in re.findall(r"\[.*?\]", blocks)] for w, blocks in drawn}
    assert drawn == {w: sizes[w] for w in (6, 7, 8)}

def test_a_token_moves_as_often_as_a_number_of_windows_has_binary_digits(kind):
    memory, blocks, parts = MEMORIES[kind](small_config(kind)), [], torch.randn(1024, 1, 4, 1, 8)
    with Watched() as seen:
        for part in parts:
            memory.append(part, -part)
            blocks.append(len(memory.blocks))
    most = 2 * parts.numel() * (1 + 10)  # when it comes, and then 2 ** 10 windows join by twos
    assert seen.copied == most if kind is LongLlama else seen.copied <= most
    assert max(blocks) <= 10 and torch.equal(torch.cat([k for k, *_ in memory.blocks], dim=2), torch.cat(list(parts), dim=2))

@each_of("block", [5, 16, 40])
def test_no_memory_block_is_larger_than_the_limit_and_none_ever_changes(block, kind):
    memory, seen, parts = memory_class(kind, BLOCK=block)(small_config(kind)), [], []
    for n in (3, 100, 1, 1, 7, 16, 16):
        parts.append(torch.randn(2, 1, 4, n, 8))
        memory.append(*parts[-1])
        seen += [(x, x.clone()) for pair in memory.blocks for x in pair[:2]]
    assert memory.length == 144 and max(k.shape[2] for k, *_ in memory.blocks) <= block
    assert all(torch.equal(x, before) for x, before in seen)
    q = torch.randn(1, 4, 6, 8)
    assert error(memory.attend(q, None)[0], naive(q, *torch.cat(parts, dim=3))[0]) < 1e-5

def test_memory_is_stored_in_its_own_dtype_and_computed_with_in_the_models(mem_dtype, kind):
    model = small_model(kind, mem_dtype=mem_dtype)
    _, cache = model(small_ids(2, 60))
    stored = [x for layer in cache.layers[1:3] for pair in layer.memory.blocks for x in pair[:2]]
    assert {str(x.dtype) for x in stored} == {f"torch.{mem_dtype}"}
    assert cache.memory_bytes == 2 * 2 * 2 * 52 * 32 * stored[0].itemsize  # layers, keys and values, rows
    memory, kv, q = MEMORIES[kind](model.config), torch.randn(2, 2, 4, 30, 8), torch.randn(2, 4, 20, 8)
    memory.append(*kv)
    assert error(memory.attend(q, None)[0], naive(q, *kv.to(stored[0].dtype))[0]) < 1e-5

N = 5  # tokens of the highest score are kept
SCORES = {  # k (B, G, S, D), real (B, 1 or G, S) -> (B, G, S)
    "all": lambda k, real: torch.ones(k.shape[:3]),
    "newest": lambda k, real: torch.arange(k.shape[2]).expand(k.shape[:3]),
    "largest": lambda k, real: k.norm(dim=-1) * real,
}

def choosing(kind, choice: str, asked: list) -> type[Memory]:
    """A memory that chooses; asked: of how many tokens, and whether padding was told of."""
    def choose(memory, k, real):
        asked.append((k.shape[2], real is not None))
        assert k.dtype == torch.float32 and (real is None or real.shape == (*k.shape[:3], 1))
        scores = SCORES[choice](k, 1 if real is None else real[..., 0])
        return scores.topk(N).indices  # not in their order
    return memory_class(kind, choose=choose)

class FormulaMemory:
    """A memory of another make, as `Memory` says one may be: every key, and the formula in float64 over those that count."""

    def __init__(self, config: LongLlamaConfig, choice: str):
        self.choice, self.dtype, self.kept, self.length, self.nbytes = choice, getattr(torch, config.mem_dtype), [], 0, 0

    def append(self, k, v):
        self.kept, self.length = [*self.kept, torch.stack((k, v)).to(self.dtype).double()], self.length + k.shape[2]

    def attend(self, q, real):
        k, v = torch.cat(self.kept, dim=3)
        real = torch.ones(len(k), 1, self.length).bool() if real is None else real[:, :, : self.length, 0]
        scores = SCORES[self.choice](k, real)
        seen = (scores >= scores.sort(descending=True).values[..., N - 1 : N]) & real
        seen = seen.expand(k.shape[:3]).repeat_interleave(q.shape[1] // k.shape[1], dim=1).unsqueeze(2)
        return tuple(x.float() for x in naive(q, k, v, seen))

    def fork(self):
        return copy(self)

@each_of("choice", SCORES)
def test_memories_that_choose_and_of_another_make_remember_exactly_what_they_should(padded, G, mem_dtype, choice, kind):
    model = small_model(kind, mem_layers=(1,), mem_dtype=mem_dtype, num_key_value_heads=G, hidden_size=48)
    ids, logits = small_ids(2, 90), []
    mask = mask_of(ids, 12 * padded)
    ours = MEMORIES[kind] if choice == "all" else choosing(kind, choice, [])
    for new_memory in (ours, partial(FormulaMemory, choice=choice)):
        cache = new_cache(model, new_memory=new_memory)
        parts = [read(model, ids[:, :40], [40], cache, mask[:, :40])]
        fork = cache.fork()
        parts += [read(model, ids[:, 40:], [3, 1, 1, 30, 15], c) for c in (cache, fork)]
        logits.append(torch.cat(parts, dim=1)[mask[:, [*range(90), *range(40, 90)]].bool()])
        assert lengths(cache) == lengths(fork) and cache.memory_length == cache.layers[1].memory.length > 40
    assert error(*logits) < 1e-4

def test_choose_is_asked_once_after_each_append_about_all_that_is_remembered_and_must_keep_some(kind):
    model, asked, ids = small_model(kind, mem_layers=(1,)), [], small_ids(1, 60)
    new_memory = choosing(kind, "newest", asked)
    cache, memory, q = new_cache(model, new_memory=new_memory), new_memory(model.config), torch.randn(1, 4, 1, 8)
    read(model, ids, [40, 8, 1, 1, 10], cache)  # windows of 16 and 16, 8 + 8 local, 1 + 1, and 10 that join them
    assert lengths(cache) == (12, 48) and asked == [(16, False), (N + 16, False), (N + 16, False)]
    cache.restart()
    assert asked[3:] == [(N + 12, False)] and cache.memory_bytes == N * 2 * 32 * 4  # at once: the others are let go
    kv, real = torch.randn(2, 1, 4, 19, 8), torch.ones(1, 1, 19, 1, dtype=torch.bool)
    for part in kv.split((7, 3, 2, 7), dim=3):
        memory.append(*part)
        if part.shape[3] == 2:  # two appends come before the last is asked about
            continue
        memory.forget(real)
        for _ in range(2):  # which asks no more
            out, _ = memory.attend(q, real)
            assert error(out, naive(q, *kv[..., memory.length - N : memory.length, :])[0]) < 1e-5
    assert asked[4:] == [(7, True), (N + 3, True), (N + 9, True)]
    none = memory_class(kind, choose=lambda memory, k, real: torch.empty(*k.shape[:2], 0, dtype=torch.long))
    with pytest.raises(ValueError, match="choose must keep a token"):
        model(ids, new_cache(model, new_memory=none))

@torch.enable_grad()  # so it is the plain formula
@each_of("grouping, rows", [(None, 128), ((4, 8), 8), ((2, 8), 4), ((3, 9), 6), ((1, 2), 1)])
def test_grouping_bounds_the_scores_of_all_heads_at_once_and_changes_no_number(grouping, rows, G, kind):
    """heads x queries // H rows for each key head, at least one."""
    q, kv = torch.randn(1, 4, 200, 8), torch.randn(2, 1, G, 300, 8)
    memory = MEMORIES[kind](small_config(kind, mem_attention_grouping=grouping, num_key_value_heads=G))
    memory.append(*kv)
    with Watched() as seen:
        out, _ = memory.attend(q, None)
    assert max(seen.scores) == G * rows * 300 and len(seen.scores) == -(-200 * 4 // G // rows)
    assert error(out, naive(q, *kv)[0]) < 1e-5

# --------------------------------------------------------------------------- 7. Sampling draws from what it says it does

def drawn(probabilities: list[float], draws=500, temperature=1.0, **options) -> list[int]:
    rng, logits = torch.Generator().manual_seed(0), torch.tensor([probabilities]).log().repeat(draws, 1)
    return longllama.sample(logits, temperature, rng=rng, **options).tolist()

def test_temperature_sharpens_top_k_draws_from_the_k_likeliest_and_top_p_from_the_smallest_set_with_that_mass():
    for temperature, share in ((0.05, 1.0), (0.5, 0.692), (1.0, 0.6), (2.0, 0.5505)):
        assert abs(drawn([0.6, 0.4], 1000, temperature).count(0) / 1000 - share) < 0.04  # 2.5 standard deviations
    assert set(drawn([0.4, 0.6], temperature=0)) == {1}
    for k, ids in {1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 4: {0, 1, 2, 3}, 9: {0, 1, 2, 3}}.items():
        assert set(drawn([0.1, 0.4, 0.3, 0.2], top_k=k)) == ids
    for p, size in {1e-9: 1, 0.45: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.8: 3, 1: 4}.items():
        ids = set(drawn([0.5, 0.25, 0.125, 0.125], top_p=p))
        assert len(ids) == size and ids - {2, 3} == set(range(min(size, 2)))  # of equal ones, either is the third
    assert set(drawn([0.5, 0.3, 0.15, 0.05], top_p=0.75)) == {0, 1}
    assert set(drawn([0.3, 0.4, 0.2, 0.1], top_k=2, top_p=0.8)) == {0, 1}  # their shares are of what top_k left
    assert set(drawn([0.3, 0.4, 0.2, 0.1], top_k=2, top_p=0.5)) == {1}
    for p, ids in {0.0: {0, 1, 2, 3}, 0.24: {0, 1, 2, 3}, 0.26: {0, 1, 2}, 0.6: {0, 1}, 0.8: {1}, 1.0: {1}}.items():
        assert set(drawn([0.3, 0.4, 0.2, 0.1], min_p=p)) == ids
    assert set(drawn([0.3, 0.4, 0.2, 0.1], temperature=0.5, min_p=0.26)) == {0, 1}  # after temperature

def test_generation_respects_its_settings_draws_from_float32_and_refuses_what_is_no_number(kind):
    model, ids = small_model(kind), small_ids(2, 20)
    run = partial(generated, model, ids, 12, eos_token_id=None)
    assert run(top_k=1) == run(top_p=1e-9) == run(min_p=1) == run(temperature=0)
    assert run(seed=3) == run(seed=3) != run(seed=4)
    with Watched() as seen:
        found = next(model.to(torch.bfloat16).generate(ids, 1))
    assert seen.drawn == [torch.float32] and found.dtype == torch.int64 and found.shape == (2,)
    assert not found.is_inference() and not found.requires_grad
    model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        next(model.generate(ids, 1))

def test_a_logits_processor_gets_the_ids_of_this_call_so_far_and_changes_what_is_drawn_from(kind):
    model, ids = small_model(kind), small_ids(2, 20)
    right, (_, cache) = ids.tolist(), model(small_ids(2, 5))
    for row in right:
        for _ in range(12):
            row.append(sum(row) % 61)
    run = partial(generated, model, ids, 12, eos_token_id=None, temperature=0)
    new = run(cache=cache, logits_processor=lambda ids, logits: logits + 1e4 * F.one_hot(ids.sum(dim=1) % 61, 61))
    assert new == [row[20:] for row in right]

def test_rows_end_at_one_of_several_ids_are_padded_after_it_and_generation_ends_when_all_have(kind):
    ids = small_ids(3, 20)
    run = partial(generated, small_model(kind, pad_token_id=7), n=40, temperature=0)
    free = run(ids, eos_token_id=None)
    for eos in ([60], (free[0][2], free[1][3], 60), free[0][0], free[0][5]):
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        stops = [next((n for n, i in enumerate(row, 1) if i in ends), 40) for row in free]
        assert run(ids, eos_token_id=eos) == [row[:stop] + [7] * (max(stops) - stop) for row, stop in zip(free, stops)]
        assert run(ids[:1], eos_token_id=eos) == [free[0][: stops[0]]]
    assert min(stops) < max(stops)  # so there was padding
    for own in (eos, [60, eos]):  # the config's
        assert generated(small_model(kind, eos_token_id=own), ids[:1], 40, temperature=0) == [free[0][: stops[0]]]

# --------------------------------------------------------------------------------------------- 8. Configs and weights

def save(model: LongLlama, folder: Path, **changes):
    """A model's folder, written by safetensors and json alone."""
    save_file({name: x.clone().contiguous() for name, x in model.hf_tensors().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(model.config) | changes))

@each_of("changes", [
    {"hidden_size": 30, "head_dim": None}, {"hidden_size": 36, "head_dim": None}, {"num_key_value_heads": 3},
    {"mem_layers": [99]}, {"mem_layers": [-1]}, {"mem_dtype": "int8"}, {"model_type": "mixtral"}, {"hidden_act": "gelu"},
    {"attention_bias": True}, {"mlp_bias": True},
    {"head_dim": 5}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_parameters": {"rope_type": "longrope"}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"partial_rotary_factor": 0.5},
    {"sliding_window": 9, "model_type": "mistral"}, {"model_type": "mistral", "max_position_embeddings": 4097},
], ids=str)
def test_what_cannot_be_computed_is_refused_by_name(changes, kind, tmp_path):
    save(small_model(kind), tmp_path, **changes)
    said = str(changes)
    named = "rope_type" if "rope" in said else "sliding_window" if "mistral" in said else next(iter(changes))
    with pytest.raises(ValueError, match=named):
        kind.from_pretrained(tmp_path)

@each_of("name, value", [("mem_topk", 5), ("mem_device", "cpu"), ("mem_dtype", "float8_e4m3fn")], ids=str)
def test_what_only_the_fast_model_computes_is_refused_by_name(name, value, tmp_path):
    save(small_model(), tmp_path, **{name: value})
    assert getattr(FastLlama.from_pretrained(tmp_path).config, name) == value
    with pytest.raises(ValueError, match=name):
        LongLlama.from_pretrained(tmp_path)

@each_of("raw, right", [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 128, "pad_token_id": None,
      "dtype": "float16"}, {"rope_theta": 5e5}),
    ({"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "unknown": 1, "mem_layers": [6, 12, 18]},
     {"rope_theta": 1e6, "mem_layers": (6, 12, 18)}),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 64}, {"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 64}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "eos_token_id": [2, 3]},
     {"rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_id": [2, 3]}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({"model_type": "mistral", "sliding_window": 2048}, {}), ({"model_type": "llama", "sliding_window": 8}, {}),
    ({"pad_token_id": -1}, {"pad_token_id": 0}),  # as in LLaMA's first ones, which had none
], ids=["transformers 5", "older", "Llama 3", "linear", "Llama 3 in 5", "Mistral", "wide", "not in LLaMA", "the first"])
@each_of("config_class", [LongLlamaConfig, FastConfig])
def test_configs_of_transformers_5_and_of_older_releases_are_read(config_class, raw, right, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert config_class.from_json(tmp_path / "config.json") == config_class(**right)

def test_defaults_are_those_of_transformers():
    ours, theirs = vars(LongLlamaConfig()), vars(LlamaConfig())
    same = [name for name in ours.keys() & theirs if name != "pad_token_id"]  # which is none there
    assert len(same) >= 11 and all(ours[name] == theirs[name] for name in same)
    assert ours["rope_theta"] == theirs["rope_parameters"]["rope_theta"]

def test_random_weights_have_one_size_and_norms_begin_at_1(kind):
    for p in small_model(kind, hidden_size=64).parameters():  # 3,000 numbers and more: their deviation is within 5%
        assert (p == 1).all() if p.dim() == 1 else 0.95 < p.std() * 64**0.5 < 1.05

@each_of("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_of("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2}], ids=str)
def test_a_saved_model_comes_back_the_same_but_for_overrides_which_are_checked_too(changes, dtype, kind, tmp_path):
    model, ids = small_model(kind, **changes).to(dtype), small_ids(1, 30)
    save(model, tmp_path)
    again = kind.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (again.lm_head.weight is again.embed_tokens.weight) == bool(changes)
    if dtype != torch.float64:  # merging computes in float32
        assert torch.equal(model(ids)[0], again(ids)[0])
    config = kind.from_pretrained(tmp_path, mem_layers=[0], keep_local=0, last_context_length=3).config
    assert (config.mem_layers, config.keep_local, config.last_context_length) == ((0,), 0, 3)
    with pytest.raises(ValueError, match="mem_layers"):
        kind.from_pretrained(tmp_path, mem_layers=[4])

# ---------------------------------------------------------------------------------- 9. The tiny model finds its key

def test_tiny_finds_a_pass_key_two_hundred_windows_back_and_only_memory_holds_it(kind):
    tokenizer, key, window = Tokenizer(TINY / "tokenizer.model"), "90417", 64
    told, asked = f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key? The pass key is"
    texts = (TINY / "book.txt").read_text(encoding="utf-8"), told, asked
    book, told, asked = (tokenizer.encode(text, bos=False) for text in texts)
    ids, found = torch.tensor([[1, *book[:300], *told, *book[300:13000], *asked]]), []
    for layers, seen in (([3], ids), ([], ids[:, -window // 2 :])):
        changes = {"max_position_embeddings": window, "last_context_length": window // 2, "mem_layers": layers}
        found.append(tokenizer.decode(generated(kind.from_pretrained(TINY, **changes), seen, 6, temperature=0)[0]).strip())
    assert found[0] == key != found[1]

# --------------------------------------------------------------------------------------------- 10. The file stays small

FILE = (HERE / "longllama.py").read_text(encoding="utf-8")  # what holds of all the others is in cli/test_house.py

def test_the_file_is_short_and_its_functions_are_an_idea_comes_early_and_it_imports_two_packages():
    nodes = list(ast.walk(ast.parse(FILE)))
    functions = [x for x in nodes if isinstance(x, ast.FunctionDef)]
    assert min(x.lineno for x in functions if x.name in ("merge", "attend")) < 150
    assert [x.name for x in functions if x.end_lineno - x.lineno + 1 > 30] == []
    assert len(FILE.splitlines()) <= 576 and len(FILE.encode()) <= 33900
    imports = [x for x in nodes if isinstance(x, (ast.Import, ast.ImportFrom))]
    names = {(getattr(x, "module", None) or alias.name).split(".")[0] for x in imports for alias in x.names}
    assert names - sys.stdlib_module_names == {"torch", "safetensors"}

def test_the_file_speaks_of_no_other_file_but_fast_and_convert():
    files = {path.name for place in ("*.*", "*/*.*") for path in HERE.glob(place)} - {"config.json", "model.safetensors"}
    named = {name for name in files if re.search(rf"(?<![\w.-]){re.escape(name)}\b", FILE)}
    assert named <= {"convert.py", "longllama.py", *(path.name for path in HERE.glob("fast/*.py"))}
    others = "cli|training|experiments|evaluation|examples|benchmarks|docs|tiny|testdata"
    assert re.findall(rf"\b(?:{others})/", FILE) == [] and "fast/" in FILE
