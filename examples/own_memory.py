"""A memory of your own: six rules for what to forget, a few lines each, and how many pass keys are found with them.

    python examples/own_memory.py --length 16k --trials 16
    python generate.py --memory examples/own_memory.py:LargestNorm --prompt-file tiny/book.txt

A rule is a subclass of `FastMemory` that overrides `choose(k, real)`. A memory layer asks it whenever tokens have moved into its
memory, and shows it the keys of all that it remembers, old and new together:

  k (B, G, S, D)      S tokens, the newest last, in float32 whatever they are stored as, for each row and each key head
  real (B, G, S, 1)   False where a token is padding; None: nowhere
  -> (B, G, n)        which of the S to keep, in any order, as many in each row and head; or None: all of them

The others are gone for good: next time `choose` sees those that it kept, and the new ones. self.blocks[0][2] (B, G, S, 1) tells
which tokens of the text they are. Values, padding, mem_dtype and forks are not its business. All programs take such a class by
--memory FILE.py:CLASS.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import add_model_flags, number, parse_length, parser_for, short
from cli.loading import TINY, load, pick_device
from cli.texts import read_text
from experiments.passkey import measure, report, share
from fast import FastMemory
from longllama import require
from training.tasks import MOST_TRIALS


def best(scores: Tensor, real: Tensor | None, n: int) -> Tensor | None:
    """What `choose` returns to keep the n tokens of the largest scores (B, G, S); padding only where there is nothing else."""
    if real is not None:
        scores = scores.masked_fill(~real[..., 0], -torch.inf)
    return scores.topk(n).indices if scores.shape[2] > n else None


def order(k: Tensor) -> Tensor:
    """0, 1, 2 ... for the tokens of k (B, G, S, D), the newest with the largest: (B, G, S)."""
    return torch.arange(k.shape[2], device=k.device).float().expand(k.shape[:3])


class Newest(FastMemory):
    """A longer window, and nothing else: what is older is forgotten, whatever it is."""

    N = 2048

    def choose(self, k, real):
        return best(order(k), real, self.N)


class Sinks(FastMemory):
    """The newest, and the first few, which attention in large models rests on (StreamingLLM, Xiao et al. 2023)."""

    FIRST, N = 4, 2048

    def choose(self, k, real):
        number = order(k) if real is None else real[..., 0].cumsum(dim=2) - 1  # padding does not count
        return best(order(k).masked_fill(number < self.FIRST, torch.inf), real, self.N)


class Every(FastMemory):
    """Every eighth token of the text, so that memory grows, but eight times as slowly. Digits do not stand so far apart."""

    STEP = 8

    def choose(self, k, real):
        token = self.blocks[0][2][0, 0, :, 0]  # (S,): this rule keeps the same in all rows and heads
        return (token % self.STEP == 0).nonzero().flatten().expand(*k.shape[:2], -1)


class Sample(FastMemory):
    """N tokens drawn from all of the text, each as likely as any other: each draws a number once, and the largest stay."""

    N = 2048

    def choose(self, k, real):
        token = self.blocks[0][2][..., 0].double()  # (B, G, S); what it draws depends on its place alone
        return best((token * 78.233).sin() * 43758.5453 % 1, real, self.N)


class LargestNorm(FastMemory):
    """The longest keys: the tiny model makes those long that will be asked for. (Large models may do the opposite, and then it
    is the shortest that are worth keeping: Devoto et al. 2024.)"""

    N = 2048

    def choose(self, k, real):
        return best(k.norm(dim=3), real, self.N)


class LargestNorm512(LargestNorm):
    N = 512


class LargestNorm128(LargestNorm):
    N = 128


class Unlike(FastMemory):
    """The keys least like all others: those at the largest angle to the mean key (KeyDiff, Park et al. 2025)."""

    N = 2048

    def choose(self, k, real):
        mean = (k if real is None else k.where(real, torch.nan)).nanmean(dim=2, keepdim=True)
        return best(-F.cosine_similarity(k, mean, dim=3), real, self.N)


class Unlike512(Unlike):
    N = 512


class Unlike128(Unlike):
    N = 128


# ---------------------------------------------------------------------------------------------------------- Program

RULES = (
    FastMemory,
    Newest,
    Sinks,
    Every,
    Sample,
    LargestNorm,
    LargestNorm512,
    LargestNorm128,
    Unlike,
    Unlike512,
    Unlike128,
)


def row(args: argparse.Namespace, rule: type[FastMemory]) -> list[str]:
    """Of the table, for one rule."""
    model, tokenizer = load(args.model, pick_device(args.device), args.dtype, weights=args.weights)
    require(bool(model.config.mem_layers), f"{args.model} has no mem_layers, so there is nothing to forget")
    model.use_memory(rule)
    filler = tokenizer.encode(read_text(TINY / "book.txt"), bos=False)
    name, started = "all" if rule is FastMemory else rule.__name__, time.perf_counter()
    trials = measure(model, tokenizer, args.model.name, {"text": filler}, args.length, args.trials, args.seed)
    report(name, trials, started)
    with torch.no_grad():
        _, cache = model(
            torch.ones(1, args.length, dtype=torch.long, device=model.norm.weight.device), logits_to_keep=1
        )
    blocks = cache.layers[model.config.mem_layers[0]].memory.blocks
    kept = sum(block[0].shape[2] for block in blocks)
    return [name, f"{kept:,}", f"{100 * share(trials):.0f}%"]


def main():
    parser = parser_for(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--length", type=parse_length, default=1 << 14, help="of a prompt, in tokens (default 16k)")
    add(
        "--trials", type=number(int, 1, MOST_TRIALS), default=16, metavar="N", help="prompts for each rule (default 16)"
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same keys every time (default 0)")
    args = parser.parse_args()
    with ending_well(parser):
        rows = [["rule", "tokens kept", f"pass keys in {short(args.length)}"], ["---"] * 3]
        for rule in RULES:
            rows.append(row(args, rule))
            print("\n".join(f"| {' | '.join(cells)} |" for cells in rows), flush=True)
            rows = []  # the header came with the first row


if __name__ == "__main__":
    main()
