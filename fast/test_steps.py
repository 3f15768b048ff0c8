"""Compiled layers and captured steps give the logits of the usual way. What captures here is passed, and needs no GPU."""

import os
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast import FastContext, FastLlama, FastMemory
from fast.steps import captured
from fast.test_model import small_blocks, small_model
from longllama import Cache, LocalCache, Memory, merge

compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@compiles
@pytest.mark.parametrize("device, window", [("cpu", 16)] + [("cuda", 16), ("cuda", 1024)] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-5), (torch.bfloat16, 5e-2)])
def test_compiled_layers_give_the_same_logits(dtype, bound, device, window):
    """Windows, and one token at a time: compiled, on a GPU captured and replayed; memory begins, and a small window overflows."""
    model, compiled = (small_model(max_position_embeddings=window).to(device, dtype) for _ in range(2))
    compiled.compile_layers()
    assert (compiled.steps is not None) == (device == "cuda") and compiled.compiled_logits is not None
    ids = torch.randint(61, (2, 70), device=device)
    with torch.inference_mode():
        for parts in ([5] + [1] * 65, [40] + [1] * 30):
            caches = [m.new_cache() for m in (model, compiled)]
            for part in ids.split(parts, dim=1):
                a, b = (m(part, cache)[0] for m, cache in zip((model, compiled), caches))
                assert (a - b).norm() / b.norm() < bound


