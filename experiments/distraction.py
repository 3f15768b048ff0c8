"""How much attention stays with the own past when other documents are remembered too (the paper's figures 3, 6 and 8).

    python experiments/distraction.py                                                       # the tiny model
    python experiments/distraction.py --model tiny training/runs/none --picture distraction.png
    python experiments/distraction.py --documents 'hol_*' 'coq_*'                           # proofs alone

A window of a document attends to d contexts: the window before it, and d - 1 windows of other documents. Of what its queries give
to all of them, r_d is the share that their own past gets, the positive attention mass: 1/d, where documents are not told apart.
That is the distraction issue, and what training with negatives mends. The log-sum-exps of attention give it exactly.
Perplexity is that of the very same windows: a model that is not distracted keeps it, whatever else is remembered.
"""

import math
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import add_model_flags, number, parser_for
from cli.loading import load, pick_device
from cli.picture import import_pyplot, save_picture
from experiments.documents import add_document_flags, document_files
from experiments.output import add_output_flags, by_name, check_outputs, save_table
from fast import FastLlama
from longllama import Attended, LongLlamaConfig, Memory, attend, merge, require
from training.data import encode

AT_ONCE = 1 << 17  # tokens of memory, about


class Contexts(Memory):
    """Contexts of one length, each a block, and the first a row's own. share (H,): what that got of attention to memory."""

    def __init__(self, config: LongLlamaConfig, contexts: tuple[Tensor, Tensor] | None = None):
        """contexts: keys and values (B, d, G, W, D) to begin with."""
        super().__init__(config)
        self.BLOCK = config.max_position_embeddings  # so none takes in another
        for k, v in zip(*(x.unbind(1) for x in contexts or ())):
            self.append(k, v)

    def attend(self, q: Tensor, real: Tensor | None) -> Attended:
        parts = [attend(q, k.to(q.dtype), v.to(q.dtype), rows=self.rows) for k, v, _ in self.blocks]
        lse = torch.stack([lse for _, lse in parts])  # (d, B, H, T)
        self.share = lse.softmax(dim=0)[0].mean(dim=(0, 2))
        return reduce(merge, parts)


@dataclass(frozen=True)
class Result:
    model: str
    contexts: int  # d
    shares: Tensor  # (memory layers, H): r_d
    perplexity: float


@dataclass(frozen=True)
class Windows:
    """N windows of documents, current (N, W), the one before each, past (N, W), and targets (N, W), the tokens that follow.
    others (N, D): which of `past` are of other documents than a window's, in the order in which they join it."""

    past: Tensor
    current: Tensor
    targets: Tensor
    others: Tensor


def draw(documents: list[Tensor], window: int, n: int, most: int, seed: int) -> Windows:
    """n windows from random places of documents, each of which gives as many as any other, and `most` others for each."""
    rng = np.random.default_rng(seed)
    long = [i for i, document in enumerate(documents) if len(document) > 2 * window]
    if len(long) < 2:
        raise ValueError(f"it takes two documents of more than {2 * window} tokens at least")
    owner = np.resize(rng.permutation(long), n)
    starts = [int(rng.integers(len(documents[i]) - 2 * window)) for i in owner]
    pieces = torch.stack([documents[i][start : start + 2 * window + 1] for i, start in zip(owner, starts)])
    strangers = [np.flatnonzero(owner != i) for i in owner]
    if min(map(len, strangers)) < most:
        raise ValueError(
            f"{len(long)} documents of that length give fewer than {most} windows of others: add --windows"
        )
    others = torch.from_numpy(np.stack([rng.permutation(x)[:most] for x in strangers]))
    past, current = pieces[:, :window], pieces[:, window:-1]
    return Windows(past, current, pieces[:, window + 1 :], others)


