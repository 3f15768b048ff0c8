"""Perplexity of held-out text, by how much of what came before is in memory.

    python experiments/perplexity.py --model tiny
    python experiments/perplexity.py --model tiny training/runs/tiny --windows 0 16
    python experiments/perplexity.py --documents 'hol_*' 'coq_*' --picture proofs.png      # of proofs alone
    python experiments/perplexity.py --windows 0 1 4 16 --positions      # what memory changes, by where in a window a token is

The table takes windows of held-out documents that have at least as many windows before them as the largest memory asked for, and
reads each of them after 0, 1, 4, ... of those windows. So every column is about the very same tokens.

With --positions a second table follows, of the same windows: the mean loss without memory, in nats, of the first 64 tokens of a
window, the next 64, the next 128, ... and of all; and what each memory changes it by, with its standard error: see `change`.

The picture is perplexity by where in a document a window is: its 1st, 2nd, 3rd and 4th, 5th to 8th, ... up to that number of
windows. One curve is of documents read from their beginning, each window with all before it in memory; the other of the same
windows, each read alone. Documents that end earlier are left out. So all points are of the very same documents, and at each the
curves are of the very same tokens; from point to point the tokens differ, and with them how hard they are to predict.
"""

import math
import sys
from itertools import chain, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import add_model_flags, add_own_memory_flag, number, parser_for
from cli.loading import load, pick_device
from cli.picture import import_pyplot, save_picture
from experiments.documents import add_document_flags, document_files
from experiments.output import add_output_flags, by_name, check_outputs, save_table
from fast import FastLlama
from fast.model import LARGEST
from longllama import Cache, require
from training.data import encode

BATCH = 8  # windows read at once
FIRST = 64  # tokens of a window, those that have next to nothing before them but memory


def windows(n: int) -> str:
    return f"{n} window{'s' * (n != 1)}"


