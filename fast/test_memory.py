"""A memory that grows in place, in any dtype, searched or whole; and memories of one's own that build on it."""

import gc
from functools import partial

import pytest
import torch
from torch import Tensor

from fast.linear import LIMITS, Limits
from fast.memory import FastMemory
from fast.storage import float8_scale
from fast.test_model import DEVICES, Watching, all_of, naive, read, small_blocks, small_config, small_model
from longllama import merge

FLOAT8 = "float8_e4m3fn"


# ------------------------------------------------------------------------------------------------------ How it grows


@pytest.mark.parametrize("grad, moves", [(False, 3), (True, 14)])  # with gradients there is no room to grow in
def test_memory_moves_a_token_a_few_times_only_and_blocks_are_few(grad, moves):
    memory, n, windows, blocks = FastMemory(small_config()), 16, 1000, []
    window = torch.randn(1, 4, n, 8)
    with torch.set_grad_enabled(grad), Watching() as seen:
        for _ in range(windows):
            memory.append(window, window)
            blocks.append(len(memory.blocks))
    assert memory.length == sum(k.shape[2] for k, _ in memory.blocks) == n * windows
    assert max(blocks) <= 6  # 1 + log4(1000)
    assert windows * window.numel() < seen.copied <= 2 * windows * window.numel() * moves  # keys and values
    assert torch.equal(torch.cat([k for k, _ in memory.blocks], dim=2), window.repeat(1, 1, windows, 1))


@torch.no_grad()
def test_a_block_with_room_is_lengthened_where_it_lies():
    memory, places = FastMemory(small_config()), []
    k, v = torch.randn(2, 1, 4, 100, 12)
    memory.append(k[:, :, :40], v[:, :, :40])
    assert [x.shape for x in memory.room] == [(1, 4, 80, 16)] * 2  # room for as many again, heads padded
    for i in range(40, 80):
        memory.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        places.append([x.data_ptr() for x in memory.blocks[0]])
        assert [x.shape[2] for x in memory.blocks[0]] == [i + 1] * 2
    assert places == [[x.data_ptr() for x in memory.room]] * 40
    memory.append(
        k[:, :, 80:], v[:, :, 80:]
    )  # does not fit: another block, which takes in the one of up to 4 times its size
    assert [block[0].shape[2] for block in memory.blocks] == [100] and memory.room[0].shape[2] == 200
    assert torch.equal(memory.blocks[0][0][..., :12], k) and torch.equal(memory.blocks[0][1][..., :12], v)
    assert (memory.blocks[0][0][..., 12:] == 0).all()


@torch.no_grad()
def test_blocks_are_as_the_docstring_draws_them():
    memory, sizes = FastMemory(small_config()), []
    for _ in range(9):
        memory.append(*torch.randn(2, 1, 4, 1, 8))
        sizes.append([block[0].shape[2] for block in memory.blocks])
    assert (sizes[5], sizes[7], sizes[8]) == ([6], [6, 2], [9])
    assert memory.room[0].shape[2] == 18


@torch.no_grad()
@pytest.mark.parametrize("block", [5, 16, 40])
@pytest.mark.parametrize("changes", [{}, {"mem_device": "cpu"}, {"mem_dtype": FLOAT8}], ids=str)
def test_no_memory_block_is_larger_than_the_limit(block, changes):
    memory, appended = small_blocks(block)(small_config(**changes)), []
    for n in (3, 100, 1, 1, 7, 16, 16):
        appended.append(torch.randn(2, 1, 4, n, 8))
        memory.append(*appended[-1])
    assert memory.length == 144 and max(k.shape[2] for k, _ in memory.blocks) <= block
    assert sum(k.shape[2] for k, _ in memory.blocks) == 144
    if not memory.scales:
        right = torch.cat(appended, dim=3)
        assert all(torch.equal(torch.cat(x, dim=2), y) for x, y in zip(zip(*memory.blocks), right))


