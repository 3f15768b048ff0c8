"""A local context that grows in place, in padded heads, with gradients and without."""

import pytest
import torch
from torch import Tensor

from fast.context import FastContext
from fast.linear import LIMITS, Limits
from fast.memory import FastMemory
from fast.test_model import each_mkl, naive, read, small_config, small_model
from longllama import Memory, rope_table, rotate


@torch.no_grad()
def test_a_local_context_has_room_for_the_window_and_grows_in_place():
    model = small_model()
    _, cache = model(torch.ones(1, 4, dtype=torch.long))
    for layer, kinds in zip(cache.layers, (2, 3, 3, 2)):
        assert [tuple(x.shape) for x in layer.tensors] == [
            (1, 4, 16, 8)
        ] * kinds  # unrotated keys where there is memory
    places = [[x.data_ptr() for x in layer.tensors] for layer in cache.layers]
    for _ in range(12):
        model(torch.ones(1, 1, dtype=torch.long), cache)
    assert [[x.data_ptr() for x in layer.tensors] for layer in cache.layers] == places
    assert cache.layers[1].length == cache.local_length == 16


@torch.no_grad()
def test_a_context_beyond_the_window_has_no_more_room_than_tokens():
    model = small_model()
    _, cache = model(torch.ones(1, 30, dtype=torch.long), last_context_length=30)
    assert cache.layers[1].tensors[0].shape[2] == 30


@torch.no_grad()
@pytest.mark.parametrize(
    "window, tokens, room",
    [(16, 2, 16), (2048, 2, 2048), (1 << 28, 2, 2048), (1 << 28, 2047, 2048), (1 << 28, 2048, 4096), (5000, 2100, 4096),
     (5000, 4096, 5000), (5000, 5000, 5000), (16, 20, 20)],
)  # fmt: skip
def test_room_is_a_power_of_two_above_the_tokens_or_the_whole_window(window, tokens, room):
    local = FastContext(small_config(max_position_embeddings=window), None, True)
    local.append(list(torch.zeros(3, 1, 4, tokens, 8)))
    assert [x.shape[2] for x in local.tensors] == [room] * 2


@torch.no_grad()
@pytest.mark.parametrize("window", [40, 1 << 28])
@pytest.mark.parametrize(
    "parts, rooms", [([1] * 40, [4, 8, 16, 32, 64]), ([9, 1, 1, 1, 25, 1, 2], [16, 64]), ([5, 30, 5], [8, 64])]
)
def test_room_that_doubles_moves_few_tokens_and_changes_no_number(parts, rooms, window):
    """Forks at every token, as in a conversation, leave the first one its room."""

    class Narrow(FastContext):
        ROOM = 4

    config, qkv = small_config(max_position_embeddings=window), torch.randn(3, 1, 4, 40, 8)
    narrow, wide = Narrow(config, FastMemory(config), True), FastContext(config, FastMemory(config), True)
    start, forks, places = 0, [], []
    for tokens in parts:
        outs = [feed(local, config, start, start + tokens, *qkv) for local in (narrow, wide)]
        assert torch.equal(*outs)
        start += tokens
        places += [x for x in narrow.tensors[:1] if all(x is not place for place in places)]
        forks.append(narrow.fork())
    assert [x.shape[2] for x in places] == [min(room, window) for room in rooms]
    for x, y in zip(narrow.filled(), wide.filled()):
        assert torch.equal(x, y)
    assert all(torch.equal(a, b[:, :, : fork.length]) for fork in forks for a, b in zip(fork.tensors, narrow.tensors))


def feed(local: FastContext, config, start: int, stop: int, q: Tensor, k: Tensor, v: Tensor, real=None) -> Tensor:
    """Tokens start to stop - 1, of unrotated queries and keys, join a context."""
    rope = rope_table(local.length, stop - start, config, q.device)
    turned = [rotate(x[:, :, start:stop], rope) if local.rotates else x[:, :, start:stop] for x in (q, k)]
    return local.append_and_attend(*turned, v[:, :, start:stop], k[:, :, start:stop], real)


