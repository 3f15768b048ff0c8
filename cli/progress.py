"""How far reading has come, and what it took."""

import sys

import torch

from longllama import Cache, LongLlama


class Progress:
    """Counts windows and prompt tokens as the model embeds them, and shows a bar on a terminal."""

    def __init__(self, model: LongLlama, total: int, shown: bool):
        self.total, self.windows, self.tokens = total, 0, 0
        self.shown = shown and total > model.config.max_position_embeddings
        self.hook = model.embed_tokens.register_forward_hook(self.advance)

    def advance(self, module, inputs, output):
        self.windows, self.tokens = self.windows + 1, self.tokens + inputs[0].numel()
        if self.shown:
            done = 40 * self.tokens // self.total
            bar = f"[{'#' * done}{'.' * (40 - done)}]"
            print(f"\rreading {bar} {self.tokens:,} of {self.total:,} tokens", end="", file=sys.stderr, flush=True)

    def close(self):
        self.hook.remove()
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def process_peak() -> int:
    """Bytes of main memory that this process took at the most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def statistics(cache: Cache, progress: Progress, T: int, times: list[float], device: torch.device) -> str:
    """times: when reading began, and when each token was there, in seconds. The first step of one token is not counted in what
    decoding takes: it makes room for more, and with --compile it compiles."""
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
    )
