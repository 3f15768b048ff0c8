"""LongLLaMA: LLaMA with the memory layers of the Focused Transformer (FoT), the architecture in one file.

A transformer reads a window of a few thousand tokens. FoT (Tworkowski et al. 2023, arXiv:2307.03170) gives a few layers, the
*memory layers*, a second set of keys and values: those of every token before the window. Queries there attend with one softmax
to both sets. No weights are added, and a model trained on 8k tokens reads 256k and more.

    memory (memory layers only)                        local context (every layer)
    k v  k v  k v  k v  k v  k v  ...  k v  k v    |   k v   k v   k v   k v  <- q
    keys unrotated, as if all at position 0        |   RoPE positions 0, 1, 2, 3 ...

Five ideas:
  `merge`, `attend`        One softmax over two sets is the softmax over each, weighted by their log-sum-exps.
  `Memory`                 Remembered keys lose their position: all stand where the local context starts.
  `Cache.restart`          A full local context moves into memory, and the next starts at position 0.
  `split_into_windows`     A long prompt is read window by window, each with the memory of all before it.
  `cross_batch_attention`  Training mixes keys of the true past with other documents', which queries learn to ignore.

Axes: B batch, T new tokens, S tokens in a set of keys, n some of them, H query heads, G key-value heads (H, or fewer),
R = T * H / G, D head dim, C hidden size, V vocabulary. `real` (B, 1, S, 1) is False at padding; None: no padding.
`FastLlama`, in fast/: faster kernels, more kinds of memory."""

import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class LongLlamaConfig:
    """Hugging Face's names. Frozen, so fields are completed through vars. Raises ValueError for what is not computed."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    max_position_embeddings: int = 2048  # "the window"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # rope_type and its numbers
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    last_context_length: int = 1024  # newest prompt tokens that stay local
    mem_layers: tuple[int, ...] = ()  # those with a memory
    mem_positionals: bool = True  # False: memory layers do not rotate
    mem_dtype: str = "bfloat16"  # of stored memory
    mem_attention_grouping: tuple[int, int] | None = None  # [heads, queries] scored at once
    keep_local: int = 0  # newest tokens that stay local when the window is full
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2
    pad_token_id: int = 0

    MEM_DTYPES = ("float32", "bfloat16", "float16")

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        vars(self).update(num_key_value_heads=groups, mem_layers=tuple(self.mem_layers), pad_token_id=max(self.pad_token_id, 0))
        size = self.head_dim or self.hidden_size / heads
        require(size % 2 == 0, f"head_dim {size} of hidden_size {self.hidden_size} is not even")
        vars(self).update(head_dim=int(size))
        require(heads % groups == 0, f"num_key_value_heads {groups} must divide num_attention_heads")
        fits = all(i in range(self.num_hidden_layers) for i in self.mem_layers)
        require(fits, f"mem_layers {self.mem_layers} must be of 0 to {self.num_hidden_layers - 1}")
        require(self.mem_dtype in self.MEM_DTYPES, f"mem_dtype must be one of {self.MEM_DTYPES}, not {self.mem_dtype!r}")

    def rotates(self, layer: int) -> bool:
        return self.mem_positionals or layer not in self.mem_layers

    @classmethod
    def from_json(cls, path: str | Path, **overrides):
        """Of a config.json that transformers 4 or 5 wrote; overrides: fields to change. Raises ValueError."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling = {"rope_type": kind} | {name: x for name, x in rope.items() if name not in ("type", "rope_theta")}
        raw |= rope | {"rope_type": kind, "rope_scaling": None if kind == "default" else scaling}  # and rope_theta
        config = cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
        slides = raw.get("sliding_window", 4096) if raw.get("model_type") == "mistral" else None  # its default
        fits = slides is None or slides >= config.max_position_embeddings
        require(fits, f"sliding_window {slides} is below max_position_embeddings: set that to {slides}")
        allowed = {"model_type": ("llama", "longllama", "mistral"), "rope_type": ("default", "linear", "llama3")}
        allowed |= {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "partial_rotary_factor": (1,)}
        allowed |= {"mem_topk": (None,), "mem_device": (None,)}
        for name in allowed.keys() - cls.__dataclass_fields__:  # subclasses have more
            require(raw.get(name) in (None, *allowed[name]), f"{name} {raw.get(name)!r} is not supported, only {allowed[name]}")
        return replace(config, **overrides)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019): F.rms_norm computes in float32 and casts back, then x is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight


