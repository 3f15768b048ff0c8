"""Dictionary lookup (the paper's section 5.2, figure 10, and appendix F): how large a dictionary a model finds its way in.

    python experiments/dictionary.py --picture dictionary.png              # of models that are not there, trains them first
    python experiments/dictionary.py --models my_dictionary --seeds 0 1 2  # all of them

A document is a window of records, `<k> k1 k2 k3 k4 <v> v1 v2`, all of random symbols, and a window of questions,
`<q> k1 k2 k3 k4 <v> v1 v2`, one for each record. The loss is on the values of questions. Of the records the local context of
questions has nothing: the memory layer must find them. Each seed makes three models, from one way in, which begins with few
records and no negatives, on as many documents in as many steps:

* d = 1: a window of questions sees its own document's records, and nothing else.
* d = 64: it also sees up to 63 windows of other documents, whose keys must be told from its own.
* plain: no memory. LLaMA with a context of a whole document, 512 tokens.

Then a dictionary of 512 tokens or more is read, and records from all over it are asked for. An answer counts if all its values
are right. The plain model has all of the dictionary in its context, however large.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import check_new_folder, new_path, number, parse_lengths, parser_for, short
from cli.picture import import_pyplot, save_picture
from convert import save_pretrained
from experiments.output import add_output_flags, check_outputs, save_table
from fast import FastConfig, FastLlama
from longllama import require

SYMBOLS, KEY, VALUE = 64, 4, 2  # of a key and of a value: symbols
K, V, Q = range(SYMBOLS, SYMBOLS + 3)  # the ids of <k>, <v>, <q>
RECORD = KEY + VALUE + 2  # tokens
WINDOW = 256
MODELS = Path(__file__).resolve().parent / "dictionary"
LENGTHS = [512, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20]
LONG = [1 << 22, 1 << 24]
PLAIN_MOST = 1 << 14  # tokens: without memory, reading takes the square of them
ASKED = 256  # records of each dictionary
LEARNING_RATE, WARMUP, CLIP = 2e-3, 100, 1.0


@dataclass(frozen=True)
class Stage:
    """Batches of documents of so many records, whose questions see d windows, for so many steps, or until this share of answers
    is right. symbols: that many are in one place of all keys of a batch: the fewer, the more alike keys are."""

    documents: int
    records: int
    d: int
    steps: int
    right: float = 2.0  # which no share is
    symbols: int = SYMBOLS


# The way in: first few records, so that it is easy to see what an answer depends on, in the end a full window of them.
FIRST = [
    Stage(128, 2, 1, 1000, 0.95),
    Stage(64, 4, 1, 1000, 0.95),
    Stage(32, 8, 1, 1000, 0.95),
    Stage(16, 16, 1, 1000, 0.95),
    Stage(16, 32, 1, 1000, 0.98),
]
# Then keys that are as hard to tell apart as those of a million tokens: many have three of four symbols in common.
THEN = [Stage(16, 32, 8, 100, symbols=8), Stage(16, 32, 32, 100, symbols=8), Stage(32, 32, 64, 300, symbols=8)]
KINDS = {"d = 1": 1, "d = 64": 64, "plain": 0}  # and the largest d of each


def new_model(plain: bool) -> FastLlama:
    return FastLlama(
        FastConfig(
            vocab_size=SYMBOLS + 3,
            hidden_size=192,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=2 * WINDOW if plain else WINDOW,
            mem_layers=() if plain else (2,),
        )
    )


def draw(rng: np.random.Generator, n: int, symbols: int = SYMBOLS) -> tuple[Tensor, Tensor]:
    """n different keys (n, KEY), and values for them (n, VALUE). symbols: in one place of all keys."""
    numbers = rng.choice(symbols**KEY, n, replace=False)
    digits = numbers[:, None] // symbols ** np.arange(KEY) % symbols
    names = rng.permuted(np.tile(np.arange(SYMBOLS), (KEY, 1)), axis=1)
    keys = np.take_along_axis(names.T, digits, axis=0)
    return torch.from_numpy(keys), torch.from_numpy(rng.integers(SYMBOLS, size=(n, VALUE)))


def spell(first: int, keys: Tensor, values: Tensor) -> Tensor:
    """Records, or questions: first (K or Q), keys (..., n, KEY), values (..., n, VALUE) -> ids (..., n * RECORD)."""
    one = keys.new_ones(*keys.shape[:-1], 1)
    return torch.cat((first * one, keys, V * one, values), dim=-1).flatten(-2)


def of_values(logits: Tensor) -> Tensor:
    """Of logits of questions (B, n * RECORD, vocab) those that say values, (B, n, VALUE, vocab)."""
    return logits.unflatten(1, (-1, RECORD))[:, :, KEY + 1 : -1]


def train_step(model: FastLlama, stage: Stage, d: int, rng: np.random.Generator) -> tuple[Tensor, float]:
    """The loss, and the share of answers that are right. d: 0 for a plain model."""
    B, n = stage.documents, stage.records
    keys, values = (x.unflatten(0, (B, n)) for x in draw(rng, B * n, stage.symbols))  # no key is in two documents
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)).unsqueeze(-1)
    asked = [x.take_along_dim(order, dim=1) for x in (keys, values)]
    ids = torch.stack((spell(K, keys, values), spell(Q, *asked)), dim=1)  # (B, 2, T)
    with torch.autocast("cpu", torch.bfloat16):
        if d:
            extra = [min(i, d) * (i % 2) for i in range(2 * B)]
            logits = model.forward_cross_batch(ids.flatten(0, 1), extra)[1::2]
        else:
            logits = model.forward_cross_batch(ids.flatten(1), [0] * B)[:, n * RECORD :]
    logits = of_values(logits.float())
    right = (logits.argmax(dim=-1) == asked[1]).all(dim=-1).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 2), asked[1].flatten()), right


def train(model: FastLlama, stages: list[Stage], most: int, rng: np.random.Generator, name: str, decay: bool):
    """most: d at the most. decay: the learning rate falls to 0 in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    step, steps, started = 0, sum(stage.steps for stage in stages), time.monotonic()
    for stage in stages:
        d, right = min(stage.d, most), 0.0
        for _ in range(stage.steps):
            rate = LEARNING_RATE * min((step + 1) / WARMUP, 1.0) * (1 - step / steps if decay else 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, share = train_step(model, stage, d, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step, right = step + 1, 0.95 * right + 0.05 * share
            if step % 50 == 0 or right >= stage.right:
                minutes = (time.monotonic() - started) / 60
                tell(f"{name}: step {step}, {stage.records} records, d {d}: {right:.0%} right, {minutes:.1f} min")
            if right >= stage.right:
                break


def home(folder: Path, seed: int, kind: str) -> Path:
    return folder / f"seed{seed}" / kind.replace(" = ", "")


def make(folder: Path, seed: int):
    """Trains the three models of a seed, and writes those that are not there."""
    start = None
    for kind, most in KINDS.items():
        if home(folder, seed, kind).exists():
            continue
        if start is None:
            torch.manual_seed(seed)
            start = new_model(plain=False)
            train(start, FIRST, 1, np.random.default_rng(seed), f"seed {seed}, the way in", decay=False)
        model = new_model(plain=most == 0)
        model.load_state_dict(start.state_dict())  # memory has no weights of its own
        train(model, THEN, most, np.random.default_rng((seed, 1)), f"seed {seed}, {kind}", decay=True)
        save_pretrained(model.to(torch.bfloat16), home(folder, seed, kind))


@torch.no_grad()
def ask(model: FastLlama, tokens: int, seed: int) -> float:
    """Reads a dictionary of so many tokens, and asks for ASKED of its records: the share of answers that are right."""
    rng, window = np.random.default_rng(seed), model.config.max_position_embeddings
    keys, values = draw(rng, tokens // RECORD)
    _, cache = model(spell(K, keys, values)[None], last_context_length=window, logits_to_keep=1)
    asked = torch.from_numpy(rng.integers(len(keys), size=(ASKED * RECORD // WINDOW, WINDOW // RECORD)))
    right = 0
    # With a memory, the last window of records moves there as questions come: together they exceed the window.
    for some in asked:
        logits, _ = model(spell(Q, keys[some], values[some])[None], cache.fork(), last_context_length=window)
        right += (of_values(logits)[0].argmax(dim=-1) == values[some]).all(dim=-1).sum().item()
    return right / asked.numel()


# Kind of model -> tokens of the dictionary -> the share that is right, for each seed.
Results = dict[str, dict[int, list[float]]]


def table(results: Results) -> str:
    """Markdown: the mean over seeds, and from which share to which they lie."""
    lengths = sorted({tokens for row in results.values() for tokens in row})
    lines = ["| | " + " | ".join(map(short, lengths)) + " |", "| --- " * (len(lengths) + 1) + "|"]

    def cell(shares: list[float]) -> str:
        mean = f"{sum(shares) / len(shares):.1%}"
        return mean if min(shares) == max(shares) else f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"

    for kind, row in results.items():
        lines.append(f"| {kind} | " + " | ".join(cell(row[n]) if n in row else "" for n in lengths) + " |")
    return "\n".join(lines)


def picture(results: Results, path: Path):
    """The mean over seeds as a line, and from which share to which they lie as a band."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (kind, row) in enumerate(results.items()):
        lengths, shares = list(row), np.array(list(row.values()))
        axis.plot(lengths, shares.mean(axis=1), color=f"C{i}", marker="o", label=kind)
        axis.fill_between(lengths, shares.min(axis=1), shares.max(axis=1), color=f"C{i}", alpha=0.25)
    lengths = sorted({tokens for row in results.values() for tokens in row})
    axis.set(xscale="log", ylim=(-0.03, 1.03), xlabel="tokens of the dictionary", title="answers that are right")
    axis.set_xticks(lengths, map(short, lengths))
    axis.minorticks_off()
    axis.legend()
    save_picture(figure, path)


def main():
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--models", type=new_path, default=MODELS, help="folder of models; seeds that it lacks are trained into it")
    add("--seeds", type=number(int, 0), nargs="+", default=[0], help="default 0")
    add("--lengths", type=parse_lengths, default=LENGTHS, help="tokens of dictionaries (default 512,1k,4k,...,1M)")
    add("--long", action="store_true", help="and of 4M and 16M tokens, of which the memory of 16M takes 13 GB")
    add_output_flags(parser, "the share against the size of the dictionary")
    args = parser.parse_args()
    with ending_well(parser):
        check_outputs(args)
        check_new_folder("--models", args.models)
        most = SYMBOLS**KEY * RECORD
        fits = all(WINDOW <= tokens <= most for tokens in args.lengths)
        require(fits, f"--lengths must be of {WINDOW} to {short(most)} tokens: more records have not enough keys")
        results: Results = {kind: {} for kind in KINDS}
        for seed in args.seeds:
            make(args.models, seed)
            for kind, most in KINDS.items():
                for tokens in sorted(set(args.lengths + (LONG if args.long else []))):
                    if most == 0 and tokens > PLAIN_MOST:
                        continue
                    wide = {} if most else {"max_position_embeddings": tokens + WINDOW}  # all of it is local
                    model = FastLlama.from_pretrained(home(args.models, seed, kind), **wide)
                    share = ask(model, tokens, seed)
                    results[kind].setdefault(tokens, []).append(share)
                    tell(f"seed {seed}, {kind}, {short(tokens)} tokens: {share:.1%} right")
        print(table(results), flush=True)
        if args.table:
            save_table(table(results), args.table)
        if args.picture:
            picture(results, args.picture)


if __name__ == "__main__":
    main()
