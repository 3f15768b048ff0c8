"""Keys and values as they are stored: exact casts, padded heads, scales, and blocks on their way to a GPU."""

import pytest
import torch

from fast.storage import cast_pieces, copy_float8, float8_scale, store, stream

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("at_once", [1, 100, 1 << 19])
def test_float8_is_cast_exactly(at_once):
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None, None, :, None]
    finite = finite[:, :, ~finite.float().flatten().isnan()]
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pieces = [piece.clone() for piece in cast_pieces(finite, dtype, at_once)]
            assert len(pieces) == -(-254 // at_once)
            assert torch.equal(torch.cat(pieces, dim=2), finite.to(dtype))
            room = torch.empty(finite.shape, dtype=dtype)
            assert torch.equal(copy_float8(room, finite), finite.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_pieces_joined_are_the_whole_cast_and_hold_few_numbers(stored):
    x = torch.randn(2, 3, 50, 8).to(stored)
    pieces = [piece.clone() for piece in cast_pieces(x, torch.float32, 7 * 2 * 3 * 8 + 5)]
    assert [piece.shape[2] for piece in pieces] == ([50] if stored == torch.float32 else [7] * 7 + [1])
    assert torch.equal(torch.cat(pieces, dim=2), x.float())


def test_with_gradients_a_cast_is_one_piece_since_autograd_keeps_it():
    x = torch.randn(1, 1, 50, 8, requires_grad=True)
    (piece,) = cast_pieces(x, torch.bfloat16, 8)
    piece.float().sum().backward()
    assert (x.grad == 1).all()


def test_what_is_stored_is_joined_and_has_room_and_zeros_behind_its_heads():
    a, b = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 4, 12)  # the former was padded before
    a[..., 12:] = 0
    for dtype in (torch.float32, torch.bfloat16):
        stored = store((a, b), 9, dtype, a.device)
        assert stored.shape == (2, 3, 9, 16) and stored.dtype == dtype
        assert torch.equal(stored[:, :, :1], a.to(dtype)) and torch.equal(stored[:, :, 1:5, :12], b.to(dtype))
        assert (stored[..., 12:] == 0).all()
    with torch.inference_mode():
        assert not store((a,), 4, a.dtype, a.device).is_inference()  # or it could not be written into once that is over
    a.requires_grad_()
    store((a,), 4, a.dtype, a.device).sum().backward()
    assert (a.grad == 1).all()


def test_the_scale_of_float8_is_a_power_of_two_that_puts_the_largest_at_a_half_to_1():
    x = torch.randn(2, 4, 50, 8) * torch.tensor([1e-4, 0.0, 1.0, 1e3]).view(1, 4, 1, 1)
    scale = float8_scale(x)
    assert scale.shape == (2, 4, 1, 1) and torch.equal(scale.log2(), scale.log2().round())
    largest = (x / scale).abs().amax(dim=(2, 3))
    assert (largest[:, 1] == 0).all() and (scale[:, 1] == 1).all()  # nothing but zeros is divided by 1
    kept = largest[:, [0, 2, 3]]
    assert (kept > 0.5).all() and (kept <= 1).all()
    assert torch.equal(float8_scale(torch.full((1, 1, 1, 8), 0.25)), torch.full((1, 1, 1, 1), 0.25))  # exactly 1 then


def test_blocks_that_are_where_they_are_wanted_are_not_copied():
    blocks = [(torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)) for n in (5, 3)]
    streamed = list(stream(blocks, torch.device("cpu")))
    assert all(x is y for a, b in zip(streamed, blocks, strict=True) for x, y in zip(a, b, strict=True))


@needs_cuda
@torch.no_grad()
def test_blocks_stream_to_a_gpu_through_two_buffers():
    blocks = [tuple(torch.randn(2, 1, 2, n, 8).pin_memory().unbind()) for n in (500, 300, 500, 1, 77)]
    places, found = set(), []
    for k, v in stream(blocks, torch.device("cuda")):
        places.add(k.untyped_storage().data_ptr() + k.storage_offset() * k.itemsize)
        found.append((k.cpu(), v.cpu()))
    assert len(places) == 2
    assert all(torch.equal(x, y) for a, b in zip(found, blocks, strict=True) for x, y in zip(a, b))


@needs_cuda
def test_blocks_that_gradients_are_wanted_of_have_a_copy_each_on_a_gpu():
    blocks = [tuple(torch.randn(2, 1, 2, n, 8).unbind()) for n in (5, 3, 4)]
    assert len({k.data_ptr() for k, _ in list(stream(blocks, torch.device("cuda")))}) == 3
