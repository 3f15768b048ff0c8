"""Continues a text with a LongLLaMA model: `python generate.py --prompt "..."`, or `--prompt-file book.txt`.

The continuation, and nothing else, goes to standard output. Warnings, progress and statistics go to standard error.
"""

import argparse
import json
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict
from functools import lru_cache, partial
from hashlib import sha256
from itertools import count, takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convert import DTYPES, as_weights, ending_well, first_line, write_safetensors
from longllama import (
    MEM_DTYPES,
    Attended,
    Block,
    Cache,
    LocalCache,
    LongLlama,
    Memory,
    attend,
    merge,
    split_into_windows,
)
from tokenizer import StreamDecoder, Tokenizer

TINY = Path(__file__).resolve().parent / "tiny"
# What may change between a saved memory and the model that goes on from it.
FREE_SETTINGS = ("last_context_length", "mem_attention_grouping", "mem_topk", "mem_device", "keep_local")


def number(kind: type, low: float, high: float = float("inf"), above: bool = False):
    """An argparse type: a number from low (or, with above, from just above it) to high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {low}"
                + f" and at most {high}" * (high < float("inf"))
            )
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def listed(parse: Callable) -> Callable:
    """An argparse type: several of another type, with commas between them."""

    def parse_list(text: str) -> list:
        return [parse(part) for part in text.split(",")]

    parse_list.__name__ = f"list of {parse.__name__}s"
    return parse_list


def add_prompt_flags(parser: argparse.ArgumentParser):
    """--prompt or --prompt-file, for `read_prompt`."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="'-' is standard input")


def add_model_flags(parser: argparse.ArgumentParser, several: bool = False):
    """--model, --device and --dtype, for `pick_device` and `load`. several: of models."""
    add, default, nargs = parser.add_argument, [TINY] if several else TINY, "+" if several else None
    add(
        "--model",
        type=Path,
        nargs=nargs,
        default=default,
        metavar="DIR",
        help="default: the tiny model that comes along",
    )
    add("--device", default="auto", help="auto (cuda, mps or cpu, the first there is), or a torch device")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, float32 on the CPU")


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    add_prompt_flags(parser)
    add_model_flags(parser)
    parser.add_argument("--max-new-tokens", type=number(int, 0), default=100, metavar="N", help="default 100")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.8, metavar="X", help="0: always the likeliest (default 0.8)"
    )
    parser.add_argument("--top-k", type=number(int, 1), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=number(float, 0, 1, above=True), metavar="P", help="draw from the likeliest of probability P"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="draw the same tokens every time")
    parser.add_argument(
        "--last-context-length",
        type=number(int, 1),
        metavar="N",
        help="this many tokens at the prompt's end stay local",
    )
    parser.add_argument(
        "--mem-dtype", choices=MEM_DTYPES, help="what memory is stored as (default: what config.json says)"
    )
    parser.add_argument("--mem-attention-grouping", type=number(int, 1), nargs=2, metavar=("H", "Q"),
                        help="attend to memory with at most H heads x Q queries at once: less memory, more time")  # fmt: skip
    parser.add_argument(
        "--mem-device", choices=["cpu"], help="keep memory in main memory, and stream it to the GPU: longer prompts fit"
    )
    parser.add_argument(
        "--mem-topk", type=number(int, 1), metavar="K", help="attend to each query's K best tokens of memory only"
    )
    parser.add_argument(
        "--keep-local",
        type=number(int, 0),
        metavar="N",
        help="when the window is full, its newest N tokens stay local (default 0)",
    )
    parser.add_argument("--save-memory", type=Path, metavar="FILE", help="write what the prompt left in memory")
    parser.add_argument("--load-memory", type=Path, metavar="FILE", help="continue what --save-memory wrote")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers as they are first used: for GPUs and long texts"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, statistics or warnings")
    return parser, parser.parse_args()


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        made = torch.zeros(1, device=name)
        made.item()  # which "meta" refuses
        return made.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"--device {name} is none that torch can use here: auto takes the best there is") from None


def check_new_file(flag: str, path: Path):
    """Refuses, before the work begins, a path that its result could not be written to."""
    if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: name a file, not a folder or device, in a folder that exists")