@each_mkl
@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", [Memory, FastMemory])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_what_stays_local_at_an_overflow_is_rotated_to_positions_from_0(
    layer, mem_positionals, dtype, bound, grad, kind, mkl
):
    """Against the formula in float64, over memory, unrotated, and the local context, rotated from its new start."""
    torch.manual_seed(0)
    config = small_config(mem_positionals=mem_positionals, hidden_size=48)
    rotates, memory = config.rotates(layer), kind(config) if layer in config.mem_layers else None
    local, D = FastContext(config, memory, rotates, Limits(**mkl)), 12
    qkv = torch.randn(3, 2, 4, 14, D).to(dtype)

    def rotated(x: Tensor, first: int) -> Tensor:
        position = first + torch.arange(x.shape[2]).double()
        angle = position.outer(10000.0 ** -(torch.arange(0, D, 2).double() / D)) * rotates
        a, b = x.double().chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    q, k, v = qkv
    with torch.set_grad_enabled(grad):
        feed(local, config, 0, 7, *qkv)
        feed(local, config, 7, 12, *qkv)
        local.restart(keep=5)
        assert local.length == 5
        out = feed(local, config, 12, 14, *qkv)
    remembered = 7 if layer in config.mem_layers else 0
    keys = torch.cat((k[:, :, :remembered].double(), rotated(k[:, :, 7:], 0)), dim=2)
    values = torch.cat((v[:, :, :remembered], v[:, :, 7:]), dim=2)
    seen = torch.ones(2, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 2)
    assert (out - naive(rotated(q[:, :, 12:], 5), keys, values, seen)).abs().max() < bound


@torch.no_grad()
def test_kept_tokens_move_to_the_start_of_new_room():
    model = small_model(keep_local=6)
    _, cache = model(torch.randint(61, (1, 8)))
    for _ in range(9):  # the last one overflows
        model(torch.randint(61, (1, 1)), cache)
    assert (cache.local_length, cache.memory_length) == (7, 10)
    for layer in cache.layers:
        assert layer.length == 7 and layer.tensors[0].shape[2] == 16


@torch.no_grad()
def test_heads_that_are_stored_padded_give_the_same_logits_with_gradients_and_without():
    model, ids = small_model(hidden_size=48), torch.randint(61, (2, 60))
    _, cache = model(ids[:, :45])
    assert [x.shape[3] for x in cache.layers[1].tensors] == [16, 16, 16]
    with torch.enable_grad():
        logits = torch.cat([model(part, cache)[0] for part in ids[:, 45:].split([5, 10], dim=1)], dim=1)
    assert logits.requires_grad and cache.layers[1].memory.blocks[0][0].shape[3] == 16
    with torch.enable_grad():
        whole = model(ids, last_context_length=8)[0]
    assert (logits - read(model, ids, [45, 5, 10])[:, 45:]).abs().max() < 1e-5
    assert (whole - model(ids, last_context_length=8)[0]).abs().max() < 1e-5


def test_with_gradients_a_context_has_no_room_and_is_not_written_into():
    config = small_config()
    local = FastContext(config, None, True)
    q, k, v = torch.randn(3, 1, 4, 6, 8, requires_grad=True)
    total = 0
    for i in range(6):
        total = total + feed(local, config, i, i + 1, q, k, v).square().sum()
        assert local.tensors[0].shape[2] == local.length == i + 1
    gradients = torch.autograd.grad(total, (k, v))
    assert all(x.abs().amax(dim=(0, 1, 3)).min() > 0 for x in gradients)


@torch.no_grad()
def test_a_fork_never_writes_where_the_first_one_does():
    config = small_config()
    local, qkv = FastContext(config, FastMemory(config), True), torch.randn(3, 1, 4, 9, 8)
    feed(local, config, 0, 5, *qkv)
    fork = local.fork()
    other = qkv.clone()
    other[:, :, :, 5:] = torch.randn(3, 1, 4, 4, 8)
    outs = {"local": [], "fork": []}
    for i in range(5, 9):  # in turns
        outs["local"].append(feed(local, config, i, i + 1, *qkv))
        outs["fork"].append(feed(fork, config, i, i + 1, *other))
    for kind, tensors in (("local", qkv), ("fork", other)):
        alone = FastContext(config, None, True)
        feed(alone, config, 0, 5, *tensors)
        right = [feed(alone, config, i, i + 1, *tensors) for i in range(5, 9)]
        assert (torch.cat(outs[kind], dim=2) - torch.cat(right, dim=2)).abs().max() < 1e-6


@torch.no_grad()
def test_a_context_computes_by_its_own_limits():
    config, qkv = small_config(), torch.randn(3, 1, 4, 40, 8)
    contexts = [FastContext(config, None, True, limits) for limits in (LIMITS, Limits(rows=1, scores=1))]
    with torch.enable_grad():
        a, b = (feed(local, config, 0, 40, *qkv) for local in contexts)
    assert (a - b).abs().max() < 1e-6


@torch.no_grad()
def test_a_context_goes_on_from_what_it_is_given():
    config, qkv = small_config(hidden_size=48), torch.randn(3, 2, 4, 9, 12)
    local, again = (FastContext(config, FastMemory(config), True) for _ in range(2))
    feed(local, config, 0, 6, *qkv)
    again.restore([x.clone() for x in local.filled()], local.length)
    a, b = (feed(context, config, 6, 9, *qkv) for context in (local, again))
    assert torch.equal(a, b)