@torch.no_grad()
def test_bytes_are_those_of_tokens_and_not_of_room():
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2), (FLOAT8, 1)):
        memory = FastMemory(small_config(mem_dtype=dtype))
        assert memory.nbytes == memory.length == 0 and not hasattr(memory, "__len__")
        memory.append(*torch.randn(2, 2, 4, 10, 8))
        assert memory.nbytes == 2 * 2 * 4 * 10 * 8 * size and memory.blocks[0][0].itemsize == size


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mem_device": "cpu"}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_memory_that_is_kept_in_main_memory_lies_there(device, changes):
    memory = FastMemory(small_config(**changes))
    for _ in range(3):
        memory.append(*torch.randn(2, 1, 4, 10, 8, device=device))
    block = memory.blocks[0][0]
    assert block.device.type == changes.get("mem_device", device)
    assert block.is_pinned() == (device == "cuda" and block.device.type == "cpu")
    assert (memory.room[0].shape[2] == sum(block[0].shape[2] for block in memory.blocks)) == bool(
        changes
    )  # copied whole


@torch.no_grad()
def test_a_prefix_leaves_nothing_behind_but_memory():
    model, T, live = small_model(mem_layers=(1,), num_key_value_heads=1, mem_dtype="bfloat16"), 1600, []
    cache = model.new_cache()

    def count(*_):
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        live.append(sum(storages.values()))

    count()
    model.norm.register_forward_hook(count)  # just before the output head
    model(torch.randint(61, (1, T)), cache, logits_to_keep=1)
    room = sum(x.nbytes for x in cache.layers[1].memory.room)
    hidden_states = T * model.config.hidden_size * 4
    assert len(live) == 2 and live[1] - live[0] < room + hidden_states / 4


def test_no_tensor_of_prompt_times_vocabulary_or_prompt_or_window_times_memory():
    T, window = 16384, 256
    model = small_model(vocab_size=1000, max_position_embeddings=window, last_context_length=window)
    with Watching() as seen:
        list(model.generate(torch.randint(1000, (1, T)), 3, temperature=0))
    block = 2 * T * model.config.hidden_size  # keys of all tokens, and room for as many
    assert block // 4 <= seen.numel <= block < window * T < T * 1000


# ------------------------------------------------------------------------------------------------- Forks and gradients


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
@pytest.mark.parametrize("dtype", ["float32", FLOAT8])
def test_a_fork_of_a_memory_never_writes_into_the_room_of_the_first_one(dtype):
    memory = FastMemory(small_config(mem_dtype=dtype))
    memory.append(*torch.ones(2, 1, 4, 40, 8))
    fork, place = memory.fork(), memory.blocks[0][0].data_ptr()
    assert fork.blocks[0][0].data_ptr() == place
    for number in (2, 3):  # in turns, while there would be room
        memory.append(*torch.full((2, 1, 4, 1, 8), 1.0 + number))
        fork.append(*torch.full((2, 1, 4, 1, 8), 10.0 + number))
    assert memory.blocks[0][0].data_ptr() == place and memory.length == fork.length == 42
    for m, new in ((memory, [3, 4]), (fork, [12, 13])):
        for x in zip(*m.blocks):
            assert torch.cat(x, dim=2)[0, 0, :, 0].float().tolist() == [1.0] * 40 + new


def test_with_gradients_memory_has_no_room_and_what_has_room_is_not_written_into():
    memory, q = FastMemory(small_config()), torch.randn(1, 4, 2, 8)
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


