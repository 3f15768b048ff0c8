"""How far reading has come, what it takes, and what it took."""

import math
import os
import sys
import time

from cli.ending import tell

import torch

from fast import FastLlama
from fast.memory import FastMemory
from fast.saved import memory_nbytes
from longllama import Cache, LongLlama, require


def memory_of(device: torch.device) -> float:
    """Bytes that it has, free or not; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def room_for(T: int, model: FastLlama, cache: Cache, memory_of=memory_of) -> int:
    """Bytes that T more tokens take in the cache, its whole local context among them; 0 if its memory is of another make, which
    may forget. Raises ValueError where they can never fit, beside the weights if those are on the same device."""
    if not {type(layer.memory) for layer in cache.layers} <= {FastMemory, type(None)}:
        return 0
    takes, at = memory_nbytes(cache, model, T) - cache.memory_bytes, model.norm.weight.device
    device = torch.device(model.config.mem_device or at)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) if device == at else 0
    told = f"the keys and values of {T:,} tokens take {takes / 2**30:,.1f} GiB"
    told += f" beside weights of {weights / 2**30:,.1f} GiB" if weights else ""
    has, less = memory_of(device), ", or --mem-device cpu" * (device.type != "cpu")
    limit = f"{device} has {has / 2**30:,.1f} GiB: try a shorter text, a smaller --mem-dtype{less}"
    require(takes + weights <= has, f"{told}, and {limit}")
    return takes


class Progress:
    """Counts windows and prompt tokens as the model embeds them, and shows a bar on a terminal. takes: bytes, for the bar to
    tell."""

    def __init__(self, model: LongLlama, total: int, shown: bool, takes: int = 0):
        self.total, self.windows, self.tokens = total, 0, 0
        self.takes = f", which take {takes / 2**20:,.0f} MiB" if takes else ""
        self.shown = shown and total > model.config.max_position_embeddings
        self.hook = model.embed_tokens.register_forward_hook(self.advance)

    def advance(self, module, inputs, output):
        self.windows, self.tokens = self.windows + 1, self.tokens + inputs[0].numel()
        if self.shown:
            done = 40 * self.tokens // self.total
            bar = f"[{'#' * done}{'.' * (40 - done)}]"
            print(
                f"\rreading {bar} {self.tokens:,} of {self.total:,} tokens{self.takes}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def close(self):
        self.hook.remove()
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Compiling:
    """Says when torch begins to compile, which a first prompt waits for, and adds up the seconds that it takes."""

    def __init__(self, wanted: bool, shown: bool):
        self.shown, self.seconds, self.begun, self.handler = shown, 0.0, 0.0, None
        if wanted:
            from torch._dynamo.callback import callback_handler  # takes a second, which others are spared

            self.handler = callback_handler
            self.handler.register_start_callback(self.start)
            self.handler.register_end_callback(self.end)

    def start(self, _):
        if self.shown and not self.seconds:
            tell("compiling the layers: it takes a while, and less the next time, from torch's cache")
        self.begun = time.perf_counter()

    def end(self, _):
        self.seconds += time.perf_counter() - self.begun

    def close(self):
        if self.handler:
            self.handler.remove_start_callback(self.start)
            self.handler.remove_end_callback(self.end)


def process_peak() -> int:
    """Bytes of main memory that this process took at the most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def statistics(
    cache: Cache, progress: Progress, T: int, times: list[float], device: torch.device, compiled: float = 0.0
) -> str:
    """times: when reading began, and when each token was there, in seconds. The first step of one token is not counted in what
    decoding takes: it makes room for more, and with --compile it compiles. compiled: seconds that compiling took, if any."""
    if device.type == "cuda":
        peak, of = torch.cuda.max_memory_allocated(device), "GPU"
    else:
        peak, of = process_peak(), "process"
    steps = len(times) - 3
    decode = f"{steps / (times[-1] - times[2]):,.1f} tokens/s" if steps > 0 else "-"
    return (
        f"prompt {T:,} tokens in {progress.windows:,} windows | "
        f"memory {cache.memory_length:,} tokens, {cache.memory_bytes / 2**20:,.1f} MiB | "
        f"prefill {T / (times[1] - times[0]):,.0f} tokens/s | decode {decode} | peak {of} memory {peak / 2**20:,.0f} MiB"
        + f" | compiling {compiled:,.1f} s"
        * (compiled > 0)
    )