@torch.no_grad()
def remembered(model: FastLlama, past: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, G, W, D) in each memory layer of windows (N, W), each read alone."""
    parts, window, device = [], past.shape[1], model.norm.weight.device
    for ids in past.split(max(AT_ONCE // window // 16, 1)):
        _, cache = model(ids.to(device), model.new_cache(Contexts), last_context_length=window, logits_to_keep=1)
        cache.restart()
        parts.append([layer.memory.blocks[0][:2] for layer in cache.layers if layer.memory is not None])
    return [tuple(map(torch.cat, zip(*layer))) for layer in zip(*parts)]


@torch.no_grad()
def measure(model: FastLlama, name: str, windows: Windows, layers: list[tuple[Tensor, Tensor]], d: int) -> Result:
    """With d contexts in memory. layers: what `remembered` gives for windows.past."""
    (N, window), loss, shares = windows.current.shape, 0.0, 0.0
    device = model.norm.weight.device
    for rows in torch.arange(N).split(max(AT_ONCE // (d * window), 1)):
        seen = torch.cat((rows[:, None], windows.others[rows, : d - 1]), dim=1)  # (B, d)
        contexts = iter([tuple(x[seen] for x in layer) for layer in layers])  # (B, d, G, W, D)
        cache = model.new_cache(lambda config, contexts=contexts: Contexts(config, next(contexts)))
        logits, cache = model(windows.current[rows].to(device), cache, last_context_length=window)
        loss += F.cross_entropy(
            logits.float().flatten(0, 1), windows.targets[rows].flatten().to(device), reduction="sum"
        ).item()
        share = torch.stack([layer.memory.share for layer in cache.layers if layer.memory is not None])
        shares = shares + share.cpu() * (len(rows) / N)
    value = math.exp(loss / (N * window))
    require(math.isfinite(value), f"{name}: the perplexity with {d} contexts is not finite")
    return Result(name, d, shares, value)


def table(results: list[Result], layers: dict[str, tuple[int, ...]]) -> str:
    """Markdown: a column for each d; for each model r_d, of all heads and of each, and perplexity. layers: those with memory."""
    columns = sorted({result.contexts for result in results})
    lines = ["| model | | " + " | ".join(f"d = {d}" for d in columns) + " |", "| --- " * (len(columns) + 2) + "|"]

    def add(model: str, label: str, values: dict[int, float], digits: int):
        cells = " | ".join(f"{values[d]:.{digits}f}" for d in columns)
        lines.append(f"| {model} | {label} | {cells} |")

    for model in dict.fromkeys(result.model for result in results):
        of = {result.contexts: result for result in results if result.model == model}
        add(model, "r_d, all heads", {d: result.shares.mean().item() for d, result in of.items()}, 3)
        for i, layer in enumerate(layers[model]):
            for head in range(of[columns[0]].shares.shape[1]):
                add(model, f"layer {layer}, head {head}", {d: x.shares[i, head].item() for d, x in of.items()}, 3)
        add(model, "perplexity", {d: result.perplexity for d, result in of.items()}, 2)
    add("", "1/d", {d: 1 / d for d in columns}, 3)
    return "\n".join(lines)


def picture(results: list[Result], path: Path):
    """Left r_d times d, so that 1 is not to tell documents apart, bold over all heads; right perplexity."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    columns = sorted({result.contexts for result in results})
    for i, model in enumerate(dict.fromkeys(result.model for result in results)):
        of = sorted((result for result in results if result.model == model), key=lambda result: result.contexts)
        gains = torch.stack([result.shares.flatten() * result.contexts for result in of])  # (columns, heads)
        left.plot(columns, gains, color=f"C{i}", alpha=0.3, linewidth=1)
        left.plot(columns, gains.mean(dim=1), color=f"C{i}", linewidth=2.5, label=model)
        right.plot(columns, [result.perplexity for result in of], color=f"C{i}", linewidth=2.5, marker="o", label=model)
    left.axhline(1, color="grey", linestyle="--", label="1/d: documents are not told apart")
    left.set(xscale="log", title="attention to the own past, as a multiple of 1/d", xlabel="d, contexts in memory")
    left.set_ylim(min(0.5, left.get_ylim()[0]), max(2.0, left.get_ylim()[1]))  # so that noise looks as small as it is
    right.set(xscale="log", title="perplexity", xlabel="d, contexts in memory: the own past and d - 1 others")
    for axis in (left, right):
        axis.set_xticks(columns, map(str, columns))
        axis.minorticks_off()
        axis.legend()
    save_picture(figure, path)


def main():
    parser = parser_for(__doc__)
    add_model_flags(parser, several=True)
    add = parser.add_argument
    add_document_flags(parser)
    add("--contexts", type=number(int, 1, 1 << 16), nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="D",
        help="contexts in memory (default 1 2 4 8 16 32 64)")  # fmt: skip
    add("--windows", type=number(int, 2, 1 << 16), default=96, metavar="N", help="windows that are read (default 96)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same windows every time (default 0)")
    add_output_flags(parser, "both against d")
    args = parser.parse_args()
    with ending_well(parser):
        check_outputs(args)
        files, results, layers, contexts = document_files(args), [], {}, sorted(set(args.contexts))
        for name, path in by_name(args.model).items():
            model, tokenizer = load(path, pick_device(args.device), args.dtype, weights=args.weights)
            require(
                bool(model.config.mem_layers), f"--model {path} has no mem_layers, so it attends to no other context"
            )
            documents = [torch.from_numpy(encode(tokenizer, file)).long() for file in files]
            windows = draw(documents, model.config.max_position_embeddings, args.windows, contexts[-1] - 1, args.seed)
            layers[name], kept = sorted(model.config.mem_layers), remembered(model, windows.past)
            for d in contexts:
                results.append(measure(model, name, windows, kept, d))
                mean = results[-1].shares.mean()
                tell(f"{name}, d = {d}: r_d {mean:.3f}, perplexity {results[-1].perplexity:.2f}")
        print(table(results, layers), flush=True)
        if args.table:
            save_table(table(results, layers), args.table)
        if args.picture:
            picture(results, args.picture)


if __name__ == "__main__":
    main()
