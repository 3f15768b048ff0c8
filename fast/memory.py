"""Memory that grows in place, in any dtype and place, searched or whole.

`Memory` in longllama.py moves a token log2(n) times and reads blocks of 8,192. This one has room behind its last block, moves a
token 1.6 times on average, reads blocks of 32,768, keeps float8, attends to the K best keys (`mem_topk`), and can stay in main
memory while the model is on a GPU (`mem_device`).
"""

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from fast.attention import attend, attend_topk
from fast.linear import LIMITS, Limits
from fast.storage import float8_scale, store, stream
from longllama import Attended, LongLlamaConfig, Memory, merge, require


class FastMemory(Memory):
    """Keys and values in blocks, (B, G, tokens, D padded to a multiple of 8) each, whose tokens never change, so that forks can
    share them.

    New tokens lengthen the last block while it has room. If not, they begin another, with room for as many tokens again. It
    takes in the blocks before it, newest first, as long as the next one is at most four times its own size, up to BLOCK: so few
    tokens are moved, and few blocks remain.

        after 6 windows   [. . . . . .]       after 8   [. . . . . .] [. .]       after 9   [. . . . . . . . . _ _ _ _ _ _ _ _ _]

    A subclass that overrides `choose` stores as `Memory` does. Of float8 it is shown keys in units of each head's scale.
    """

    BLOCK = 32768  # tokens: enough to keep a kernel busy, and the most that a GPU casts to the model's dtype at once

    def __init__(self, config: LongLlamaConfig, merge_step: Callable = merge, limits: Limits = LIMITS):
        """merge_step: merges what blocks gave a single token; a compiled one is faster on a GPU."""
        super().__init__(config)
        self.grouping, self.topk = config.mem_attention_grouping, config.mem_topk
        self.device = config.mem_device and torch.device(config.mem_device)
        self.merge_step, self.limits = merge_step, limits
        self.room: tuple[Tensor, Tensor] | tuple[()] = ()  # `last` and free space behind it, (B, G, capacity, D)
        self.last: tuple[Tensor, Tensor] | None = None  # the block that may grow, while it still is the last of them
        self.scales: list[Tensor] = []  # float8 only: what keys and values were divided by, (B, G, 1, 1) each

    def chooses(self) -> bool:
        return type(self).choose is not Memory.choose

    def append(self, k: Tensor, v: Tensor):
        """Remembers n tokens: unrotated keys and values (B, G, n, D)."""
        device, grad = self.device or k.device, torch.is_grad_enabled()
        if self.dtype == torch.float8_e4m3fn:
            self.scales = self.scales or [float8_scale(k), float8_scale(v)]
            k, v = ((x / scale).clamp(-448, 448) for x, scale in zip((k, v), self.scales))
        if self.chooses():
            return super().append(*(store((x,), x.shape[2], x.dtype, device) for x in (k, v)))
        self.length += k.shape[2]
        self.blocks = list(self.blocks)  # forks share the old list
        for new in zip(k.split(self.BLOCK, dim=2), v.split(self.BLOCK, dim=2)):
            self.append_block(new, device, pin=k.is_cuda and device.type == "cpu", grad=grad)
        return None

    def append_block(self, new: tuple[Tensor, Tensor], device: torch.device, pin: bool, grad: bool):
        """At most BLOCK tokens."""
        tokens = new[0].shape[2]
        grows = self.blocks and self.blocks[-1] is self.last and not grad
        if grows and self.last[0].shape[2] + tokens <= self.room[0].shape[2]:
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
            self.room = tuple(store(x, capacity, self.dtype, device, pin) for x in zip(*parts))
        # Autograd may have saved an earlier block, and refuses it once its storage is written to, even behind its tokens.
        # It does not see writes through .data.
        self.last = tuple((x if grad else x.data)[:, :, :tokens] for x in self.room)
        self.blocks.append(self.last)

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
        B, H, T, D = q.shape
        heads, queries = self.grouping or (H, self.limits.rows)
        rows = heads * queries // H  # of all heads, so as to make no more scores at once; 0 is taken as 1
        if self.topk is None:
            parts = (attend(q, *block, rows=rows, limits=self.limits) for block in self.blocks_on(q.device, real))
            return reduce(self.merge_step if T == 1 else merge, parts)
        K = min(self.topk, sum(block[0].shape[2] for block in self.blocks))
        rows = max(
            min(rows, self.limits.gathered // (B * H * K * D)), 1
        )  # streamed memory is copied anew for each part
        parts = [attend_topk(part, self.blocks_on(q.device, real), K, self.limits) for part in q.split(rows, dim=2)]
        return tuple(torch.cat(x, dim=2) for x in zip(*parts))

    def blocks_on(self, device: torch.device, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The blocks on a device, each with its part of `real`: keys and values (B, G, n, D), and (B, 1 or G, n, 1) or None."""
        parts = [part if part is None else part.to(device) for *_, part in self.sets(real)]
        pairs = [block[:2] for block in self.blocks]
        yield from ((*pair, part) for pair, part in zip(stream(pairs, device), parts))

    def sets(self, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if self.chooses():
            return super().sets(real if real is None else real.to(self.blocks[0][0].device))
        sizes = [k.shape[2] for k, _ in self.blocks]
        whole = real is None or sum(sizes) == self.length
        require(whole, f"{type(self).__name__} has dropped tokens of a padded batch: only `choose` knows their padding")
        parts = [None] * len(sizes) if real is None else real[:, :, : self.length].split(sizes, dim=2)
        return ((k, v, part) for (k, v), part in zip(self.blocks, parts))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for block in self.blocks for x in block[:2])

    def fork(self) -> "FastMemory":
        twin = super().fork()
        twin.room, twin.last = (), None  # the twin never writes where this one does
        return twin

    def expand(self, n: int):
        super().expand(n)
        self.scales = [scale.expand(n, -1, -1, -1) for scale in self.scales]

    def restore(self, blocks: list[tuple[Tensor, Tensor]], scales: list[Tensor], length: int):
        """Goes on from what was saved."""
        self.blocks, self.scales, self.length = blocks, scales, length