def rope_table(start: int | Tensor, T: int, config: LongLlamaConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2), float32, at positions from start on (Su et al. 2021)."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)  # (D/2,)
    if rope := config.rope_scaling:  # slower by factor; llama3 keeps pairs that turn often in its first window
        kept = 0
        if rope["rope_type"] == "llama3":
            turns = frequency * rope["original_max_position_embeddings"] / (2 * torch.pi)
            low = rope["low_freq_factor"]
            kept = ((turns - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    angle = (start + torch.arange(T, device=device)).float().outer(frequency)  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its angle: Hugging Face's layout."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # in float32, as cos and sin are
    return turned.to(x.dtype).contiguous()  # cat may transpose heads of 2, which the CPU's kernel misreads


Attended = tuple[Tensor, Tensor]  # attention's output (B, H, T, D), and its scores' log-sum-exp (B, H, T)


def merge(a: Attended, b: Attended) -> Attended:
    """Attention to two sets of keys from attention to each, exactly: one softmax over both gives set a the share
    exp(lse_a) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_a - lse_b)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share = (lse_a - lse_b).sigmoid().unsqueeze(-1)  # (B, H, T, 1)
    return out_b.float().lerp(out_a.float(), share), torch.logaddexp(lse_a, lse_b)


def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, causal: bool = False, rows: int = 128) -> Attended:
    """Attention of q (B, H, T, D) to keys k, values v (B, G, S, D) with real (B, 1 or G, S, 1). causal: T = S, and query t sees
    keys 0 to t. rows: queries for each key head that are scored at once where no fused kernel gives a log-sum-exp."""
    (B, H, T, D), G = q.shape, k.shape[1]
    if G != H and causal:  # joined as below, the triangle would run on from head to head
        k, v, G = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1), H
    q = q.reshape(B, G, -1, D)  # (B, G, R, D): queries that share a key head, joined
    # Padding gets half the least number: no sum overflows, and who sees nothing else gets no NaN.
    bias = 0 if real is None else (~real.mT).to(q.dtype) * (torch.finfo(q.dtype).min / 2)  # (B, 1 or G, 1, S)
    fused, aten = not torch.is_grad_enabled(), torch.ops.aten  # kernels' log-sum-exp has no gradient
    ampere = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 8
    if fused and q.device.type == "cpu":
        mask = None if real is None else bias
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask)
    elif fused and ampere and real is None and q.dtype.itemsize == 2 and D in range(8, 257, 8):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[:2]
    else:
        parts = []
        for i, part in enumerate(q.split(rows, dim=2)):  # softmax(q k^T / sqrt(D)) v, in float32
            scores = (part @ k.mT).float() * D**-0.5 + bias  # (B, G, rows, S)
            if causal:
                future = torch.ones_like(scores, dtype=torch.bool).triu(i * rows + 1)
                scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)  # below padding
            parts.append((scores.softmax(dim=-1).to(v.dtype) @ v, scores.logsumexp(dim=-1)))
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts))
    return out.reshape(B, H, T, D), lse.reshape(B, H, T)


class Memory:
    """Unrotated keys and values of everything before the local context, for one memory layer.

    They are kept in blocks, (B, G, tokens, D), that never change: forks share them, and gradients flow through. New tokens
    take in the blocks before them that are no larger, as binary digits carry: so blocks and copies are few.

        after 6 windows  [. . . .] [. .]      after 7  [. . . .] [. .] [.]      after 8  [. . . . . . . .]

    To keep only some tokens, override `choose`. Another make of memory needs `append`, `attend`, `fork`, `expand`,
    `length` (tokens appended, kept or not) and `nbytes`."""

    BLOCK = 8192  # tokens

    def __init__(self, config: LongLlamaConfig):
        self.dtype, H = getattr(torch, config.mem_dtype), config.num_attention_heads
        heads, queries = config.mem_attention_grouping or (H, 128)
        self.rows = max(heads * queries // H, 1)  # of scores at once
        self.blocks = []  # of keys, values, and which tokens they are, (B, G, tokens, 1)
        self.length = 0  # tokens appended

    def append(self, k: Tensor, v: Tensor):
        """Remembers n tokens: unrotated keys and values (B, G, n, D)."""
        which = torch.arange(self.length, self.length + k.shape[2], device=k.device).expand(*k.shape[:2], -1).unsqueeze(-1)
        self.length += k.shape[2]
        k, v = k.to(self.dtype, copy=True), v.to(self.dtype, copy=True)
        for new in zip(*(x.split(self.BLOCK, dim=2) for x in (k, v, which))):
            blocks = list(self.blocks)  # forks share the old list
            while blocks and blocks[-1][0].shape[2] <= min(new[0].shape[2], self.BLOCK - new[0].shape[2]):
                new = tuple(torch.cat(pair, dim=2) for pair in zip(blocks.pop(), new))
            self.blocks = [*blocks, new]

    def attend(self, q: Tensor, real: Tensor | None) -> Attended:
        """Attention of q (B, H, T, D) to what is remembered. real (B, 1, S, 1): of all tokens appended, and later ones."""
        sets = ((k.to(q.dtype), v.to(q.dtype), part) for k, v, part in self.sets(real))
        return reduce(merge, (attend(q, *keys, rows=self.rows) for keys in sets))

    def sets(self, real: Tensor | None) -> Iterator[tuple]:
        """Keys, values and `real` of each block."""
        for k, v, which in self.blocks:
            yield k, v, None if real is None else real.expand(-1, k.shape[1], -1, -1).take_along_dim(which, dim=2)

    def choose(self, k: Tensor, real: Tensor | None) -> Tensor | None:
        """Override: indices (B, G, n) in k of the tokens to keep, or None: all. `forget` asks, after each append. k (B, G, S, D):
        all keys remembered, in float32, the oldest first; real (B, G, S, 1)."""

    def forget(self, real: Tensor | None):
        """Keeps what `choose` says."""
        if type(self).choose is not Memory.choose:
            self.blocks = [tuple(torch.cat(x, dim=2) for x in zip(*self.blocks))]
            k, _, part = next(self.sets(real))
            chosen = self.choose(k.float(), part)
            if chosen is not None:
                require(chosen.shape[2] > 0, "choose must keep a token")
                b, g = (torch.arange(n, device=k.device) for n in k.shape[:2])
                at = b[:, None, None], g[:, None], chosen.sort(dim=-1).values  # in their order again
                self.blocks = [tuple(x[at] for x in self.blocks[0])]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v, _ in self.blocks)

    def fork(self):
        return copy(self)

    def expand(self, n: int):
        self.blocks = [tuple(x.expand(n, -1, -1, -1) for x in block) for block in self.blocks]


class LocalCache:
    """The local context of a layer, and its memory or None. tensors (B, G, S, D): keys, values, for memory unrotated keys."""

    attend = staticmethod(attend)  # a subclass may know a faster one

    def __init__(self, config: LongLlamaConfig, memory: Memory | None, rotates: bool):
        self.config, self.memory, self.rotates = config, memory, rotates
        self.tensors, self.length = [], 0

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, real: Tensor | None) -> Tensor:
        """T new tokens join, and attend with one softmax to the local context and to memory (paper, section 3.1): q (B, H, T, D),
        the others (B, G, T, D) -> (B, H, T, D). real: of memory and local context."""
        k, v = self.append([k, v, unrotated])
        T, S = q.shape[2], self.length
        sets = [k, v] if real is None else [k, v, real[:, :, -S:]]
        if T == 1 or T == S:  # one token sees all; T == S: nothing was there before
            attended = self.attend(q, *sets, causal=T == S)
        else:  # to what was there, and causally to the new
            old, new = zip(*(x.split((S - T, T), dim=2) for x in sets))
            attended = merge(self.attend(q, *old), self.attend(q, *new, causal=True))
        if self.memory is not None and self.memory.length:
            attended = merge(self.memory.attend(q, real), attended)
        return attended[0]

    def append(self, new: list[Tensor]) -> list[Tensor]:
        """Adds rotated keys, values, unrotated keys, (B, G, n, D); returns all keys, all values."""
        new = new if self.memory is not None else new[:2]
        self.tensors = [torch.cat(x, dim=2) for x in (zip(self.tensors, new) if self.tensors else zip(new))]
        self.length += new[0].shape[2]
        return self.tensors[:2]

    def restart(self, keep: int):
        """All but the newest `keep` tokens move into memory, or are lost; these stay, from position 0 on."""
        if not self.tensors:  # reading stopped at the last memory layer, below
            return
        moved = self.length - keep
        old, kept = zip(*(x.split((moved, keep), dim=2) for x in self.tensors))
        if self.memory is not None:
            self.memory.append(old[2], old[1])  # unrotated keys, values
        self.tensors, self.length = [], 0
        if keep:
            k, *others = kept
            if self.rotates:  # angles add up: back by as many as tokens moved
                k = rotate(k, rope_table(-moved, 1, self.config, k.device))
            self.append([k, *others])

    def fork(self):
        twin = copy(self)
        twin.memory = None if self.memory is None else self.memory.fork()
        return twin


class Cache:
    """What a model knows of the tokens it has read. Reading changes it: to go on from one point twice, fork."""

    def __init__(self, config: LongLlamaConfig, new_memory=Memory, new_context=LocalCache):
        """new_memory(config) and new_context(config, memory or None, rotates) make a layer's."""
        self.config = config
        memories = [new_memory(config) if i in config.mem_layers else None for i in range(config.num_hidden_layers)]
        self.layers = [new_context(config, memory, config.rotates(i)) for i, memory in enumerate(memories)]
        self.local_length = self.memory_length = 0  # local_length: the next position
        self.batch_size = self.real = None  # rows; `real` of all tokens, memory's first

    @property
    def memory_bytes(self) -> int:
        return sum(layer.memory.nbytes for layer in self.layers if layer.memory is not None)

    def restart(self, keep: int = 0):
        """All but the newest `keep` tokens move into memory."""
        moved = self.local_length - keep
        if moved > 0:
            self.memory_length, self.local_length = self.memory_length + moved, keep
            for layer in self.layers:
                layer.restart(keep)
                if isinstance(layer.memory, Memory):  # others do so themselves
                    layer.memory.forget(self.real)

    def pad(self, mask: Tensor):
        """Notes which of the next tokens are padding, if any is, or was: mask (B, T)."""
        if self.real is not None or not mask.all():
            past = mask.new_ones(len(mask), 1, self.memory_length + self.local_length, 1) if self.real is None else self.real
            self.real = torch.cat((past.bool(), mask.bool()[:, None, :, None]), dim=2)

    def fork(self):
        """A cache of its own; what is remembered is shared."""
        twin = copy(self)
        twin.layers = [layer.fork() for layer in self.layers]
        return twin

    def expand(self, n: int):
        """A fork with n times its one row."""
        twin = self.fork()
        twin.batch_size, twin.real = n, self.real if self.real is None else self.real.expand(n, -1, -1, -1)
        for layer in twin.layers:
            layer.tensors = [x.expand(n, -1, -1, -1) for x in layer.tensors]
            if layer.memory is not None:
                layer.memory.expand(n)
        return twin


def split_into_windows(T: int, last: int, cache: Cache, config: LongLlamaConfig) -> list[tuple]:
    """How T new tokens are read: pieces (start, stop, keep). Before each, all local tokens but the newest `keep` move into
    memory; then tokens start to stop - 1 join. All but the last `last` tokens are cut into windows.

    On a fresh cache each starts alone: T = 1000, last = 128, window 256 give (0, 256, 0) (256, 512, 0) (512, 768, 0)
    (768, 872, 0) (872, 1000, 0). Later it joins what is local if both fit; if not, at most keep_local tokens stay. If last >= T
    all T stay local, beyond the window too."""
    window, local = config.max_position_embeddings, cache.local_length
    if not config.mem_layers:
        return [(0, T, local)]
    fresh, prefix, pieces = local + cache.memory_length == 0, max(T - last, 0), []
    for start, stop in pairwise([*range(0, prefix, window), prefix, T]):
        room = max(window - (stop - start), 0)
        keep = local if local <= room else min(config.keep_local, room)  # local <= room: both fit
        keep = 0 if fresh else keep
        pieces.append((start, stop, keep))
        local = keep + stop - start
    return pieces


def cross_batch_attention(q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, extra: list[int], detached=False) -> Tensor:
    """FoT's training (paper, section 3.2): row b of a batch, an *entry*, sees itself, causally, and the extra[b] entries before.
    Those get gradients unless detached; their keys are unrotated, as in memory. q (B, H, T, D), the rest (B, G, T, D) -> as q."""
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if not any(extra):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    (ks, vs), outs = ((x.detach() if detached else x).unbind() for x in (unrotated, v)), []
    for b, (n, key, value) in enumerate(zip(extra, k, v)):
        keys = torch.cat((*ks[b - n : b], key), dim=1)  # (G, (n + 1) * T, D)
        values = torch.cat((*vs[b - n : b], value), dim=1)
        seen = torch.ones(T, (n + 1) * T, dtype=torch.bool, device=q.device).tril(n * T)  # all of the n, itself causally
        outs.append(F.scaled_dot_product_attention(q[b, None], keys[None], values[None], seen, enable_gqa=gqa))
    return torch.cat(outs)


def cross_batch_extra(B: int, cross_batch_range: int, packing: int) -> list[int]:
    """How many of the entries before it each of B entries sees (paper, appendix A.2).

    `packing` successive entries are chunks of one document: the nearest seen are its past, positives; farther ones are of others,
    negatives (the paper's d: 1 positive, d - 1 negatives). Later chunks see more, so one batch trains short and long ranges:
    (8, 6, 4) gives [0, 1, 2, 3, 0, 3, 6, 6], as (positives, negatives) (0,0) (1,0) (2,0) (3,0), before which nothing stands,
    (0,0) (1,2) (2,4) (3,3)."""
    step = cross_batch_range // max(packing - 1, 1) + 1  # so that the last chunk sees the whole range
    return [min(b % packing * step, cross_batch_range, b) for b in range(B)]


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + SwiGLU(norm(x)) (Shazeer 2020)."""

    def __init__(self, config: LongLlamaConfig, rotates: bool):
        super().__init__()
        self.H, self.G, self.D, self.rotates = config.num_attention_heads, config.num_key_value_heads, config.head_dim, rotates
        C, linear = config.hidden_size, partial(nn.Linear, bias=False)
        self.input_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.qkv_proj, self.o_proj = linear(C, (self.H + 2 * self.G) * self.D), linear(self.H * self.D, C)
        self.post_attention_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.gate_up_proj, self.down_proj = linear(C, 2 * config.intermediate_size), linear(config.intermediate_size, C)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend_to: Callable) -> Tensor:
        """x (B, T, C) -> (B, T, C). attend_to: q, k, v, k unrotated -> (B, H, T, D); all state is in there."""
        return self.update(x, attend_to(*self.project(x, rope)))

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """x (B, T, C) -> q (B, H, T, D); k, v, and k unrotated, (B, G, T, D) each."""
        heads = self.qkv_proj(self.input_layernorm(x)).unflatten(-1, (-1, self.D)).transpose(1, 2)  # (B, H + 2 * G, T, D)
        unrotated, v = heads.split((self.H + self.G, self.G), dim=1)  # q and k, v
        qk = rotate(unrotated, rope) if self.rotates else unrotated
        return qk[:, : self.H], qk[:, self.H :], v, unrotated[:, self.H :]

    def update(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2).to(x.dtype))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


def sample(logits: Tensor, temperature: float, top_k=None, top_p=None, min_p=None, rng=None) -> Tensor:
    """One id for each row of logits (B, V), float32 -> (B,). temperature 0: the likeliest. top_k >= 1; top_p, min_p: 0 to 1."""
    require(bool(logits.amax(dim=-1).isfinite().all()), "logits are no finite numbers")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = (logits / temperature).sort(dim=-1, descending=True)
    probs = logits[:, :top_k].softmax(dim=-1)  # the likeliest first
    if top_p is not None:  # the likeliest, until they sum to top_p
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    if min_p is not None:  # of them, those at least min_p times as likely as the likeliest
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=rng)).squeeze(-1)


class LongLlama(nn.Module):
    """LLaMA with memory layers; without any, LLaMA."""

    config_class = LongLlamaConfig

    def __init__(self, config: LongLlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, config.rotates(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=config.hidden_size**-0.5)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self) -> Cache:
        return Cache(self.config)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, V)."""
        return self.lm_head(self.norm(x))

    def forward(
        self, input_ids: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None, last_context_length=None,
        logits_to_keep=0, labels=None,
    ) -> tuple[Tensor, Cache]:
        """Reads input_ids (B, T) after what the cache holds; returns logits (B, T, V), and the cache.

        attention_mask (B, T), of the new tokens: 0 is padding, on the left. last_context_length: instead of the config's.
        logits_to_keep: n > 0 gives the last n only, (B, n, V), and computes no more. labels: gives the mean of the
        `token_losses` that count instead. Raises ValueError where lengths do not fit; other errors spoil the cache."""
        if labels is not None:
            losses, cache = self.token_losses(input_ids, labels, cache, attention_mask, last_context_length)
            return losses.sum() / (labels[:, 1:] != -100).sum().clamp(min=1), cache
        x, cache = self.hidden_states(input_ids, cache, attention_mask, last_context_length, logits_to_keep)
        return self.logits(x), cache

    def token_losses(self, input_ids: Tensor, labels: Tensor, cache=None, attention_mask=None, last_context_length=None):
        """Cross-entropy (B, T) of each label given the tokens before, 0 for -100 and at the first position; and the cache. labels
        are input_ids or -100, as in Hugging Face. Few logits exist at a time."""

        def losses(x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(x).float().mT, labels, reduction="none")

        x, cache = self.hidden_states(input_ids, cache, attention_mask, last_context_length)
        pieces = zip(x[:, :-1].split(1024, dim=1), labels[:, 1:].split(1024, dim=1))
        pieces = [checkpoint(losses, *piece, use_reentrant=False) for piece in pieces]
        return F.pad(torch.cat(pieces, dim=1), (1, 0)), cache

    def hidden_states(self, input_ids: Tensor, cache=None, attention_mask=None, last_context_length=None, logits_to_keep=0):
        """What goes into the head: (B, T, C), or of the last logits_to_keep > 0 tokens only; and the cache."""
        (B, T), window, mask = input_ids.shape, self.config.max_position_embeddings, attention_mask
        cache = self.new_cache() if cache is None else cache
        last = self.config.last_context_length if last_context_length is None else last_context_length
        mask = torch.ones_like(input_ids) if mask is None and cache.real is not None else mask
        require(mask is None or mask.shape == (B, T), f"attention_mask must be {(B, T)}, of the new tokens alone")
        require(min(T, last) > 0, f"input_ids and last_context_length must be at least 1: {T}, {last}")
        fits = self.config.mem_layers or cache.local_length + T <= window
        require(fits, f"{cache.local_length + T} tokens exceed the window of {window}, without mem_layers")
        require(cache.batch_size in (None, B), f"input_ids has {B} rows, and the cache has {cache.batch_size}")
        cache.batch_size, first, hidden = B, T - (logits_to_keep or T), []
        pieces = split_into_windows(T, last, cache, self.config)
        for i, (start, stop, keep) in enumerate(pieces):
            cache.restart(keep)
            if mask is not None:
                cache.pad(mask[:, start:stop])
            only_remember = stop <= first and pieces[i + 1][2] == 0
            x = self.read(input_ids[:, start:stop], cache, only_remember)
            if stop > first:
                hidden.append(x[:, max(first - start, 0) :])
        return torch.cat(hidden, dim=1), cache

    def read(self, input_ids: Tensor, cache: Cache, only_remember: bool) -> Tensor:
        """T tokens (B, T) join the local context -> (B, T, C). only_remember: they only become memory, so stop at the last memory
        layer's keys. If contexts store in place, cache.local_length may be a tensor."""
        T = input_ids.shape[1]
        rope = rope_table(cache.local_length, T, self.config, input_ids.device)
        cache.local_length += T
        x = self.embed_tokens(input_ids)
        for i, (layer, context) in enumerate(zip(self.layers, cache.layers)):
            if only_remember and i == max(self.config.mem_layers):
                context.append(list(layer.project(x, rope)[1:]))
                break
            x = layer(x, rope, partial(context.append_and_attend, real=cache.real))
        return x

    def forward_cross_batch(self, input_ids: Tensor, extra: list[int], detached=False) -> Tensor:
        """FoT training: input_ids (B, T) -> logits (B, T, V), by `cross_batch_attention` in memory layers."""
        x = self.embed_tokens(input_ids)
        rope = rope_table(0, x.shape[1], self.config, x.device)
        for i, layer in enumerate(self.layers):
            seen = extra if i in self.config.mem_layers else []
            x = layer(x, rope, partial(cross_batch_attention, extra=seen, detached=detached))
        return self.logits(x)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, *, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=None,
        eos_token_id=-1, cache=None, attention_mask=None, last_context_length=None, logits_processor=lambda ids, x: x,
    ) -> Iterator[Tensor]:
        """Continues input_ids (B, T): yields ids (B,) until all rows had an eos_token_id (-1: the config's; None: never), and
        got pad_token_id since; by `sample`, from logits_processor(ids so far (B, n), logits (B, V)). The cache lacks only the ids
        yielded last: to go on, begin with them."""
        eos = self.config.eos_token_id if eos_token_id == -1 else [] if eos_token_id is None else eos_token_id
        rng = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        ended, eos = input_ids.new_zeros(len(input_ids), dtype=torch.bool), torch.tensor(eos, device=input_ids.device)
        for n in range(max_new_tokens):
            new = input_ids[:, -1:] if n else input_ids  # the cache has the others
            logits, cache = self(new, cache, attention_mask, last_context_length, logits_to_keep=1)
            logits = logits_processor(input_ids, logits[:, -1].float())  # (B, V)
            ids = sample(logits, temperature, top_k, top_p, min_p, rng).masked_fill(ended, self.config.pad_token_id)
            yield ids
            ended |= torch.isin(ids, eos)
            if ended.all():
                return
            input_ids, attention_mask = torch.cat((input_ids, ids[:, None]), dim=1), None

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu", dtype=torch.float32, **overrides):
        """From a folder of config.json and model.safetensors. `FastLlama` checks them first."""
        with torch.device("meta"):
            model = cls(cls.config_class.from_json(Path(folder) / "config.json", **overrides))
        model.to(dtype).to_empty(device=device).eval().load(Path(folder))
        return model

    def load(self, folder: Path):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            if "lm_head.weight" not in [*file.keys()]:
                self.tie_weights()  # to_empty made two of one; a file with two keeps them
            for name, tensor in self.hf_tensors().items():
                tensor.copy_(file.get_tensor(name).view_as(tensor))

    def hf_tensors(self) -> dict[str, Tensor]:
        """Views of the weights, by Hugging Face's names: q, k, v are one matrix here, and gate, up."""
        kv, tensors = self.layers[0].G * self.layers[0].D, {}
        theirs = {"qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "o_proj": "self_attn.o_proj"}
        theirs |= {"gate_up_proj": "mlp.gate_proj mlp.up_proj", "down_proj": "mlp.down_proj"}
        for name, parameter in self.named_parameters():
            ours, prefix = name.split(".")[-2], "" if name.startswith("lm_head") else "model."
            names = theirs.get(ours, ours).split()
            parts = parameter.detach().tensor_split((-2 * kv, -kv) if ours == "qkv_proj" else len(names))
            tensors |= {prefix + name.replace(ours, their): part for their, part in zip(names, parts)}
        return tensors