@torch.no_grad()
def last_losses(model: FastLlama, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Reads ids (B, T + 1) but the last, which is a target only: the losses (B, window) of the last targets, and the cache."""
    window = model.config.max_position_embeddings
    logits, cache = model(ids[:, :-1], cache, last_context_length=window, logits_to_keep=window)
    return F.cross_entropy(logits.float().mT, ids[:, -window:], reduction="none"), cache


def window_losses(model: FastLlama, documents: list[Tensor], memory: int, most: int, stride: int) -> list[Tensor]:
    """Of each document that is long enough the losses (n, window), in float64, of every stride-th window after the first `most`,
    with `memory` windows remembered."""
    window, device = model.config.max_position_embeddings, model.norm.weight.device
    pieces = [
        [  # of a document; one token more: the target of the last
            document[(w - memory) * window : (w + 1) * window + 1]
            for w in range(most, (len(document) - 1) // window, stride)
        ]
        for document in documents
    ]
    counts = [len(part) for part in pieces if part]
    if not counts:
        raise ValueError(f"no document is longer than {windows(most)} of {window} tokens")
    batches = torch.stack([*chain(*pieces)]).to(device).split(BATCH)
    losses = torch.cat([last_losses(model, batch)[0].cpu().double() for batch in batches])
    require(math.isfinite(perplexity([losses])), f"the perplexity after {windows(memory)} is not finite")
    return [*losses.split(counts)]


def perplexity(losses: list[Tensor]) -> float:
    """Over all tokens of `window_losses`."""
    return torch.cat(losses).mean().exp().item()


def change(losses: list[Tensor], none: list[Tensor], start: int, stop: int) -> tuple[float, float]:
    """What memory changes the mean loss of tokens start to stop - 1 of windows by, and the standard error of that; both losses
    are `window_losses`.

    Windows of one document are alike, so the error is that of documents drawn at random, not windows: of clusters (Liang and
    Zeger 1986). Where all have as many windows, it is that of the mean of the documents' means. Of one document it is nan."""
    sums = torch.stack([(x - y)[:, start:stop].mean(dim=1).sum() for x, y in zip(losses, none)])  # (documents,)
    counts = torch.tensor([len(x) for x in losses])
    mean, n = sums.sum() / counts.sum(), len(counts)
    spread = (sums - mean * counts).square().sum() * n / max(n - 1, 1)
    return mean.item(), (spread.sqrt() / counts.sum()).item() if n > 1 else math.nan


def positions(losses: dict[int, list[Tensor]]) -> list[list[str]]:
    """Rows of a table, of losses by windows of memory: a row for each bin of tokens of a window, and for all."""
    window, none = losses[0][0].shape[1], losses[0]
    parts = [(FIRST * start, min(FIRST * stop, window)) for start, stop in bins(-(-window // FIRST))]
    rows = []
    for start, stop in dict.fromkeys([*parts, (0, window)]):
        changes = [change(losses[memory], none, start, stop) for memory in losses if memory]
        cells = [f"{mean:+.3f}" + f" ± {error:.3f}" * math.isfinite(error) for mean, error in changes]
        rows.append([f"{start}-{stop - 1}", f"{torch.cat(none)[:, start:stop].mean():.3f}", *cells])
    return rows


def bins(n: int) -> list[tuple[int, int]]:
    """Of windows 0 to n - 1 of a document, each of as many as are before it: (0, 1) (1, 2) (2, 4) (4, 8) ..."""
    return [*pairwise([0, *(1 << i for i in range((n - 1).bit_length())), n])]


def labels(n: int) -> list[str]:
    """Of the bins, whose windows are counted from 1."""
    return [f"{start + 1}" if stop == start + 1 else f"{start + 1}-{stop}" for start, stop in bins(n)]


def by_position(model: FastLlama, beginnings: Tensor, remembers: bool) -> list[float]:
    """Perplexity in each bin of the windows of beginnings (documents, n * window + 1). remembers: each is read with all windows
    before it in memory; otherwise alone."""
    window = model.config.max_position_embeddings
    n = beginnings.shape[1] // window
    sums = torch.zeros(n, dtype=torch.float64)
    for batch in beginnings.to(model.norm.weight.device).split(BATCH):
        cache = None
        for i in range(n):
            piece = batch[:, i * window : (i + 1) * window + 1]
            losses, cache = last_losses(model, piece, cache if remembers else None)
            sums[i] += losses.sum().item()
    means = sums / len(beginnings) / window
    values = [means[start:stop].mean().exp().item() for start, stop in bins(n)]
    require(all(map(math.isfinite, values)), "the perplexity by position is not finite")
    return values


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def picture(curves: dict[str, list[list[float]]], n: int, path: Path):
    """Perplexity by position for each model, with memory and without."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, (remembered, alone)) in enumerate(curves.items()):
        axis.plot(remembered, color=f"C{i}", linewidth=2.5, marker="o", label=f"{name}, with memory")
        axis.plot(alone, color=f"C{i}", linestyle="--", marker="o", label=f"{name}, each window alone")
    axis.set_xticks(range(len(bins(n))), labels(n))
    axis.set(title="perplexity by position in the document", xlabel="windows of the document", ylabel="perplexity")
    axis.legend()
    save_picture(figure, path)


def main():
    parser = parser_for(__doc__)
    add_model_flags(parser, several=True)
    add_own_memory_flag(parser)
    add_document_flags(parser)
    parser.add_argument(
        "--windows",
        type=number(int, 0, LARGEST),
        nargs="+",
        default=[0, 1, 4, 16, 64],
        help="windows of memory (default 0 1 4 16 64)",
    )
    parser.add_argument(
        "--stride", type=number(int, 1, LARGEST), default=4, help="take one window in this many (default 4)"
    )
    parser.add_argument(
        "--positions", action="store_true", help="a second table: losses by where in its window a token is"
    )
    add_output_flags(parser, "perplexity by position in the document, with memory and without")
    args = parser.parse_args()
    with ending_well(parser):
        check_outputs(args)
        require(not args.positions or 0 in args.windows, "--positions compares with no memory: give --windows 0, too")
        files, most, curves, losses = document_files(args), max(args.windows), {}, {}
        n = max(most, 1)  # windows of the picture
        rows = [["model", *map(windows, args.windows), "tokens"], ["---"] * (len(args.windows) + 2)]
        for name, folder in by_name(args.model).items():
            model, tokenizer = load(folder, pick_device(args.device), args.dtype, args.memory, args.weights)
            documents = [torch.from_numpy(encode(tokenizer, path)).long() for path in files]
            losses[name], cells = {}, []
            try:
                for memory in args.windows:
                    losses[name][memory] = found = window_losses(model, documents, memory, most, args.stride)
                    cells.append(f"{perplexity(found):.2f}")
                    tell(f"{name}, {windows(memory)}: {cells[-1]}")
                if args.picture:
                    length = n * model.config.max_position_embeddings + 1
                    whole = torch.stack([document[:length] for document in documents if len(document) >= length])
                    curves[name] = [by_position(model, whole, remembers) for remembers in (True, False)]
                    for label, remembered, alone in zip(labels(n), *curves[name]):
                        tell(f"{name}, window {label} of {len(whole)} documents: {remembered:.2f}, alone {alone:.2f}")
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            rows.append([name, *cells, f"{sum(map(Tensor.numel, found)):,}"])
            print(table(rows[-1:] if len(rows) > 3 else rows), flush=True)  # the header comes with the first row
        tables = [table(rows)]
        if args.positions:
            memories = [memory for memory in dict.fromkeys(args.windows) if memory]
            rows = [["model", "tokens", "none", *map(windows, memories)], ["---"] * (len(memories) + 3)]
            rows += [[name, *row] for name, of_model in losses.items() for row in positions(of_model)]
            tables.append(table(rows))
            print(f"\n{tables[-1]}")
        if args.table:
            save_table("\n\n".join(tables), args.table)
        if args.picture:
            picture(curves, n, args.picture)


if __name__ == "__main__":
    main()