def decode_utf8(data: bytes, name: str) -> str:
    """The text, without the mark that some editors begin a file with. Raises ValueError, with the name of where it is from."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from None


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # how Python keeps other bytes
            raise ValueError("--prompt is not UTF-8 text: convert it first")
        return args.prompt
    if args.prompt_file == "-" and sys.stdin is None:
        raise ValueError("--prompt-file -: standard input is closed")
    try:
        data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    return decode_utf8(data, f"--prompt-file {args.prompt_file}")


def load(folder: Path, device: torch.device, dtype: str = "auto", **overrides) -> tuple[LongLlama, Tokenizer]:
    """The model and the tokenizer in a folder. Raises OSError or ValueError."""
    for name in ("config.json", "tokenizer.model"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--model {folder} has no {name}: name a folder made by convert.py, or a download")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    dtype = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = LongLlama.from_pretrained(folder, device, dtype, **{k: v for k, v in overrides.items() if v is not None})
    check_vocabulary(folder, tokenizer, model)
    return model, tokenizer


def check_vocabulary(where: Path, tokenizer: Tokenizer, model: LongLlama):
    """Raises ValueError where the tokenizer, from `where`, has ids that the model has not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}: "
            "they do not belong together"
        )


def settings(model: LongLlama) -> dict:
    """What a saved memory must have been made with to be of use: the config, the dtype, and some of every weight, hashed."""
    digest = sha256()
    for name, tensor in model.hf_tensors().items():
        some = tensor.flatten()[:: -(-tensor.numel() // 256)].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    config = json.loads(json.dumps(asdict(model.config)))
    made_by = {"dtype": str(model.norm.weight.dtype).removeprefix("torch."), "weights": digest.hexdigest()[:16]}
    return {name: value for name, value in config.items() if name not in FREE_SETTINGS} | made_by


def save_memory(path: Path, cache: Cache, model: LongLlama):
    """Writes all that the cache knows to a safetensors file, whole or not at all. Raises OSError.

    Layer i has the tensors "i.local.j", keys, values and, with a memory, unrotated keys; "i.memory.k.b" and "i.memory.v.b" of
    block b; and, of float8, "i.memory.scale.j". "real" tells padding. Shapes are those of LocalCache, Memory and Cache.
    """
    tensors = {} if cache.real is None else {"real": cache.real}
    for i, layer in enumerate(cache.layers):
        groups = {f"{i}.local": layer.filled()}
        if layer.memory is not None and layer.memory.blocks:
            keys, values = zip(*layer.memory.blocks)
            groups |= {f"{i}.memory.k": keys, f"{i}.memory.v": values, f"{i}.memory.scale": layer.memory.scales}
        tensors |= {f"{group}.{j}": x for group, xs in groups.items() for j, x in enumerate(xs)}
    lengths = {"local_length": cache.local_length, "memory_length": cache.memory_length}
    write_safetensors(path, as_weights(tensors), {"longllama": json.dumps(settings(model) | lengths)})


def load_memory(path: Path, model: LongLlama, new_memory: Callable = Memory) -> Cache:
    """A cache that goes on from what `save_memory` wrote as if there had been no stop.

    On the CPU, memory is mapped from the file, and read when it is used. new_memory: see Cache. Raises OSError or ValueError:
    for a broken file, another model, or settings that made another memory.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: it should be a saved memory")
    try:
        with safe_open(path, framework="pt") as file:
            made_with = json.loads((file.metadata() or {}).get("longllama", "{}"))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no saved memory, or a broken one: {first_line(error)}") from None
    if not isinstance(made_with, dict) or "weights" not in made_with:
        raise ValueError(f"{path} is no saved memory")
    for name, value in settings(model).items():
        if made_with.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {made_with.get(name)}, and this is {value}: use the same model, "
                "--dtype and --mem-dtype, or read the prompt again"
            )
    cache, device = Cache(model.config, new_memory), model.norm.weight.device
    cache.local_length, cache.memory_length = (made_with.get(name) for name in ("local_length", "memory_length"))
    cache.batch_size = next((x.shape[0] for x in tensors.values() if x.dim()), None)
    cache.real = tensors["real"].to(device) if "real" in tensors else None

    def numbered(group: str, device: torch.device) -> list[Tensor]:
        names = takewhile(tensors.__contains__, (f"{group}.{j}" for j in count()))
        pinned = device.type == "cpu" and model.norm.weight.is_cuda  # see `Memory`
        return [tensors[name].pin_memory() if pinned else tensors[name].to(device) for name in names]

    for i, layer in enumerate(cache.layers):
        layer.tensors, layer.length, memory = numbered(f"{i}.local", device), cache.local_length, layer.memory
        if memory is not None:
            kept = memory.device or device
            memory.blocks = list(zip(numbered(f"{i}.memory.k", kept), numbered(f"{i}.memory.v", kept)))
            memory.scales, memory.length = numbered(f"{i}.memory.scale", device), cache.memory_length
    if not is_whole(cache, model):
        raise ValueError(
            f"{path} is broken, or was changed: its tensors are not those of such a memory; read the prompt again"
        )
    return cache


def is_whole(cache: Cache, model: LongLlama) -> bool:
    """Whether a cache's tensors are such as this model makes, and as many as its lengths say."""
    local, remembered, B = cache.local_length, cache.memory_length, cache.batch_size
    groups, D = model.config.num_key_value_heads, model.config.head_dim

    def fits(x: Tensor, tokens: int, dtype: torch.dtype) -> bool:
        return x.dtype == dtype and x.shape == (B, groups, tokens, -(-D // 8) * 8)  # as `store` pads

    if not all(type(n) is int and n >= 0 for n in (local, remembered)):
        return False
    whole = True
    for layer in cache.layers:
        memory, kinds = layer.memory, 0 if local == 0 else 2 if layer.memory is None else 3
        whole &= len(layer.tensors) == kinds and all(fits(x, local, model.norm.weight.dtype) for x in layer.tensors)
        if memory is not None:
            sizes = [k.shape[2] if k.dim() == 4 else -1 for k, _ in memory.blocks]
            whole &= all(fits(x, n, memory.dtype) for block, n in zip(memory.blocks, sizes) for x in block)
            whole &= sum(sizes) == remembered
            whole &= len(memory.scales) == (2 if sizes and memory.dtype == torch.float8_e4m3fn else 0)
            whole &= all(scale.shape == (B, groups, 1, 1) for scale in memory.scales)
    if cache.real is not None:
        whole &= cache.real.dtype == torch.bool and cache.real.shape == (B, 1, remembered + local, 1)
    return whole


def warnings(args: argparse.Namespace, prompt: str, T: int, model: LongLlama, cache: Cache) -> Iterator[str]:
    """What may surprise about a prompt of T tokens that is read after what the cache holds."""
    config, new = model.config, args.max_new_tokens
    if prompt.lstrip().startswith("<s>"):
        yield "the prompt begins with the text <s>; the bos token is added without it, so leave it out"
    start, stop, keep = split_into_windows(T, config.last_context_length, cache, config)[-1]
    window, local = config.max_position_embeddings, keep + stop - start
    if config.mem_layers and not config.keep_local and local + new > window:
        fits = f"--last-context-length {window - new} avoids it"
        if cache.local_length or new >= window:
            fits = f"at most {max(window - local, 1)} new tokens avoid it"
        yield (
            f"a local context of {local} and {new} new tokens exceed the window of {window}: once it is full, layers "
            f"without memory start again with almost no context; {fits}, --keep-local {window // 4} softens it"
        )


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


# ------------------------------------------------------------------------------------------------- Compiled, captured
#
# A step of one token is hundreds of small operations, and a GPU would wait for the launch of each. So layers are compiled, which
# fuses them, and a whole step is captured as one CUDA graph. That does the very same again, in the same places in memory. What
# differs from step to step, the token and the length of the local context, has to be in tensors then.


def compile_layers(model: LongLlama):
    """Compiles the layers as they are first used, once for all of them; on a GPU, `Steps` then reads single tokens."""
    torch._dynamo.config.recompile_limit = 64  # batch sizes, dtypes, with and without memory: each is compiled once

    def compiled(part: Callable) -> Callable:
        step, many = compile_step(part), torch.compile(part, dynamic=True)
        return lambda module, x, *args: (step if x.shape[1] == 1 else many)(module, x, *args)

    project, update, logits = map(compiled, (Block.project, Block.update, LongLlama.logits))
    for layer in model.layers:
        layer.project, layer.update = partial(project, layer), partial(update, layer)
    model.logits = partial(logits, model)
    if model.norm.weight.is_cuda:
        model.forward = Steps(model, compile_step(join), compile_step(merge))


def compile_step(part: Callable) -> Callable:
    """For one token, whose shapes never change: products of a matrix and a vector, which take most of its time on a GPU, are
    worth a search for the best kernel. They get their vector ready-made, not computed anew for each row (where that takes more
    than 9 operations: a norm, SwiGLU), and since Hopper a kernel is launched before the one ahead of it is done."""
    gpu = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 9, "triton.enable_pdl": True}
    return torch.compile(part, dynamic=False, options=gpu)


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

    def __init__(self, context: LocalCache, join: Callable, merge: Callable):
        vars(self).update(vars(context))  # the same tensors, to be written into, and the same memory
        self.join, self.merge = join, merge
        if self.memory is not None:
            self.memory = copy(self.memory)
            self.memory.merge = merge

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, real: None) -> Tensor:
        attended = self.join(q, [k, v] if self.memory is None else [k, v, unrotated], self.tensors, self.length)
        if self.memory is not None and self.memory.length:
            attended = self.merge(self.memory.attend(q, real), attended)
        return attended[0]


class Steps:
    """`LongLlama.forward` that reads a single token by replaying a CUDA graph of the whole model.

    The graph is captured anew where a cache's tensors are others than those before: after the window overflowed, say. What it
    cannot do goes the usual way: other numbers of tokens, an overflow, padding, memory in main memory, caches of another kind.
    There is one graph, so one step at a time, and weights have to stay where they are.
    """

    def __init__(self, model: LongLlama, join: Callable = join, merge: Callable = merge):
        """join, merge: those functions, or compiled ones."""
        self.model, self.uncaptured, self.join, self.merge = model, model.forward, join, merge
        self.places: list[weakref.ref] = []  # the local contexts that the graph reads and writes; a cache may drop them
        self.replay = self.logits = None  # see `prepare`

    def __call__(
        self, input_ids: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None, *args, **kwargs
    ):
        if attention_mask is not None or cache is None or not self.can_replay(input_ids, cache):
            return self.uncaptured(input_ids, cache, attention_mask, *args, **kwargs)
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
        memories = [layer.memory for layer in cache.layers if layer.memory]
        known = all(type(layer) is LocalCache for layer in cache.layers) and all(type(x) is Memory for x in memories)
        resident = all(memory.device is None for memory in memories)
        return input_ids.shape == (B, 1) and cache.local_length < capacity and known and resident

    def prepare(self, input_ids: Tensor, cache: Cache):
        """Makes `replay`, which reads `input_ids` as the token at position `start`, and writes its `logits`."""
        with torch.inference_mode(False):  # or they could not be written into once that mode is over
            self.input_ids, self.start = input_ids.clone(), torch.tensor([cache.local_length], device=input_ids.device)
        twin = copy(cache)
        twin.layers = [StepContext(layer, self.join, self.merge) for layer in cache.layers]
        for layer in twin.layers:
            for tensor in layer.tensors:
                tensor[:, :, cache.local_length :] = 0  # no NaN, which would be attended to in spite of being padding

        def step():
            twin.local_length = self.start.clone()  # `read` adds 1 to it, in place, and so to each layer's length
            for layer in twin.layers:
                layer.length = twin.local_length
            self.logits = self.model.logits(self.model.read(self.input_ids, twin, only_remember=False))

        self.replay = captured(step, input_ids.device)


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


# ------------------------------------------------------------------------------------------------------------ Program


def run(args: argparse.Namespace):
    device = pick_device(args.device)
    if args.save_memory:
        check_new_file("--save-memory", args.save_memory)
    prompt = read_prompt(args)
    if args.load_memory and not prompt:
        raise ValueError("--load-memory goes on from a text that was read: the prompt must not be empty")
    config = {name: getattr(args, name) for name in (*FREE_SETTINGS, "mem_dtype")}
    model, tokenizer = load(args.model, device, args.dtype, **config)
    if args.compile:
        compile_layers(model)
    cache = load_memory(args.load_memory, model) if args.load_memory else Cache(model.config)
    ids = torch.tensor([tokenizer.encode(prompt, bos=not args.load_memory)], dtype=torch.long, device=device)
    T, decoder, new = ids.shape[1], StreamDecoder(tokenizer, continues=bool(prompt)), 0
    if not args.quiet:
        for warning in warnings(args, prompt, T, model, cache):
            print(f"generate.py: warning: {warning}", file=sys.stderr)
    progress = Progress(model, T, shown=not args.quiet and sys.stderr.isatty())
    times = [time.perf_counter()]
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    most = max(args.max_new_tokens, 1) if args.save_memory else args.max_new_tokens  # the first comes when all is read
    try:
        for token in model.generate(ids, most, cache=cache, **sampling):
            token = token.item()
            times.append(time.perf_counter())
            if new == 0:
                progress.close()
                if args.save_memory:  # the cache holds the prompt and not yet this token
                    save_memory(args.save_memory, cache, model)
            if new == args.max_new_tokens:
                break
            new += 1
            print(decoder.feed(token), end="", flush=True)
    finally:  # after Ctrl-C too
        progress.close()
        if new:
            print(decoder.flush(), flush=True)
        if len(times) > 1 and not args.quiet:
            print(statistics(cache, progress, T, times, device), file=sys.stderr)


def main():
    parser, args = arguments()
    with ending_well(parser):
        run(args)


if __name__ == "__main__":
    main()
