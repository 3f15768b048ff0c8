"""How keys and values are stored: in place, padded for kernels, smaller, and in main memory beside a GPU.

A step costs what one token costs, since nothing is concatenated. Heads of 100 numbers, as the 3B model has, are stored as 104:
fused kernels want multiples of 8, and would copy all of memory on each call. float8 takes a quarter of float32's bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def padded(D: int) -> int:
    """The width that heads of D numbers are stored in: the multiple of 8 that fused kernels want (the 3B model's have 100)."""
    return -(-D // 8) * 8


def store(
    parts: tuple[Tensor, ...], capacity: int, dtype: torch.dtype, device: torch.device, pin: bool = False
) -> Tensor:
    """The parts, (B, G, n, D) each, concatenated into new storage (B, G, capacity, D `padded`). pin: main memory that can be
    copied to a GPU while that computes."""
    B, G, _, D = parts[-1].shape
    size, start = (B, G, capacity, padded(D)), 0
    with torch.inference_mode(False):  # a tensor made in that mode cannot be written into outside of it
        stored = torch.empty(size, dtype=dtype, device=device, pin_memory=pin)
    for x in parts:
        stored[:, :, start : start + x.shape[2], :D] = x[..., :D]
        start += x.shape[2]
    stored[..., D:] = 0
    return stored


def cast_pieces(x: Tensor, dtype: torch.dtype, at_once: int) -> Iterator[Tensor]:
    """x (B, G, S, D) in dtype, on a CPU in pieces of about `at_once` numbers. A piece is good until the next one is asked for."""
    if (
        x.dtype == dtype or x.device.type != "cpu" or torch.is_grad_enabled()
    ):  # autograd keeps all pieces, `room` holds one
        yield x.to(dtype)
        return
    parts = x.split(max(at_once * x.shape[2] // x.numel(), 1), dim=2)
    room = torch.empty_like(parts[0], dtype=dtype)
    copy_into = copy_float8 if x.dtype == torch.float8_e4m3fn else Tensor.copy_
    yield from (copy_into(room[:, :, : part.shape[2]], part) for part in parts)


def copy_float8(room: Tensor, x: Tensor) -> Tensor:
    """room.copy_(x) for finite float8_e4m3fn, eight times as fast as torch's on a CPU: its bits (sign, 4 of exponent, 3 of
    mantissa) moved into a float16's (5 and 10) make a number 256 times smaller."""
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).bitwise_right_shift_(1).bitwise_and_(~(1 << 14))
    return room.copy_(bits.view(torch.float16)).mul_(256)


def float8_scale(x: Tensor) -> Tensor:
    """What keys or values are divided by to be stored as float8, (B, G, 1, 1), from the first of them, x (B, G, n, D): for each
    head the power of two that puts the largest at 1/2 to 1. It rounds nothing, and float8 keeps all its digits up to 448."""
    largest = x.float().abs().amax(dim=(2, 3), keepdim=True)
    return torch.where(largest > 0, largest, 1).log2().ceil().exp2()


def stream(blocks: list[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The blocks on a device, one by one; each is good until the next one is asked for. From main memory to a GPU, a block is
    copied while the one before is computed with: there are two buffers."""
    if (
        device.type != "cuda" or blocks[0][0].device == device or torch.is_grad_enabled()
    ):  # autograd keeps what it is given
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
