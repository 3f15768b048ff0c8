"""kNN attention over an external database (the paper, section 3.1): memory is searched with Faiss (Johnson et al. 2017).

    pip install faiss-cpu
    python examples/knn_memory.py                                      # the tiny model, 16k tokens
    python examples/knn_memory.py --lengths 64k --topk 64 --index flat hnsw

`FaissMemory` goes where `FastMemory` goes, in a model of any size, and into `load_memory` too:

  cache = model.new_cache(partial(FaissMemory, index="hnsw"), mem_topk=64)
  for token in model.generate(ids, 100, cache=cache): ...

The program hides pass keys in a long text and prints, for each index and number of keys K that a query attends to, how many pass
keys are found, what it costs, and the recall: the share of the K best keys that an approximate search finds.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from math import isqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import numpy as np
import torch
from torch import Tensor

from cli.flags import number, parse_lengths, parser_for, short
from cli.loading import TINY, load
from cli.texts import read_text
from fast import FastConfig, FastLlama, FastMemory
from fast.attention import attend, fold
from longllama import Attended, Cache, require
from tokenizer import Tokenizer
from training.tasks import MOST_TRIALS, STEPS, answers, prompt_ids, random_key

INDEXES = ("flat", "hnsw", "ivf")
LINKS = 32  # of a token in HNSW's graph
TRAINED_FROM = 2048  # tokens: k-means wants about 40 for each of its sqrt(n) lists, so n = 40**2 at least
GROWN = 4  # IVF's lists are made anew when memory is this many times as large


def import_faiss():
    try:
        import faiss
    except ImportError:
        raise ValueError("FaissMemory needs Faiss: pip install faiss-cpu") from None
    return faiss


class FaissMemory(FastMemory):
    """A memory whose queries attend to the mem_topk keys that a Faiss index finds for them: one index per row and key head.

    index: "flat" compares with every key, and finds the best. "hnsw" walks a graph of near keys (Malkov and Yashunin 2016);
    the larger ef_search, the more of them. "ivf" compares with the keys of the nprobe best of sqrt(n) k-means lists; these are
    made when memory is first asked with TRAINED_FROM tokens in it, and anew whenever it has quadrupled; before, it is flat.

    The blocks stay what is remembered: keys and values are read from there. The indexes only say which. They hold the keys once
    more, in float32, in main memory (which `Cache.memory_bytes` does not count), and are brought up to date when memory is
    asked. So a loaded memory gets them on first use.
    """

    def __init__(self, config: FastConfig, index: str = "flat", nprobe: int = 32, ef_search: int = 512, **settings):
        """settings: of `FastMemory`."""
        super().__init__(config, **settings)
        require(self.topk is not None, "FaissMemory needs mem_topk, the number of keys that a query attends to")
        require(index in INDEXES, f"index must be one of {INDEXES}, not {index!r}")
        import_faiss()  # a missing one is said now, not after a long text was read
        self.index, self.nprobe, self.ef_search = index, nprobe, ef_search
        self.indexes, self.shared = [], False  # B * G indexes; True: a fork may have the same ones
        self.rebuilt_from = TRAINED_FROM if index == "ivf" else float("inf")

    def fork(self) -> "FaissMemory":
        self.update()  # once, not in each fork
        self.shared = True
        return super().fork()

    def expand(self, n: int):
        super().expand(n)
        if self.indexes:
            self.indexes, self.centre, self.shared = self.indexes * n, np.tile(self.centre, (n, 1, 1)), True

    def attend_stored(self, q: Tensor, real: Tensor | None) -> Attended:
        """Attention of q (B, H, T, D) to the K best keys that are found, or as many as there are. See `FastMemory.attend`."""
        B, H, T, D = q.shape
        padded = real is not None and not real[:, :, : self.length].all()
        require(not padded, "FaissMemory takes no padded batches: read texts of unequal length one by one")
        self.update()
        q = fold(q, self.blocks[0][0])  # (B, G, H / G * T, D)
        found = self.search(q)  # (B, G, H / G * T, K)
        rows = max(self.limits.gathered // (found[:, :, 0].numel() * q.shape[3]), 1)
        parts = zip(q[..., :D].split(rows, dim=2), found.split(rows, dim=2))
        out, lse = (torch.cat(x, dim=2) for x in zip(*(self.attend_found(*part) for part in parts)))
        return out.reshape(B, H, T, D), lse.reshape(B, H, T)

    def search(self, q: Tensor) -> Tensor:
        """The tokens with the K best keys for q (B, G, R, D): int64 (B, G, R, K), -1 where an approximate index found fewer."""
        K, queries = min(self.topk, self.length), q.detach().float().cpu().flatten(0, 1).numpy()
        found = [index.search(np.ascontiguousarray(x), K)[1] for index, x in zip(self.indexes, queries)]
        return torch.from_numpy(np.stack(found)).unflatten(0, q.shape[:2])

    def attend_found(self, q: Tensor, found: Tensor) -> Attended:
        """Attention of each query of q (B, G, R, D) to its own tokens, found (B, G, R, K) -> (B, G, R, D) and (B, G, R).

        Scores are computed anew from the keys: exact in the model's dtype, and gradients flow.
        """
        gathered = self.gather(found, q.dtype)
        k, v = (x.to(q.device).flatten(0, 2).unsqueeze(1) for x in gathered)  # (B * G * R, 1, K, D)
        real = None if (found >= 0).all() else (found >= 0).to(q.device).reshape(-1, 1, found.shape[3], 1)
        out, lse = attend(q.reshape(-1, 1, 1, q.shape[3]), k, v, real)  # a batch of single queries
        return out.reshape(q.shape), lse.reshape(q.shape[:3])

    def gather(self, found: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, R, K, D), where memory is, of the tokens found (B, G, R, K); zeros for -1."""
        k, start = self.blocks[0][0], 0
        found = found.to(k.device)
        gathered = tuple(k.new_zeros(*found.shape, k.shape[3], dtype=dtype) for _ in range(2))
        for block in self.blocks:
            size = block[0].shape[2]
            b, g, *_ = here = ((found >= start) & (found < start + size)).nonzero(as_tuple=True)
            for x, room in zip(block, gathered):
                room[here] = x[b, g, found[here] - start].to(dtype)
            start += size
        return gathered

    def update(self):
        """Adds to the indexes what was remembered since they were last asked."""
        start = self.indexes[0].ntotal if self.indexes else 0
        if start == self.length:
            return
        if self.length >= self.rebuilt_from:
            start, self.indexes, self.rebuilt_from = 0, [], GROWN * self.length
        keys = self.keys_since(start)
        # The keys of a head share much: the tiny model's are 7 to 10 long, and their mean 5 to 10. Taking it away keeps
        # their order, as all scores of a query change alike, but graphs and lists tell them apart better: HNSW's recall rises
        # from 73% to 98%, that of IVF from 83% to 91% (K = 16, 32k tokens).
        if not self.indexes:
            self.centre = keys.mean(axis=1, keepdims=True)  # (B * G, 1, D)
            self.indexes = [self.new_index(x) for x in keys - self.centre]
        elif self.shared:
            self.indexes = [import_faiss().clone_index(index) for index in self.indexes]
        self.shared = False
        for index, x in zip(self.indexes, keys - self.centre):
            index.add(x)

    def keys_since(self, start: int) -> np.ndarray:
        """The keys of the tokens from `start` on, float32 (B * G, tokens, D)."""
        ends = accumulate(k.shape[2] for k, _ in self.blocks)
        new = [k[:, :, max(start - end, -k.shape[2]) :] for (k, _), end in zip(self.blocks, ends) if end > start]
        return torch.cat(new, dim=2).detach().float().cpu().flatten(0, 1).numpy()

    def new_index(self, keys: np.ndarray):
        """An empty index for one head; IVF's lists are learned from the keys (n, D) that will go in."""
        faiss, (n, D) = import_faiss(), keys.shape
        if self.index == "hnsw":
            index = faiss.IndexHNSWFlat(D, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = self.ef_search
        elif self.index == "ivf" and n >= TRAINED_FROM:
            index = faiss.index_factory(D, f"IVF{isqrt(n)},Flat", faiss.METRIC_INNER_PRODUCT)
            index.nprobe = self.nprobe
            index.train(keys)
        else:
            index = faiss.IndexFlatIP(D)
        return index


# ---------------------------------------------------------------------------------------------------------- Program


class RecordingMemory(FaissMemory):
    """Keeps the last queries, to say afterwards how much of what they sought was found."""

    def search(self, q: Tensor) -> Tensor:
        self.asked = q
        return super().search(q)

    def recall(self) -> float:
        """The share of the true K best keys of the last queries that the index finds."""
        faiss, found = import_faiss(), super().search(self.asked).flatten(0, 1)  # (B * G, R, K)
        queries, keys, shares = self.asked.float().cpu().flatten(0, 1).numpy(), self.keys_since(0), []
        for x, k, rows in zip(queries, keys, found.numpy()):
            best = faiss.knn(np.ascontiguousarray(x), k, rows.shape[1], faiss.METRIC_INNER_PRODUCT)[1]
            shares += [np.isin(b, row).mean() for b, row in zip(best, rows)]
        return float(np.mean(shares))


@dataclass(frozen=True)
class Answer:
    found: bool
    read: float  # seconds to the first token: the prompt is read, and the indexes made
    step: float  # seconds for each token more
    recall: float


def ask(model: FastLlama, tokenizer: Tokenizer, ids: Tensor, key: str, cache: Cache) -> Answer:
    """Reads a prompt (1, T), and looks for the key in what greedy decoding continues it with."""
    started = time.perf_counter()
    tokens = model.generate(ids, STEPS, temperature=0, eos_token_id=None, cache=cache)
    answer = [next(tokens).item()]
    read = time.perf_counter() - started
    recalls = [x.memory.recall() for x in cache.layers if isinstance(x.memory, RecordingMemory) and x.memory.length]
    started = time.perf_counter()
    answer += [token.item() for token in tokens]
    step = (time.perf_counter() - started) / (STEPS - 1)
    found = answers(tokenizer.decode(answer), key)
    return Answer(found, read, step, sum(recalls) / len(recalls) if recalls else 1.0)


def prompts(tokenizer: Tokenizer, length: int, trials: int, seed: int) -> list[tuple[Tensor, str]]:
    """Prompts (1, length), with keys at depths spread evenly, and the keys."""
    rng, made = torch.Generator().manual_seed(seed), []
    text = tokenizer.encode(read_text(TINY / "book.txt"), bos=False)
    for i in range(trials):
        key = random_key(rng)
        ids = prompt_ids(tokenizer, length, (i + 0.5) / trials, key, text, rng)
        made.append((torch.tensor([ids]), key))
    return made


def row(model: FastLlama, tokenizer: Tokenizer, asked: list[tuple[Tensor, str]], index: str, K: int | None) -> str:
    """A row of the table: all prompts, each read anew with an empty memory."""
    new_memory = partial(RecordingMemory, index=index) if index in INDEXES else None
    found = [ask(model, tokenizer, ids, key, model.new_cache(new_memory, mem_topk=K)) for ids, key in asked]

    def mean(name: str) -> float:
        return sum(getattr(answer, name) for answer in found) / len(found)

    cells = [short(asked[0][0].shape[1]), index, K or "all", f"{100 * mean('found'):.0f}%"]
    cells += [f"{mean('read'):.2f}", f"{1000 * mean('step'):.1f}", f"{100 * mean('recall'):.1f}%"]
    return f"| {' | '.join(map(str, cells))} |"


def main():
    parser = parser_for(__doc__)
    parser.add_argument(
        "--model", type=Path, default=TINY, metavar="DIR", help="default: the tiny model that comes along"
    )
    parser.add_argument("--lengths", type=parse_lengths, default=[1 << 14], help="of prompts, in tokens (default 16k)")
    parser.add_argument(
        "--trials",
        type=number(int, 1, MOST_TRIALS),
        default=10,
        metavar="N",
        help="prompts of each length (default 10)",
    )
    parser.add_argument(
        "--topk", type=parse_lengths, default=[16, 64, 256], metavar="K,K", help="keys attended to (default 16,64,256)"
    )
    parser.add_argument(
        "--index", nargs="+", choices=["torch", *INDEXES], default=["torch", *INDEXES],
        help="torch: exact search without Faiss",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same keys every time (default 0)"
    )
    args = parser.parse_args()
    with ending_well(parser):
        model, tokenizer = load(args.model, torch.device("cpu"))
        require(bool(model.config.mem_layers), f"{args.model} has no mem_layers, so there is nothing to search")
        if set(args.index) & set(INDEXES):
            import_faiss()
        asked = [prompts(tokenizer, length, args.trials, args.seed) for length in args.lengths]
        print("| length | index | K | pass keys | s to read | ms per token | recall |", "| --- " * 7 + "|", sep="\n")
        ask(model, tokenizer, *asked[0][0], model.new_cache())  # a first prompt is slower
        for batch, (index, K) in product(asked, [("torch", None), *product(args.index, args.topk)]):
            print(row(model, tokenizer, batch, index, K), flush=True)


if __name__ == "__main__":
    main()