def test_gradients_flow_through_memory():
    """The derivative along a random direction, of a loss that depends on the first windows through memory alone."""
    model = small_model()
    ids, embedded = torch.randint(61, (1, 60)), torch.randn(1, 60, 32)
    direction = torch.randn(1, 60, 32) * (torch.arange(60) < 16)[None, :, None]  # only the first window changes

    def loss(step: float) -> tuple[Tensor, Tensor]:
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
        assert cache.layers[1].memory.room[0].shape[2] > cache.memory_length
        logits = [model(part, cache, last_context_length=16)[0] for part in ids[:, 26:].split(pieces, dim=1)]
        torch.cat(logits, dim=1).square().sum().backward()
        gradients.append(model.layers[1].qkv_proj.weight.grad.clone())
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
        gradients.append(model.layers[1].qkv_proj.weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-3 and torch.equal(*gradients)


def test_gradients_flow_through_memory_in_bfloat16():
    ids, gradients = torch.randint(61, (1, 60)), []
    for dtype in ("float32", "bfloat16"):
        model = small_model(mem_dtype=dtype)
        cache = model.new_cache(partial(FastMemory, limits=Limits(cast=100)))
        model(ids, cache)[0].square().sum().backward()
        gradients.append(model.layers[1].qkv_proj.weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()


# -------------------------------------------------------------------------------------------- Search, grouping, float8


@torch.no_grad()
@pytest.mark.parametrize("mem_device", [None, "cpu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("G", [2, 4])
@pytest.mark.parametrize("K", [1, 7])
def test_a_query_attends_to_the_best_keys_of_memory_only(K, G, padded, mem_device):
    torch.manual_seed(0)
    memory = small_blocks(9)(small_config(mem_topk=K, mem_device=mem_device))
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
def test_few_of_the_best_values_are_gathered_at_once():
    memory = FastMemory(small_config(mem_topk=50), limits=Limits(gathered=4 * 50 * 8 * 2))
    memory.append(*torch.randn(2, 1, 4, 300, 8))
    with Watching() as seen:
        memory.attend(torch.randn(1, 4, 100, 8), None)
    assert 0 < seen.numel <= 4 * 300 * 8


@pytest.mark.parametrize(
    "grouping, rows", [(None, LIMITS.rows), ((2, 64), 32), ((4, 64), 64), ((2, 8), 4), ((1, 1), 1)]
)
@pytest.mark.parametrize("topk", [None, 3])
def test_grouping_bounds_the_rows_of_scores_by_heads_and_by_queries(grouping, rows, topk):
    memory = FastMemory(small_config(mem_attention_grouping=grouping, mem_topk=topk))
    memory.append(*torch.randn(2, 1, 4, 300, 8))
    aten, q = torch.ops.aten, torch.randn(1, 4, 200, 8)
    with Watching(aten.bmm.default if topk is None else aten.mul.Tensor) as seen:  # the scores, before or after scaling
        out = memory.attend(q, None)[0]
    assert seen.numel == 4 * rows * 300
    whole = FastMemory(small_config(mem_topk=topk))
    whole.append(*(x[..., :8] for x in memory.blocks[0]))
    assert (out - whole.attend(q, None)[0]).abs().max() < 1e-5


@torch.no_grad()
def test_blocks_attended_to_by_a_single_token_are_merged_by_what_the_memory_was_given():
    calls = []

    def counted(a, b):
        calls.append(1)
        return merge(a, b)

    memory = FastMemory(small_config(), merge_step=counted)
    for n in (60, 2, 3):
        memory.append(*torch.randn(2, 1, 4, n, 8))
    memory.blocks = [tuple(x[:, :, part] for x in memory.blocks[0]) for part in (slice(0, 30), slice(30, 65))]
    for T, times in ((1, 1), (5, 1)):
        memory.attend(torch.randn(1, 4, T, 8), None)
        assert len(calls) == times


@torch.no_grad()
def test_float8_memory_scales_every_head_by_itself():
    """Float8 keeps 4 binary digits, a rounding of 1/16 at most, of heads of any size, and of numbers that come later."""
    torch.manual_seed(0)
    limits = Limits(cast=7 * 2 * 4 * 8)  # 7 tokens of 50 at once: many pieces, the last one smaller
    memory = FastMemory(small_config(mem_dtype=FLOAT8), limits=limits)
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
    right = naive(q, *kept, all_of(q))
    assert ((out - right).abs() / size).max() < 1e-4


@torch.no_grad()
def test_float8_memory_that_begins_with_the_smallest_token_keeps_the_others():
    """As when the bos token, whose values are small, is alone in the first window; or when a row begins with padding."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 4, 40, 8)
    k[:, :, 0] *= 0
    v[:, :, 0] *= 0.02
    memory = FastMemory(small_config(mem_dtype=FLOAT8))
    memory.append(k[:, :, :1], v[:, :, :1])
    memory.append(k[:, :, 1:], v[:, :, 1:])
    q = torch.randn(2, 4, 3, 8)
    right = naive(q, k, v, all_of(q))
    assert (memory.attend(q, None)[0] - right).norm() / right.norm() < 5e-2


@torch.no_grad()
@pytest.mark.parametrize("topk", [None, 40])
def test_float8_memory_scales_the_key_heads_of_grouped_queries(topk):
    torch.manual_seed(0)
    memory = FastMemory(small_config(mem_dtype=FLOAT8, num_key_value_heads=2, mem_topk=topk))
    size = torch.tensor([1e-2, 1.0]).view(1, 2, 1, 1)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8) * size, torch.randn(2, 2, 40, 8) * size
    memory.append(k, v)
    out, right = memory.attend(q, None)[0], naive(q, k, v, all_of(q))
    assert all((out - right)[:, h].norm() / right[:, h].norm() < 5e-2 for h in range(4))


@torch.no_grad()
def test_float8_memory_clamps_what_is_far_larger_than_its_first_tokens():
    memory, x = FastMemory(small_config(mem_dtype=FLOAT8)), torch.randn(1, 4, 1, 8)
    memory.append(x, x)
    memory.append(1000 * x, 1000 * x)
    for n in (1, 20):  # read in pieces, and as a whole
        assert memory.attend(x.repeat(1, 1, n, 1), None)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------ Memories of one's own

KINDS = {
    "float32": {},
    "bfloat16": {"mem_dtype": "bfloat16"},
    "float16": {"mem_dtype": "float16"},
    "float8": {"mem_dtype": FLOAT8},
}
PLACES = {"in place": {}, "in main memory": {"mem_device": "cpu"}, "searched": {"mem_topk": 5}}


class Newest(FastMemory):
    """Remembers the first 2 tokens and the newest 9."""

    def choose(self, k: Tensor, real: Tensor | None) -> Tensor:
        S = k.shape[2]
        kept = torch.tensor([i for i in range(S) if i < 2 or i >= S - 9], device=k.device)
        return kept.flip(0).expand(*k.shape[:2], -1)  # in any order


class Longest(FastMemory):
    """Remembers, for each head, the 11 tokens with the longest keys, and no padding as long as there are others."""

    def choose(self, k: Tensor, real: Tensor | None) -> Tensor | None:
        if k.shape[2] <= 11:
            return None
        length = k.norm(dim=-1) if real is None else k.norm(dim=-1) - 1e6 * ~real[..., 0]
        return length.topk(11).indices


def as_stored(memory: FastMemory, x: Tensor, scale: Tensor | None) -> Tensor:
    return x.to(memory.dtype).float() if scale is None else (x / scale).clamp(-448, 448).to(memory.dtype).float()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [Newest, Longest])
def test_a_memory_that_chooses_remembers_just_those_tokens(own, kind, place, padded):
    """Against the formula in float64 over the tokens that are kept, which are chosen here for each row and head by itself."""
    torch.manual_seed(0)
    config = small_config(num_key_value_heads=2, hidden_size=48, **KINDS[kind], **PLACES[place])
    memory, B, G, D, sizes = own(config), 2, 2, 12, (7, 1, 1, 16, 30, 3, 1, 60)
    k, v = torch.randn(2, B, G, sum(sizes), D)
    real = torch.ones(B, 1, sum(sizes), 1, dtype=torch.bool)
    real[0, :, : 13 * padded] = False
    kept, start = torch.zeros(B, G, 0, dtype=torch.long), 0
    scales = [float8_scale(x[:, :, : sizes[0]]) for x in (k, v)] if kind == "float8" else [None, None]
    stored = [as_stored(memory, x, scale) for x, scale in zip((k, v), scales)]
    for n in sizes:
        part = slice(start, start + n)
        memory.append(k[:, :, part], v[:, :, part])
        start += n
        mask = real[:, :, :start] if padded else None
        q = torch.randn(B, 4, 3, D)
        memory.forget(mask)
        out, lse = memory.attend(q, mask)
        assert memory.length == start
        # what it should have kept
        kept = torch.cat((kept, torch.arange(start - n, start).expand(B, G, n)), dim=2)
        shown = stored[0].gather(2, kept[..., None].expand(-1, -1, -1, D))
        shown_real = None if mask is None else mask.expand(B, G, -1, -1).take_along_dim(kept[..., None], dim=2)
        chosen = own.choose(memory, shown, shown_real)
        kept = kept if chosen is None else kept.gather(2, chosen).sort(dim=-1).values
        keys, values = (x.gather(2, kept[..., None].expand(-1, -1, -1, D)) for x in stored)
        if scales[0] is not None:
            keys, values = keys * scales[0], values * scales[1]
        is_real = real.expand(B, G, -1, -1).take_along_dim(kept[..., None], dim=2) | torch.tensor(not padded)
        seen = is_real.mT.repeat_interleave(2, dim=1).expand(-1, -1, 3, -1)
        sees = seen.any(dim=-1)  # a row that has nothing but padding gets anything
        scores = (q.double() @ keys.double().repeat_interleave(2, dim=1).mT / D**0.5).masked_fill(~seen, -torch.inf)
        if "mem_topk" in PLACES[place]:
            seen = seen & (scores >= scores.topk(min(5, scores.shape[-1])).values[..., -1:])
            scores = scores.masked_fill(~seen, -torch.inf)
        assert (out - naive(q, keys, values, seen))[sees].abs().max() < 1e-4
        assert (lse - scores.logsumexp(dim=-1))[sees].abs().max() < 1e-4
        assert memory.nbytes == sum(x.nbytes for block in memory.blocks for x in block[:2])
        assert sum(block[0].shape[2] for block in memory.blocks) == kept.shape[2] <= 11
    assert memory.dtype == memory.blocks[0][0].dtype


@torch.no_grad()
def test_choose_is_asked_once_after_each_append_and_is_shown_keys_as_they_are_stored():
    shown = []

    class Asked(FastMemory):
        def choose(self, k, real):
            shown.append((k, real))

    memory, k = Asked(small_config(mem_dtype=FLOAT8, hidden_size=48)), torch.randn(1, 4, 10, 12)
    real = torch.ones(1, 1, 10, 1, dtype=torch.bool)
    memory.append(k[:, :, :6], k[:, :, :6])
    memory.forget(real[:, :, :6])
    for _ in range(3):
        memory.attend(torch.randn(1, 4, 1, 12), real[:, :, :6])
    memory.append(k[:, :, 6:], k[:, :, 6:])
    memory.forget(real)
    for _ in range(2):
        memory.attend(torch.randn(1, 4, 1, 12), real)
    assert [x.shape[2] for x, _ in shown] == [x.shape[2] for _, x in shown] == [6, 10]
    right = (k / memory.scales[0]).to(torch.float8_e4m3fn).float()  # in units of each head's scale
    assert shown[1][0].dtype == torch.float32 and torch.equal(shown[1][0][..., :12], right)
    assert shown[1][1].shape == (1, 4, 10, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_model_whose_memory_chooses_reads_in_any_pieces_forks_and_expands(kind, place):
    model, ids = small_model(**KINDS[kind], **PLACES[place]), torch.randint(61, (1, 80))
    near = 1e-5 if kind == "float32" else 1e-3  # rows of a batch differ in their last bits, and may be rounded apart
    model.use_memory(Newest)
    _, cache = model(ids[:, :61])
    for layer in cache.layers:
        assert layer.memory is None or (layer.memory.length, layer.memory.blocks[0][0].shape[2]) == (53, 11)
    assert cache.memory_length == 53
    forks = [cache.fork(), cache.expand(2)]
    right = model(ids[:, 61:], cache)[0]
    assert (model(ids[:, 61:], forks[0])[0] - right).abs().max() < 1e-5
    assert (model(ids[:, 61:].repeat(2, 1), forks[1])[0] - right).abs().max() < near
    longer = model(torch.cat((ids, ids, ids), dim=1), logits_to_keep=1)[1]
    assert longer.memory_length > 200 and longer.layers[1].memory.blocks[0][0].shape[2] == 11  # and does not grow


def test_gradients_flow_through_what_is_chosen():
    memory = Newest(small_config())
    k, v = torch.randn(2, 1, 4, 30, 8, requires_grad=True).unbind()
    for part in (slice(0, 20), slice(20, 30)):
        memory.append(k[:, :, part], v[:, :, part])
        memory.forget(None)
        out = memory.attend(torch.randn(1, 4, 2, 8), None)[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), v)
    kept = gradient.abs().amax(dim=(0, 1, 3)) > 0
    assert kept.nonzero().flatten().tolist() == [0, 1, *range(21, 30)]


class CutToNewest(FastMemory):
    """The obvious way to remember the newest 20 tokens only."""

    def append(self, k: Tensor, v: Tensor):
        super().append(k, v)
        keys, values = (torch.cat(x, dim=2)[:, :, -20:] for x in zip(*self.blocks))
        self.blocks = [(keys, values)]


class CutWithoutCopies(FastMemory):
    def append(self, k: Tensor, v: Tensor):
        super().append(k, v)
        while sum(block[0].shape[2] for block in self.blocks) - self.blocks[0][0].shape[2] >= 20:
            self.blocks = self.blocks[1:]
        extra = sum(block[0].shape[2] for block in self.blocks) - 20
        if extra > 0:
            self.blocks = [tuple(x[:, :, extra:] for x in self.blocks[0]), *self.blocks[1:]]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cut", [CutToNewest, CutWithoutCopies])
def test_a_memory_that_cuts_its_blocks_after_an_append_is_right(cut, kind, place):
    """Also where the block before had room, which must not be written into in place of what was cut."""
    torch.manual_seed(0)
    memory, sizes = cut(small_config(**KINDS[kind], **PLACES[place])), (40, *[1] * 25, 5, 19, 21, 30, *[3] * 10)
    k, v = torch.randn(2, 1, 4, sum(sizes), 8)
    scales = [float8_scale(x[:, :, :40]) for x in (k, v)] if kind == "float8" else [None, None]
    stored = [as_stored(memory, x, scale) * (1 if scale is None else scale) for x, scale in zip((k, v), scales)]
    start = 0
    for n in sizes:
        memory.append(k[:, :, start : start + n], v[:, :, start : start + n])
        start += n
        assert memory.length == start
        keys, values = (x[:, :, start - 20 : start] for x in stored)
        q = torch.randn(1, 4, 2, 8)
        scores = q @ keys.mT
        seen = scores >= scores.topk(PLACES[place].get("mem_topk", 20)).values[..., -1:]
        assert (memory.attend(q, None)[0] - naive(q, keys, values, seen)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cut", [CutToNewest, CutWithoutCopies])
def test_a_memory_that_cuts_its_blocks_knows_its_padding_or_says_that_it_does_not(cut):
    memory, (k, v), q = cut(small_config()), torch.randn(2, 1, 4, 45, 8), torch.randn(1, 4, 2, 8)
    real = torch.arange(45).view(1, 1, 45, 1) >= 30  # of the newest 20 the first 5 are padding
    for part in (slice(0, 40), slice(40, 45)):
        memory.append(k[:, :, part], v[:, :, part])
    try:
        out, _ = memory.attend(q, real)
    except ValueError as error:
        assert cut.__name__ in str(error)
    else:
        assert (out - naive(q, k, v, real.mT)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [FastMemory, Newest, CutToNewest])
def test_a_memory_of_one_row_is_expanded_to_many_that_go_on_apart(own, kind):
    torch.manual_seed(0)
    config = small_config(**KINDS[kind])
    memory, (k, v), q = own(config), torch.randn(2, 3, 4, 40, 8), torch.randn(3, 4, 2, 8)
    k[:, :, :30], v[:, :, :30] = k[:1, :, :30], v[:1, :, :30]
    memory.append(k[:1, :, :30], v[:1, :, :30])
    memory.attend(q[:1], None)
    many = memory.fork()
    many.expand(3)
    many.append(k[:, :, 30:], v[:, :, 30:])
    out, _ = many.attend(q, None)
    for b in range(3):
        alone = own(config)
        for part in (slice(0, 30), slice(30, 40)):
            alone.append(k[b : b + 1, :, part], v[b : b + 1, :, part])
            right, _ = alone.attend(q[b : b + 1], None)
        assert (out[b : b + 1] - right).abs().max() < 1e-5
    assert memory.length == 30 and many.length == 40


@torch.no_grad()
def test_a_memory_goes_on_from_what_it_is_given():
    for dtype in ("float32", FLOAT8):
        config, (k, v), q = small_config(mem_dtype=dtype), torch.randn(2, 2, 4, 50, 8), torch.randn(2, 4, 2, 8)
        memory, again = FastMemory(config), FastMemory(config)
        memory.append(k[:, :, :40], v[:, :, :40])
        again.restore([tuple(x.clone() for x in block) for block in memory.blocks], memory.scales, memory.length)
        for m in (memory, again):
            m.append(k[:, :, 40:], v[:, :, 40:])
        assert again.length == 50 and (memory.attend(q, None)[0] - again.attend(q, None)[0]).abs().max() < 1e-6
