"""What the choices about memory cost and change, on a trained model: one Markdown table.

    python benchmarks/memory.py --mem-dtype float32,bfloat16,float16,float8_e4m3fn    # smaller
    python benchmarks/memory.py --mem-topk 4,16,64,256                                # searched
    python benchmarks/memory.py --keep-local 0,16,64,128                              # what an overflow leaves local

The first two: pass keys found in prompts of --length tokens, perplexity of the text with 64 windows in memory, the time to read a
prompt and to write a token after it, and how far the logits of the key's first token are from those with all of memory in
float32, as a share of their size. The third: perplexity of the tokens right after an overflow, by how many tokens ago that was,
and of all tokens behind the first window where the text is read as a conversation is, in turns.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import torch
import torch.nn.functional as F

from cli.flags import add_model_flags, listed, number, parse_length, parser_for, short
from cli.loading import TINY, load, pick_device
from cli.texts import read_text
from experiments.passkey import measure, share
from experiments.perplexity import perplexity, window_losses
from fast import MEM_DTYPES, FastLlama
from training.tasks import GRASS, prompt_ids

WINDOWS = 64  # of memory, for perplexity
BEFORE = 8  # windows read before an overflow
STEPS = 32  # tokens written to take the time of one
REPEATS = 3  # of all that is timed, interleaved
SINCE = (1, 4, 16, 64)  # tokens since an overflow
QUESTION, ANSWER, TURNS = 40, 60, 8  # tokens that are read at once, and one by one, and how often
COLUMNS = ["mem_dtype", "K", "bytes/token", "logit error", "perplexity"]


@torch.no_grad()
def read_and_write(model: FastLlama, ids: torch.Tensor) -> tuple[torch.Tensor, float, float, float]:
    """The logits after a prompt (1, T), seconds to read it, seconds to write a token, bytes of memory for each token."""
    start, times = time.perf_counter(), []
    logits, cache = model(ids, model.new_cache(), logits_to_keep=1)
    reading, last = time.perf_counter() - start, logits
    for _ in range(STEPS):
        start = time.perf_counter()
        last, cache = model(last[:, -1].argmax(dim=-1, keepdim=True), cache)
        times.append(time.perf_counter() - start)
    return logits.float(), reading, median(times), cache.memory_bytes / cache.memory_length


def memory_table(args: argparse.Namespace) -> list[list[str]]:
    rows = [COLUMNS + [f"pass keys, {short(args.length)}", "read, s", "ms/token"]]
    exact = ("float32", None)
    variants = [exact, *(x for x in product(args.mem_dtype, args.mem_topk) if x != exact)]
    models, runs = {}, defaultdict(list)
    for mem_dtype, mem_topk in variants:
        model, tokenizer = load(
            args.model, args.device, args.dtype, weights=args.weights, mem_dtype=mem_dtype, mem_topk=mem_topk
        )
        models[mem_dtype, mem_topk] = model
    book = tokenizer.encode(args.text, bos=False)
    fillers = {"text": book, "grass": tokenizer.encode(GRASS, bos=False)}
    prompt = prompt_ids(tokenizer, args.length, 0.3, "71428", book, torch.Generator().manual_seed(args.seed))
    found = {}
    for variant in variants:
        tell_variant("pass keys and perplexity", *variant)
        value = perplexity(window_losses(models[variant], [torch.tensor(book)], WINDOWS, WINDOWS, stride=4))
        trials = measure(models[variant], tokenizer, args.model.name, fillers, args.length, args.trials, args.seed)
        found[variant] = f"{value:.2f}", f"{100 * share(trials):.0f}% ({len(trials)})"
    for i, variant in product(range(REPEATS), variants):
        tell_variant(f"time {i + 1} of {REPEATS}", *variant)
        runs[variant].append(read_and_write(models[variant], torch.tensor([prompt], device=args.device)))
    right = runs[exact][0][0]
    for variant in variants:
        logits, reading, writing, size = zip(*runs[variant])
        error = ((logits[0] - right).norm() / right.norm()).item()
        rows.append([variant[0], str(variant[1] or "all"), f"{size[0]:,.0f}", f"{error:.1e}", *found[variant]])
        rows[-1] += [f"{median(reading):.2f}", f"{median(writing) * 1e3:.1f}"]
    return rows


def tell_variant(text: str, mem_dtype: str, mem_topk: int | None):
    tell(f"{text}: {mem_dtype}, K {mem_topk or 'all'}")


@torch.no_grad()
def losses_after_overflow(model: FastLlama, book: torch.Tensor, kept: bool) -> torch.Tensor:
    """Loss of each of the last of SINCE tokens that are read after a window was full, at many places of the book: (places, n).

    kept: the window has room for them, and nothing overflows.
    """
    window, after = model.config.max_position_embeddings, SINCE[-1]
    before = BEFORE * window
    if len(book) <= before + after:
        raise ValueError(f"--text has {len(book)} tokens, and {before + after + 1} are needed: take a longer one")
    pieces = book.unfold(0, before + after + 1, window)  # (places, before + after + 1)
    losses = []
    for ids in pieces.split(8):
        _, cache = model(ids[:, :before], last_context_length=window - after if kept else window, logits_to_keep=1)
        logits, _ = model(ids[:, before:-1], cache)
        losses.append(F.cross_entropy(logits.float().mT, ids[:, before + 1 :], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def perplexity_in_turns(model: FastLlama, book: torch.Tensor) -> float:
    """Of the book, a conversation in each row of a batch, without the first window."""
    T, cache, at, losses = TURNS * (QUESTION + ANSWER), None, 0, []
    ids = book.unfold(0, T + 1, T)
    for n in (QUESTION, *[1] * ANSWER) * TURNS:
        logits, cache = model(ids[:, at : at + n], cache)
        losses.append(F.cross_entropy(logits.float().mT, ids[:, at + 1 : at + n + 1], reduction="none"))
        at += n
    return torch.cat(losses, dim=1)[:, model.config.max_position_embeddings :].mean().exp().item()


def overflow_table(args: argparse.Namespace) -> list[list[str]]:
    starts = (0, *SINCE[:-1])
    rows = [["keep_local", *(f"tokens {a + 1} to {b}" for a, b in zip(starts, SINCE))]]
    rows[0][1:2], rows[0][len(SINCE) + 1 :] = ["token 1"], ["in turns"]
    for keep in (*args.keep_local, None):
        tell("no overflow" if keep is None else f"keep_local {keep}")
        model, tokenizer = load(args.model, args.device, args.dtype, weights=args.weights, keep_local=keep)
        book = torch.tensor(tokenizer.encode(args.text, bos=False), device=args.device)
        losses = losses_after_overflow(model, book, kept=keep is None)
        rows.append(["no overflow" if keep is None else str(keep)])
        rows[-1] += [f"{losses[:, a:b].mean().exp():.1f}" for a, b in zip(starts, SINCE)]
        rows[-1].append("-" if keep is None else f"{perplexity_in_turns(model, book):.1f}")
    tell(f"{len(losses)} places")
    return rows


def parse_dtype(text: str) -> str:
    if text not in MEM_DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not among {', '.join(MEM_DTYPES)}")
    return text


def parse_topk(text: str) -> int | None:
    if text != "all" and not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of keys nor all")
    return None if text == "all" else number(int, 1)(text)


def main():
    parser = parser_for(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--mem-dtype", type=listed(parse_dtype), default="float32", metavar="D,...", help="default float32"
    )
    parser.add_argument("--mem-topk", type=listed(parse_topk), default="all", metavar="K,...", help="such as 16,64,all")
    parser.add_argument(
        "--keep-local", type=listed(number(int, 0)), metavar="N,...", help="the table of what follows an overflow"
    )
    parser.add_argument(
        "--length", type=parse_length, default="64k", help="tokens of a prompt with a pass key (default 64k)"
    )
    parser.add_argument(
        "--trials", type=number(int, 1), default=10, help="for each filler, text and grass (default 10)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=TINY / "book.txt",
        metavar="FILE",
        help="what perplexity is of (default: the book that comes along)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same keys every time (default 0)"
    )
    args = parser.parse_args()
    with ending_well(parser):
        args.device, args.text = pick_device(args.device), read_text(args.text, "--text")
        rows = overflow_table(args) if args.keep_local else memory_table(args)
        rows.insert(1, ["---"] * len(rows[0]))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