def at_once(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Stands in for `captured`: the work is done again at each replay."""
    return work


def never(work: Callable[[], None], device: torch.device):
    raise AssertionError("captured")


def stepping_pair(capture: Callable = at_once, **changes) -> tuple[FastLlama, FastLlama]:
    """A model, and the same that does single tokens as a CUDA graph would."""
    model, stepping = small_model(**changes), small_model(**changes)
    stepping.capture_steps(capture)
    return model, stepping


def fill_room(cache: Cache, seen: list[Tensor]):
    """Room without numbers may hold anything: NaN, in all rooms that are new since the last time."""
    for layer in cache.layers:
        rooms = [(x, layer.length) for x in layer.tensors]
        if layer.memory is not None and layer.memory.room:
            rooms += [(room, x.shape[2]) for room, x in zip(layer.memory.room, layer.memory.last)]
        for room, length in rooms:
            if not any(room is x for x in seen):
                room[:, :, length:] = torch.nan
                seen.append(room)


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "mem_topk": 9}, {"mem_dtype": "float8_e4m3fn", "keep_local": 5}], ids=str
)
def test_steps_with_lengths_in_tensors_give_the_same_logits(changes):
    """What a CUDA graph would replay, done again and again: nothing but the tensors may tell one step from another."""
    prepared, filled = [], []

    def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        prepared.append(work)
        for _ in range(3):
            work()
        return work

    model, stepping = stepping_pair(capture, **changes)
    ids = torch.randint(61, (2, 70))
    for parts in ([1] * 70, [40] + [1] * 30, [40, 1, 1, 3, 1, 1, 9, 1, 1, 12]):
        caches = [m.new_cache() for m in (model, stepping)]
        for part in ids.split(parts, dim=1):
            (right, _), (logits, cache) = (m(part, cache) for m, cache in zip((model, stepping), caches))
            assert (logits - right).abs().max() < 1e-4
            assert caches[0].local_length == cache.local_length and caches[0].memory_length == cache.memory_length
            fill_room(cache, filled)
    assert len(filled) > 20
    assert 8 <= len(prepared) <= 20  # once where a local context begins, or memory has moved
    forks = [cache.fork() for cache in caches for _ in range(2)]
    for i in (0, 1, 0, 1):  # each goes on by itself
        token = ids[:, i : i + 1]
        assert (model(token, forks[i])[0] - stepping(token, forks[i + 2])[0]).abs().max() < 1e-4


@torch.inference_mode()
def test_steps_are_taken_where_they_can_be_and_join_and_merge_are_those_that_were_given():
    prepared, merged = [], []

    def counted(a, b):
        merged.append(1)
        return merge(a, b)

    stepping, ids = small_model(), torch.randint(61, (1, 45))
    stepping.capture_steps(lambda work, device: prepared.append(1) or work, merge=counted)
    _, cache = stepping(ids[:, :40])
    assert cache.layers[1].memory.merge_step is counted
    for i in range(40, 45):
        stepping(ids[:, i : i + 1], cache)
    assert len(prepared) == 1 and len(merged) == 5 * 2  # tokens, memory layers


@torch.inference_mode()
def test_what_steps_cannot_do_goes_the_usual_way():
    class LookingOn(FastContext):  # as in examples/look_at_memory.py
        pass

    class OwnMemory(FastMemory):
        pass

    ids, padded = torch.randint(61, (2, 30)), F.pad(torch.ones(2, 27), (3, 0))
    for changes, mask, kinds in (
        ({"mem_device": "cpu"}, None, (None, None)), ({}, padded, (None, None)), ({}, None, (None, LookingOn)),
        ({}, None, (OwnMemory, None)), ({}, None, (small_blocks(7), None)), ({}, None, (Memory, None)),
        ({}, None, (None, LocalCache)), ({}, None, (Memory, LocalCache)),
    ):  # fmt: skip
        model, stepping = stepping_pair(never, **changes)
        (_, a), (_, b) = ((m(ids, m.new_cache(*own), mask)) for m, own in ((model, (None, None)), (stepping, kinds)))
        for i in range(3):
            assert (model(ids[:, i : i + 1], a)[0] - stepping(ids[:, i : i + 1], b)[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 rows, and the cache has 2"):
        stepping(ids[:1, :1], b)


@torch.inference_mode()
@pytest.mark.parametrize("window, captures", [(2060, 2 + 1), (5000, 2)])
def test_steps_are_captured_anew_where_room_doubles_and_lose_nothing_there_nor_at_an_overflow(window, captures):
    prepared = []
    model, stepping = stepping_pair(lambda work, device: prepared.append(1) or work, max_position_embeddings=window)
    ids = torch.randint(61, (1, 2075))
    caches = [m.new_cache() for m in (model, stepping)]
    for part in ids.split([2040] + [1] * 35, dim=1):
        a, b = (m(part, cache, last_context_length=2040)[0] for m, cache in zip((model, stepping), caches))
        assert (a - b)[:, -1].abs().max() < 1e-4
        assert len({(c.local_length, c.memory_length) for c in caches}) == 1
    assert len(prepared) == captures
    assert (caches[1].local_length, caches[1].memory_length) == ((15, 2060) if window == 2060 else (2075, 0))


@torch.inference_mode()
def test_a_token_that_finds_no_local_context_or_a_full_one_goes_the_usual_way():
    model, stepping = stepping_pair(never)
    ids = torch.randint(61, (1, 17))
    caches = [m.new_cache() for m in (model, stepping)]
    for part in ids.split([1, 15, 1], dim=1):  # the last one overflows
        a, b = (m(part, cache)[0] for m, cache in zip((model, stepping), caches))
        assert (a - b).abs().max() < 1e-5
    assert caches[1].memory_length == 16


def test_steps_leave_gradients_and_losses_alone():
    model, ids = small_model(), torch.randint(61, (1, 30))
    model.capture_steps(never)
    with torch.no_grad():
        _, cache = model(ids)
    assert model(ids[:, :1], cache)[0].requires_grad
    with torch.inference_mode():
        _, cache = model(ids)
        assert model(ids[:, :1], cache, labels=ids[:, :1])[0] == 0  # one token has no label before it


@pytest.mark.parametrize(
    "changes, last", [({"hidden_size": 48}, 8), ({}, 20)], ids=["padded heads", "beyond the window"]
)
def test_steps_of_padded_heads_or_beyond_the_window_and_in_either_mode_give_the_same_logits(changes, last):
    pair, ids = stepping_pair(**changes), torch.randint(61, (2, 60))
    caches = [m.new_cache() for m in pair]
    for mode, parts in (torch.inference_mode, [50, 1, 1, 1, 1, 6]), (torch.no_grad, [57, 1, 1, 1]):
        with mode():
            for part in ids.split(parts, dim=1):
                a, b = (m(part, c, last_context_length=last)[0] for m, c in zip(pair, caches))
                assert (a - b).abs().max() < 1e-4 and caches[0].local_length == caches[1].local_length


@torch.inference_mode()
def test_steps_go_on_after_padding_and_after_a_capture_that_failed():
    fails = []

    def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        if fails:
            raise ZeroDivisionError
        return work

    pair, ids = stepping_pair(capture), torch.randint(61, (2, 30))
    caches = [m(ids)[1] for m in pair]
    other = pair[1](ids)[1]

    def read(token: int, *mask: Tensor):
        a, b = (m(ids[:, token : token + 1], c, *mask)[0] for m, c in zip(pair, caches))
        assert (a - b)[1].abs().max() < 1e-4  # the other row may be padding

    read(0)
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        pair[1](ids[:, :1], other)
    fails.clear()
    read(1)
    read(2, torch.tensor([[0], [1]]))
    read(3)


@torch.inference_mode()
def test_logits_of_a_step_stay_what_they_are_when_the_next_one_is_taken():
    _, stepping = stepping_pair()
    ids = torch.randint(61, (1, 43))
    _, cache = stepping(ids[:, :40])
    first, _ = stepping(ids[:, 40:41], cache)
    kept = first.clone()
    stepping(ids[:, 41:42], cache)
    assert torch.equal(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_steps_captured_on_a_gpu_give_the_same_logits():
    model, stepping = (small_model().cuda() for _ in range(2))
    stepping.capture_steps(captured)
    ids = torch.randint(61, (2, 70), device="cuda")
    caches = [m.new_cache() for m in (model, stepping)]
    for part in ids.split([40] + [1] * 30, dim=1):
        a, b = (m(part, cache)[0] for m, cache in zip((model, stepping), caches))
        assert (a - b).abs().max() < 1e-4
