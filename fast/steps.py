"""Compiled layers, and whole steps of one token captured as a CUDA graph.

A step of one token is hundreds of small operations, and a GPU waits for the launch of each: 15 to 27 ms a token of the 3B shape
on an H200. Compiled layers fuse them, and a captured step launches all at once: 2.7 ms. A graph does the very same again, in
the same places in memory, so what differs from step to step, the token and the length of the local context, is in tensors.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.attention import attend
from fast.context import FastContext
from fast.memory import FastMemory
from longllama import Attended, Block, Cache, LocalCache, LongLlama, merge


def compiled(part: Callable) -> Callable:
    """Compiles a function of (module, x (B, T, C), ...) when it is first used: once for a single token, once for more."""
    step, many = compile_step(part), torch.compile(part, dynamic=True)
    return lambda module, x, *args: (step if x.shape[1] == 1 else many)(module, x, *args)


def compile_step(part: Callable) -> Callable:
    """For one token, whose shapes never change: products of a matrix and a vector, which take most of its time on a GPU, are
    worth a search for the best kernel. They get their vector ready-made, not computed anew for each row (where that takes more
    than 9 operations: a norm, SwiGLU), and since Hopper a kernel is launched before the one ahead of it is done."""
    gpu = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 9, "triton.enable_pdl": True}
    return torch.compile(part, dynamic=False, options=gpu)


class CompiledBlock(Block):
    """Shares the modules of a block; what comes before and after attention is compiled, once for all blocks."""

    def __init__(self, block: Block, project: Callable, update: Callable):
        nn.Module.__init__(self)
        self.H, self.G, self.D, self.rotates = block.H, block.G, block.D, block.rotates
        for name, child in block.named_children():
            self.add_module(name, child)
        self.compiled_project, self.compiled_update = project, update

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.compiled_project(self, x, rope)

    def update(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.compiled_update(self, x, attended)


def compile_blocks(layers: nn.ModuleList):
    torch._dynamo.config.recompile_limit = 64  # batch sizes, dtypes, with and without memory: each is compiled once
    project, update = compiled(Block.project), compiled(Block.update)
    for i, block in enumerate(layers):
        layers[i] = CompiledBlock(block, project, update)


def join(q: Tensor, new: list[Tensor], kept: list[Tensor], length: Tensor) -> Attended:
    """One token becomes the `length`-th, (1,), of a local context, and attends to it.

    q (B, H, 1, D); new (B, G, 1, D) each, its key, value and, in a memory layer, unrotated key; kept (B, G, capacity, D) each.
    """
    for x, tensor in zip(new, kept):
        tensor.index_copy_(2, length - 1, F.pad(x, (0, tensor.shape[3] - x.shape[3])))
    real = torch.arange(kept[0].shape[2], device=q.device) < length  # (capacity,)
    return attend(q, *kept[:2], real[None, None, :, None])


class StepContext(LocalCache):
    """The local context of a layer, within a captured step: `length` is a tensor, and its room is attended to, as padding."""

    def __init__(self, context: FastContext, join: Callable, merge: Callable):
        super().__init__(context.config, context.memory, context.rotates)
        self.tensors = context.tensors  # the same, to be written into
        self.join, self.merge = join, merge

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, real: None) -> Tensor:
        attended = self.join(q, [k, v] if self.memory is None else [k, v, unrotated], self.tensors, self.length)
        if self.memory is not None and self.memory.length:
            attended = self.merge(self.memory.attend(q, real), attended)
        return attended[0]


class Steps:
    """Reads a single token by replaying a CUDA graph of the whole model, where it can.

    The graph is captured anew where a cache's tensors are others than those before: after the window overflowed, say, or its
    room was full and doubled. What it cannot do goes the usual way: other numbers of tokens, room that is full, padding, memory
    in main memory, caches of another kind.
    There is one graph, so one step at a time, and weights have to stay where they are.
    """

    def __init__(self, model: LongLlama, capture: Callable, join: Callable = join, merge: Callable = merge):
        """capture: `captured`, or what stands in for it without a GPU. join, merge: those functions, or compiled ones."""
        self.model, self.capture, self.join, self.merge = model, capture, join, merge
        self.places: list[weakref.ref] = []  # the local contexts that the graph reads and writes; a cache may drop them
        self.replay = self.logits = None  # see `prepare`

    def read(self, input_ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """What `LongLlama.forward` gives for a token (B, 1) that `can_replay`."""
        tensors = [x for layer in cache.layers for x in layer.tensors]  # memory moves only when these are new ones
        if len(self.places) != len(tensors) or any(place() is not x for place, x in zip(self.places, tensors)):
            # the graph before goes, also where the next one fails
            self.places, self.replay, self.logits = [], None, None
            self.prepare(input_ids, cache)
            self.places = [weakref.ref(x) for x in tensors]
        self.input_ids.copy_(input_ids)
        self.start.fill_(cache.local_length)
        self.replay()
        cache.local_length += 1
        for layer in cache.layers:
            layer.length += 1
        return self.logits.clone(), cache

    def can_replay(self, input_ids: Tensor, cache: Cache) -> bool:
        tensors = cache.layers[0].tensors
        if not tensors or cache.real is not None or torch.is_grad_enabled():
            return False
        B, _, capacity, _ = tensors[0].shape
        memories = [layer.memory for layer in cache.layers if layer.memory is not None]
        known = all(type(x) is FastContext for x in cache.layers) and all(type(x) is FastMemory for x in memories)
        return (
            input_ids.shape == (B, 1)
            and cache.local_length < capacity
            and known
            and all(memory.device is None for memory in memories)
        )

    def prepare(self, input_ids: Tensor, cache: Cache):
        """Makes `replay`, which reads `input_ids` as the token at position `start`, and writes its `logits`."""
        with torch.inference_mode(False):  # or they could not be written into once that mode is over
            self.input_ids = input_ids.clone()
            self.start = torch.tensor([cache.local_length], device=input_ids.device)
        contexts = iter(StepContext(layer, self.join, self.merge) for layer in cache.layers)
        twin = Cache(cache.config, lambda config: None, lambda *_: next(contexts))
        for layer in twin.layers:
            for tensor in layer.tensors:
                tensor[:, :, cache.local_length :] = 0  # no NaN, which would be attended to in spite of being padding

        def step():
            twin.local_length = self.start.clone()  # `read` adds 1 to it, in place, and so to each layer's length
            for layer in twin.layers:
                layer.length = twin.local_length
            self.logits = self.model.logits(self.model.read(self.input_ids, twin, only_remember=False))

        self.replay = self.capture(step, input_ids.device)


side_stream = lru_cache(torch.cuda.Stream)  # one for each device, since cuBLAS sets up room for each stream, for good


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that does on a GPU, as one CUDA graph, what work() does there. work() is called twice, and must not mind."""
    with torch.cuda.device(device):
        aside, graph = side_stream(device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled, chosen or set up on first use cannot be captured
            work()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside):
            work()
    return graph.replay
