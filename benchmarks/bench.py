"""What LongLLaMA costs, and beside what: prefill, decode and memory on random weights, in one Markdown table.

    python benchmarks/bench.py --shape mid --prompt-tokens 2k,16k --compare naive,sdpa,transformers
    python benchmarks/bench.py --shape mid --prompt-tokens 16k --mem-dtype float32,bfloat16 --compare ""
    python benchmarks/bench.py --shape 3b --device cuda --compile --prompt-tokens 2k,16k,256k,1M --compare naive,sdpa,transformers

core          longllama.py alone, without what fast/ plugs in
naive         the same model written plainly: one matrix of all scores, keys and values concatenated at every step
sdpa          naive, but with scaled_dot_product_attention and a mask over the concatenated keys
transformers  LlamaForCausalLM (sdpa): the whole prompt in its own cache; no memory, no windows

All compute with the same weights, and their logits are compared first. Speeds are medians of interleaved repeats.
"""

import argparse
import importlib.util
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, out_of_memory, tell

import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import number, parse_lengths, parser_for
from cli.loading import DTYPES, TINY, pick_device
from cli.progress import process_peak
from fast import MEM_DTYPES, FastConfig, FastLlama
from fast.linear import linear
from fast.quantised import KINDS, quantised_weights
from longllama import LongLlama, LongLlamaConfig

FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "last_context_length", "mem_layers", "vocab_size", "rope_theta",
)  # fmt: skip
SHAPES = {
    "tiny": None,  # that of the trained model that comes along
    "mid": (512, 1376, 8, 8, 1024, 512, (2, 4, 6), 32000, 1e4),
    "3b": (3200, 8640, 26, 32, 2048, 1024, (6, 12, 18), 32000, 1e4),
    "7b": (4096, 11008, 32, 32, 4096, 3072, (8, 16, 24), 32016, 1e6),
}
COMPARED = ("core", "naive", "sdpa", "transformers")
DEVICES = {"cpu": ((1024, 2048, 3072), 2**30), "cuda": ((4096, 8192), 2**32)}  # sizes of matmuls, and bytes to read
COLUMNS = (
    "prompt", "implementation", "memory dtype", "prefill tokens/s", "x time", "of matmul peak", "decode ms/token", "x time",
    "of bandwidth", "peak MiB", "weights", "growth", "of it memory", "rest",
)  # fmt: skip


def random_model(shape: str, device: torch.device, dtype: torch.dtype, **settings) -> FastLlama:
    sizes = SHAPES[shape]
    config = FastConfig(**dict(zip(FIELDS, sizes))) if sizes else FastConfig.from_json(TINY / "config.json")
    config = replace(config, **settings)
    with torch.device("meta"):
        model, whole = FastLlama(config), FastLlama(replace(config, weight_dtype=None))

    def random(shape: torch.Size) -> Tensor:
        x = torch.ones(shape, device=device, dtype=dtype)
        return x.normal_(std=config.hidden_size**-0.5) if len(shape) > 1 else x

    weights = {name: (list(x.shape), dtype, partial(random, x.shape)) for name, x in whole.hf_tensors().items()}
    model = model.to(dtype).to_empty(device=device).eval()
    model.take(weights if config.weight_dtype is None else quantised_weights(weights, config.weight_dtype))
    return model


def bench_model(args: argparse.Namespace) -> FastLlama:
    model = random_model(args.shape, args.device, args.dtype, mem_device=args.mem_device, weight_dtype=args.weights)
    if args.compile:
        model.compile_layers()  # which only longllama computes with; the others take its weights
    return model


def random_ids(model: FastLlama, B: int, T: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (B, T), device=model.norm.weight.device)


def reader(name: str, mem_dtype: str, model: FastLlama) -> Callable:
    """read(ids (B, T), cache or None) -> last logits (B, 1, V), and a cache with local_length and memory_bytes."""
    if name == "transformers":
        return transformers_reader(model)
    config, weights = replace(model.config, mem_dtype=mem_dtype), model.hf_tensors()
    if name == "longllama":
        return lambda ids, cache: model(ids, cache or model.new_cache(mem_dtype=mem_dtype), logits_to_keep=1)
    if name == "core":
        return core_reader(config, model)
    attention = naive_attention if name == "naive" else F.scaled_dot_product_attention
    return lambda ids, cache: (cache or Plain(config, weights, attention)).read(ids)


def core_reader(config: FastConfig, model: FastLlama) -> Callable:
    """longllama.py alone."""
    plain = LongLlamaConfig(**{field.name: getattr(config, field.name) for field in fields(LongLlamaConfig)})
    with torch.device("meta"):
        core = LongLlama(plain).eval()
    core.load_state_dict(model.state_dict(), assign=True)
    return lambda ids, cache: core(ids, cache, logits_to_keep=1)


