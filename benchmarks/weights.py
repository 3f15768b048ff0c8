"""What weights of 8 and 4 bits cost and save, on one model: bytes, time, and how far logits and perplexity are from the model's.

    python benchmarks/weights.py                                                       # the tiny model, of float32
    python benchmarks/weights.py --model DIR --dtype bfloat16 --text FILE --tokens 8k
    python benchmarks/weights.py --shape 3b --layers 4 --dtype bfloat16 --prompt-tokens 512,4k --repeats 5 --compare torchao

--shape is of random weights, for times at a real size; all but the head's scale with the layers. Repeats are interleaved, and
times are medians.
torchao rounds to int8, too, by Int8WeightOnlyConfig; without a compiler it makes the whole matrix in 16 bits for every product.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import SHAPES, device_name, model_bytes, random_ids, random_model
from benchmarks.bench import timed as timed_by_the_clock
from cli.flags import number, parse_length, parse_lengths, parser_for
from cli.loading import DTYPES, TINY, load, pick_device
from cli.texts import read_text
from fast import FastLlama
from fast.files import as_weights
from fast.quantised import KINDS, quantised_weights

LOST = ("logits differ by", "same likeliest id", "perplexity")


def rounded(model: FastLlama, kind: str) -> FastLlama:
    """The model with weights of that kind."""
    with torch.device("meta"):
        made = FastLlama(replace(model.config, weight_dtype=kind))
    made = made.to(model.norm.weight.dtype).to_empty(device=model.norm.weight.device).eval()
    made.take(quantised_weights(as_weights(model.hf_tensors()), kind))
    return made


def by_torchao(model: FastLlama) -> FastLlama:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("--compare torchao needs that package: pip install torchao") from None
    with torch.device("meta"):
        made = FastLlama(model.config)
    made = made.to(model.norm.weight.dtype).to_empty(device=model.norm.weight.device).eval()
    made.take(as_weights(model.hf_tensors()))
    quantize_(made, Int8WeightOnlyConfig())
    return made


def stored_bytes(model: FastLlama) -> int:
    """As `model_bytes`, but for torchao's tensors, which pretend to be in 16 or 32 bits."""
    wrapped = [p for p in model.parameters() if hasattr(p, "__tensor_flatten__")]
    inner = sum(getattr(p, name).nbytes for p in wrapped for name in p.__tensor_flatten__()[0])
    return model_bytes(model) - sum(p.nbytes for p in wrapped) + inner


def variants(args: argparse.Namespace, model: FastLlama) -> dict[str, FastLlama]:
    made = {str(model.norm.weight.dtype).removeprefix("torch."): model} | {kind: rounded(model, kind) for kind in KINDS}
    return made | ({"torchao int8": by_torchao(model)} if args.compare else {})


@torch.inference_mode()
def logits_of(model: FastLlama, ids: Tensor, piece: int) -> Tensor:
    """Of ids (1, T), read in pieces of so many, as a text is (T) or as it is written (1): (T, V)."""
    cache, parts = None, []
    for part in ids.split(piece, dim=1):
        logits, cache = model(part, cache)
        parts.append(logits[0].float())
    return torch.cat(parts)


def lost(right: Tensor, logits: Tensor, ids: Tensor) -> list[str]:
    """LOST of logits (T, V) beside the model's, for ids (1, T)."""
    same = (logits.argmax(dim=-1) == right.argmax(dim=-1)).double().mean()
    perplexity = F.cross_entropy(logits[:-1], ids[0, 1:]).exp()
    return [f"{(logits - right).norm() / right.norm():.2%}", f"{same:.1%}", f"{perplexity:.3f}"]


def timed(work: Callable, *args) -> tuple:
    """work(*args), and seconds: a thread that is alone gets those of its processor, whoever else uses that."""
    if args[0].device.type != "cpu" or torch.get_num_threads() > 1:
        return timed_by_the_clock(work, *args)
    start = time.process_time()
    return work(*args), time.process_time() - start


def times(read: Callable, lengths: list[int], steps: int, ids: Tensor) -> list[float]:
    """Seconds of a step after the first prompt, of `steps` in a row, and of reading each prompt."""
    with torch.inference_mode():
        took = []
        for i, T in enumerate(lengths):
            (logits, cache), seconds = timed(read, ids[:, :T], None)
            took.append(seconds)
            for _ in range(steps + 1 if i == 0 else 0):  # the first one makes room for more
                (logits, cache), seconds = timed(read, logits[:, -1].argmax(dim=-1, keepdim=True), cache)
                took.insert(0, seconds)
        return [median(took[:steps]), *took[-len(lengths) :]]


def run(args: argparse.Namespace):
    torch.manual_seed(0)
    if args.shape:
        layers = {"num_hidden_layers": args.layers, "mem_layers": (args.layers // 2,)} if args.layers else {}
        models = variants(args, random_model(args.shape, args.device, DTYPES[args.dtype], **layers))
    else:
        model, tokenizer = load(args.model, args.device, args.dtype)
        models = variants(args, model)
    name, whole = next(iter(models.items()))
    ids = random_ids(whole, 1, max(args.prompt_tokens))
    taken = {name: [] for name in models}
    for i in range(args.repeats):
        for name, model in models.items():
            tell(f"repeat {i + 1}: {name}")
            read = lambda ids, cache, model=model: model(ids, cache, logits_to_keep=1)  # noqa: E731
            taken[name].append(times(read, args.prompt_tokens, args.decode, ids))
    rows = {name: [f"{stored_bytes(model) / 2**20:,.1f}"] for name, model in models.items()}
    for name in models:
        for took, first in zip(zip(*taken[name]), zip(*next(iter(taken.values())))):
            rows[name].append(f"{median(took) * 1e3:,.1f} ({median(took) / median(first):.2f}x)")
    columns = ["weights", "MiB", "ms a token", *(f"ms for {T:,} tokens" for T in args.prompt_tokens)]
    if not args.shape:
        text = torch.tensor([tokenizer.encode(read_text(args.text, "--text"))[: args.tokens]], device=args.device)
        for piece, told in ((text.shape[1], "read"), (1, "written")):
            right = logits_of(whole, text, piece)
            for name, model in models.items():
                rows[name] += lost(right, logits_of(model, text, piece), text)
            columns += [f"{told}: {column}" for column in LOST]
    print(f"torch {torch.__version__}, {device_name(args.device)}, medians of {args.repeats}\n")
    lines = [columns, ["---"] * len(columns), *([name, *row] for name, row in rows.items())]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def main():
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=TINY, metavar="DIR", help="default: the tiny model that comes along")
    add("--shape", choices=SHAPES, help="a random model of this shape instead, whose times alone are of use")
    add("--layers", type=number(int, 1), metavar="N", help="with --shape: of so many layers")
    add("--device", default="cpu", help="default cpu")
    add("--dtype", choices=DTYPES, default="float32", help="of the model, and of what weights are multiplied with")
    add("--prompt-tokens", type=parse_lengths, default="512,4k", metavar="512,4k", help="default 512,4k")
    add("--decode", type=number(int, 1), default=16, metavar="N", help="tokens after the first prompt (default 16)")
    add("--repeats", type=number(int, 1), default=3, metavar="N", help="default 3")
    add("--text", type=Path, default=TINY / "book.txt", metavar="FILE", help="default: the book that comes along")
    add("--tokens", type=parse_length, default="2k", metavar="N", help="of the text (default 2k)")
    add("--compare", choices=["torchao"], help="its int8, beside ours")
    args = parser.parse_args()
    with ending_well(parser):
        args.device = pick_device(args.device)
        run(args)


if __name__ == "__main__":
    main()
