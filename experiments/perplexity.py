"""Perplexity of held-out text, by how much of what came before is in memory.

    python experiments/perplexity.py --model tiny
    python experiments/perplexity.py --model tiny training/runs/tiny --windows 0 16
    python experiments/perplexity.py --documents 'hol_*' 'coq_*'      # of proofs alone

Takes windows of held-out documents that have at least as many windows before them as the largest memory asked for, and reads each
of them after 0, 1, 4, ... of those windows. So every column is about the very same tokens.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import torch
import torch.nn.functional as F

from cli.flags import add_model_flags, add_own_memory_flag, number, parser_for
from cli.loading import load, pick_device
from experiments.documents import add_document_flags, document_files
from experiments.output import by_name
from fast import FastLlama
from fast.model import LARGEST
from longllama import require
from training.data import encode

BATCH = 8  # windows read at once


def windows(n: int) -> str:
    return f"{n} window{'s' * (n != 1)}"


@torch.no_grad()
def perplexity(
    model: FastLlama, documents: list[torch.Tensor], memory: int, most: int, stride: int
) -> tuple[float, int]:
    """Perplexity of every stride-th window after the first `most`, with `memory` windows remembered; and the tokens it is of."""
    window, device = model.config.max_position_embeddings, model.embed_tokens.weight.device
    pieces = [
        document[(w - memory) * window : (w + 1) * window + 1]  # one more: the target of the last token
        for document in documents
        for w in range(most, (len(document) - 1) // window, stride)
    ]
    if not pieces:
        raise ValueError(f"no document is longer than {windows(most)} of {window} tokens")
    loss = 0.0
    for batch in torch.stack(pieces).to(device).split(BATCH):
        logits, _ = model(batch[:, :-1], last_context_length=window, logits_to_keep=window)
        loss += F.cross_entropy(logits.float().flatten(0, 1), batch[:, -window:].flatten(), reduction="sum").item()
    value = torch.tensor(loss / len(pieces) / window, dtype=torch.float64).exp().item()
    require(math.isfinite(value), f"the perplexity after {windows(memory)} is not finite")
    return value, len(pieces) * window


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
    args = parser.parse_args()
    with ending_well(parser):
        files = document_files(args)
        rows = [["model", *map(windows, args.windows), "tokens"], ["---"] * (len(args.windows) + 2)]
        for name, folder in by_name(args.model).items():
            model, tokenizer = load(folder, pick_device(args.device), args.dtype, args.memory)
            documents = [torch.from_numpy(encode(tokenizer, path)).long() for path in files]
            cells = []
            for n in args.windows:
                try:
                    value, tokens = perplexity(model, documents, n, max(args.windows), args.stride)
                except ValueError as error:
                    raise ValueError(f"{folder}: {error}") from None
                cells.append(f"{value:.2f}")
                tell(f"{name}, {windows(n)}: {cells[-1]}")
            rows.append([name, *cells, f"{tokens:,}"])
            print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
            rows = []  # the header came with the first row


if __name__ == "__main__":
    main()