def transformers_reader(model: FastLlama) -> Callable:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    same = (*FIELDS[:5], "vocab_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
    config = LlamaConfig(**{name: getattr(model.config, name) for name in same}, attn_implementation="sdpa")
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).eval()
    weights = model.hf_tensors()
    llama.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.norm.weight.device)  # no weight

    def read(ids: Tensor, cache: DynamicCache | None) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if cache is None else cache  # the fourth argument; its name depends on the version
        logits = llama(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits
        cache.local_length, cache.memory_bytes = cache.get_seq_length(), 0
        return logits, cache

    return read


def naive_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, H, S, D), seen (T, S) -> (B, H, T, D)."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, H, T, S)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(v.dtype) @ v


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """RoPE of x (B, H, T, D), the first of whose tokens is at position start."""
    position, i = (torch.arange(n, device=x.device).float() for n in (x.shape[2], x.shape[3] // 2))
    angle = (start + position).outer(theta ** -(i / len(i))).repeat(1, 2)  # (T, D)
    a, b = x.chunk(2, dim=-1)
    return (x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()).to(x.dtype)


def concatenate(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, dim=2) for pair in zip(old, new)] if old else new


class Plain:
    """The model and its caches, written plainly: all windows go through all layers, all steps rotate all keys anew."""

    def __init__(self, config: FastConfig, weights: dict[str, Tensor], attention: Callable):
        self.config, self.weights, self.attention = config, weights, attention
        self.local, self.memory = defaultdict(list), defaultdict(list)  # [unrotated k, v] of each layer, (B, H, S, D)

    local_length = property(lambda self: self.local[0][0].shape[2] if self.local else 0)
    memory_bytes = property(lambda self: sum(x.nbytes for pair in self.memory.values() for x in pair))

    def read(self, ids: Tensor) -> tuple[Tensor, "Plain"]:
        fresh, prefix = not self.local, max(ids.shape[1] - self.config.last_context_length, 0)
        window = self.config.max_position_embeddings
        for piece in (*(ids[:, :prefix].split(window, dim=1) if prefix else ()), ids[:, prefix:]):
            if self.local and (fresh or self.local_length + piece.shape[1] > window):
                self.restart()
            x = self.read_piece(piece)
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(self.norm(x[:, -1:], "model.norm"), head), self

    def restart(self):
        for i in self.config.mem_layers:
            remembered = [x.to(getattr(torch, self.config.mem_dtype)) for x in self.local[i]]
            self.memory[i] = concatenate(self.memory[i], remembered)
        self.local.clear()

    def read_piece(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"])  # (B, T, C)
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}."
            x = x + self.attend(self.norm(x, layer + "input_layernorm"), i, layer + "self_attn.")
            h = self.norm(x, layer + "post_attention_layernorm")
            h = F.silu(self.linear(h, layer + "mlp.gate_proj")) * self.linear(h, layer + "mlp.up_proj")
            x = x + self.linear(h, layer + "mlp.down_proj")
        return x

    def attend(self, x: Tensor, i: int, layer: str) -> Tensor:
        qkv = (self.linear(x, layer + f"{name}_proj") for name in "qkv")
        q, k, v = (x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in qkv)  # (B, H, T, D)
        self.local[i] = k, v = concatenate(self.local[i], [k, v])
        q, k = (rotate(x, k.shape[2] - x.shape[2], self.config.rope_theta) for x in (q, k))
        k, v = concatenate([remembered.to(x.dtype) for remembered in self.memory[i]], [k, v])
        T, S = q.shape[2], k.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)  # all of memory, and no future
        return self.linear(self.attention(q, k, v, seen).transpose(1, 2).flatten(2), layer + "o_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.config.rms_norm_eps)


def check(name: str, mem_dtype: str, model: FastLlama, read: Callable):
    """Exits where an implementation's logits, by its `read`, differ from longllama's by more than roundings of the dtype."""
    window, last, weight = model.config.max_position_embeddings, model.config.last_context_length, model.norm.weight
    lengths = (window + window // 2 + last, window - last, 1, 1)  # with memory, full, after an overflow, and a step on
    lengths = (max(last // 2, 1), 1, 1) if name == "transformers" else lengths  # so short that there is no memory
    readers, caches = (reader("longllama", mem_dtype, model), read), (None, None)
    for piece in random_ids(model, 1, sum(lengths)).split(lengths, dim=1):
        (right, logits), caches = zip(*(read(piece, cache) for read, cache in zip(readers, caches)))
        error = ((logits - right).float().norm() / right.float().norm()).item()
        if not error < (1e-2 if weight.dtype == torch.float32 else 1e-1):
            sys.exit(f"bench.py: the logits of {name} differ from longllama's by {error:.1%}")


def prefill_flops(config: FastConfig, B: int, T: int, last: int) -> float:
    """What it takes to read T tokens of which only the last one's logits are wanted; a multiply-add is 2.

    The prefix, all but the last `last` tokens, goes through the layers below the last memory layer, where it needs keys
    and values only. The others go through all layers, of which the last is counted whole. Attention inside a window is
    causal: half of the square.
    """
    C, layers, mem, below = config.hidden_size, config.num_hidden_layers, len(config.mem_layers), max(config.mem_layers)
    window, prefix, last = config.max_position_embeddings, max(T - last, 0), min(T, last)
    matrices = 2 * (4 * C * C + 3 * C * config.intermediate_size)  # of a layer, for one token
    pair = 4 * C  # one query and one key in all heads: the score, and its part of the output
    flops = prefix * (below * matrices + 2 * 2 * C * C)
    for start in range(0, prefix, window):
        w = min(window, prefix - start)
        flops += pair * w * (below * (w + 1) / 2 + (mem - 1) * start)
    flops += last * layers * matrices + pair * last * (layers * (last + 1) / 2 + mem * prefix)
    return B * (flops + 2 * C * config.vocab_size)


def decode_bytes(model: FastLlama, B: int, local: float, memory: int) -> float:
    """The least that one step of B tokens must read: weights (B rows of the embedding), local caches, and memory."""
    layers, row = model.config.num_hidden_layers, model.norm.weight.nbytes  # of the embedding, and a key: C numbers
    weights = model_bytes(model) - (0 if model.config.tie_word_embeddings else model_bytes(model.embed_tokens))
    return weights + memory + B * row * (1 + 2 * layers * local)


def model_bytes(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def timed(work: Callable, *args) -> tuple:
    """work(*args), the first of which is a tensor, and the seconds that it takes."""
    finish = torch.cuda.synchronize if args[0].is_cuda else lambda: None
    finish()
    start = time.perf_counter()
    result = work(*args)
    finish()
    return result, time.perf_counter() - start


def measure_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The fastest square matmul, torch's or `linear`, in FLOP/s; the fastest read of an array that no cache holds, in bytes/s."""

    def fastest(work: Callable, *args) -> float:
        return min(timed(work, *args)[1] for _ in range(3))

    sizes, nbytes = DEVICES[device.type]
    squares = [torch.randn(n, n, device=device).to(dtype) for n in sizes]
    array = torch.ones(nbytes // 4096 // dtype.itemsize, 4096, dtype=dtype, device=device)
    flops = max(2 * len(a) ** 3 / fastest(multiply, a, a) for a in squares for multiply in (torch.matmul, linear))
    return flops, array.nbytes / min(fastest(torch.mv, array, array[0]), fastest(torch.sum, array))


def measure(read: Callable, model: FastLlama, B: int, T: int, steps: int) -> tuple[float, float, float, int]:
    """Reads a prompt, then decodes greedily; the first step, which makes room for more, does not count.

    Seconds of the prefill, and of a step; average length of the local context; bytes of memory.
    """
    (logits, cache), prefill = timed(read, random_ids(model, B, T), None)
    times, lengths = [], []
    for _ in range(steps + 1):
        (logits, cache), seconds = timed(read, logits[:, -1].argmax(dim=-1, keepdim=True), cache)
        times.append(seconds)
        lengths.append(cache.local_length)
    return prefill, mean(times[1:]), mean(lengths[1:]), cache.memory_bytes


@torch.inference_mode()
def measure_growth(args: argparse.Namespace, T: int, name: str, mem_dtype: str) -> int:
    """Bytes taken at the most beside the weights. In a process of its own, for a process's peak never falls."""
    on_cpu = args.device.type == "cpu"
    if on_cpu and sys.platform == "linux":  # fail rather than swap
        import resource

        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model = bench_model(args)
    read, peak = reader(name, mem_dtype, model), process_peak if on_cpu else torch.cuda.max_memory_allocated
    before = peak()
    measure(read, model, args.batch, T, steps=2)
    return peak() - before


def growth_alone(*line) -> int | None:
    """`measure_growth` in a fresh process; None if it does not fit."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        future = pool.submit(measure_growth, *line)
        error = future.exception()
    return None if isinstance(error, BrokenExecutor) or out_of_memory(error) else future.result()


def row(args: argparse.Namespace, model: FastLlama, T: int, name: str, runs: list, base: list, growth: int, peaks):
    """The numbers of one line of the table; `x time`: as a multiple of the times of the runs in base."""
    (prefill, step, local, memory), (base_prefill, base_step, *_) = (map(median, zip(*x)) for x in (runs, base))
    last = T if name == "transformers" else model.config.last_context_length
    compute = prefill_flops(model.config, args.batch, T, last) / prefill
    reading = decode_bytes(model, args.batch, local, memory) / step
    cells = [f"{args.batch * T / prefill:,.0f}", f"{prefill / base_prefill:.2f}", f"{compute / peaks[0]:.0%}"]
    cells += [f"{step * 1e3:,.2f}", f"{step / base_step:.2f}", f"{reading / peaks[1]:.0%}"]
    weights = model_bytes(model)
    return cells + [f"{n / 2**20:,.1f}" for n in (weights + growth, weights, growth, memory, growth - memory)]


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mid", help="default mid")
    add("--prompt-tokens", type=parse_lengths, default="2k,16k", metavar="1k,16k,1M", help="default 2k,16k")
    add("--decode", type=number(int, 1), default=64, metavar="N", help="tokens after each prompt (default 64)")
    add("--batch", type=number(int, 1), default=1, metavar="N", help="prompts at once (default 1)")
    add("--repeats", type=number(int, 1), default=3, metavar="N", help="default 3")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add(
        "--compile",
        action="store_true",
        help="compile longllama's layers (on a CPU, growth is then mostly the compiler's)",
    )
    add(
        "--mem-dtype",
        default="bfloat16",
        metavar="D,...",
        help="one or more, for longllama; the others use the first (default bfloat16)",
    )
    add("--mem-device", choices=["cpu"], help="keep longllama's memory in main memory (on a GPU; growth is the GPU's)")
    add(
        "--compare",
        default="naive,sdpa",
        metavar="NAME,...",
        help=f"some of {', '.join(COMPARED)}, or '' for none (default naive,sdpa)",
    )
    add("--weights", choices=KINDS, help="round longllama's weights to 8 or 4 bits; without --compare")
    args = parser.parse_args()
    args.mem_dtype, args.compare = args.mem_dtype.split(","), args.compare.split(",") if args.compare else []
    for flag, items, known in ("mem-dtype", args.mem_dtype, MEM_DTYPES), ("compare", args.compare, COMPARED):
        if not set(items) <= set(known):
            parser.error(f"--{flag} must be among {', '.join(known)}, not {','.join(items)!r}")
    if args.weights and args.compare:
        parser.error("--weights are longllama's alone, and the others compute with its weights: add --compare ''")
    if "transformers" in args.compare and importlib.util.find_spec("transformers") is None:
        parser.error("--compare transformers needs that package: pip install transformers")
    with ending_well(parser):
        args.device = pick_device(args.device)
    if args.device.type not in DEVICES:
        parser.error(f"--device {args.device}: only cpu and cuda are measured")
    args.dtype = DTYPES[args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")]
    return parser, args


def device_name(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[1] if cpu else "CPU"
    return f"{name}, {torch.get_num_threads()} CPU threads"


@torch.inference_mode()
def run(args: argparse.Namespace):
    variants = [("longllama", d) for d in args.mem_dtype] + [(name, args.mem_dtype[0]) for name in args.compare]
    lines = [(T, *variant) for T in args.prompt_tokens for variant in variants]
    grown, runs, peaks = {}, defaultdict(list), []
    for line in lines:  # first, while this process is small: a child's peak begins at its parent's
        tell(f"memory: {' '.join(map(str, line))}")
        grown[line] = growth_alone(args, *line)
    if all(growth is None for growth in grown.values()):
        raise ValueError("nothing of that fits into memory: try a shorter --prompt-tokens, or a smaller --batch")
    model = bench_model(args)
    for variant in variants[len(args.mem_dtype) :]:
        check(*variant, model, reader(*variant, model))
    if args.compile:  # before anything is timed: windows with memory, and steps as often as it takes to capture them
        measure(reader(*variants[0], model), model, args.batch, 4 * model.config.max_position_embeddings, steps=4)
    for i in range(args.repeats):
        for line in [line for line in lines if grown[line] is not None]:
            tell(f"repeat {i + 1}: {' '.join(map(str, line))}")
            T, *variant = line
            peaks.append(measure_peaks(args.device, args.dtype))
            runs[line].append(measure(reader(*variant, model), model, args.batch, T, args.decode))

    peaks = [median(x) for x in zip(*peaks)]
    print(f"torch {torch.__version__}, {device_name(args.device)}, {args.dtype}")
    print(f"shape {args.shape}, weights {args.weights or args.dtype}, batch {args.batch}, medians of {args.repeats}")
    print(f"matmul peak {peaks[0] / 1e9:,.0f} GFLOP/s, read bandwidth {peaks[1] / 1e9:,.1f} GB/s\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for line in lines:
        T, name, mem_dtype = line
        base = next((runs[other] for other in lines if other[0] == T and runs[other]), None)
        cells = row(args, model, T, name, runs[line], base, grown[line], peaks) if runs[line] else ["does not fit"]
        print("|", " | ".join([f"{T:,}", name, "-" if name == "transformers" else mem_dtype, *cells]), "|")


def main():
    parser, args = arguments()
    with ending_well(parser):
        run(args)


if __name__ == "__main__":
    main()
