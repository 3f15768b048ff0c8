"""What a model is trained on: batches of packed documents, of plain text and of pass-key tasks.

With the same documents and tokenizer, every batch is a function of (seed, step) alone, so training can be stopped, resumed
and spread over processes, and goes through the very same batches.
"""

import gzip
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.texts import is_utf8, json_objects, read_text
from tokenizer import Tokenizer
from training.tasks import GRASS, INTRO, KEY, question_and_answer

DATA = Path(__file__).resolve().parent / "data"  # where fetch_data.py puts texts
STYLES = ("text", "grass", "mixed")  # of filler
KEYED, OTHERS = ("dense", "passkey"), ("text", "filler")  # kinds of document: with a pass key in them, and without
HELD_OUT = 16  # about one document in this many is kept for validation
BOOK = "moby_dick_091.txt"  # tiny/book.txt, which is kept too, whatever other documents there are


def name_hash(name: str) -> int:
    return int.from_bytes(sha256(name.encode()).digest(), "big")


def held_out(files: list[Path]) -> list[Path]:
    """By a hash of the name, so that more files change nothing for these; and that of the least hash, so that there is one."""
    first = min(files, key=lambda file: name_hash(file.name))
    return [file for file in files if is_held_out(file.name) or file == first or file.name == BOOK]


def text_files(folder: Path) -> list[Path]:
    """Not hidden ones, which are no documents: macOS puts a ._name.txt beside name.txt."""
    files = sorted(path for path in folder.glob("*.txt") if path.is_file() and not path.name.startswith("."))
    if len(files) < HELD_OUT:
        raise ValueError(
            f"{folder} needs at least {HELD_OUT} .txt files, not counting folders and hidden files, a document each: "
            "python training/fetch_data.py fetches some"
        )
    return files


@dataclass(frozen=True)
class Source:
    """A folder of .txt files, a document each, or JSON lines, .jsonl or .jsonl.gz; and how often it is drawn, relative to others.
    Written PATH or PATH=WEIGHT."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        path, _, weight = text.rpartition("=")
        weighted = path and re.fullmatch(r"[0-9]*\.?[0-9]+", weight) and float(weight) > 0
        return cls(Path(path), float(weight)) if weighted else cls(Path(text))


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """`json_objects` of a file, packed or not, which may be large. Raises OSError or ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"--data {path} is missing: python training/fetch_data.py fetches documents")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from json_objects(file, f"--data {path}")


def is_held_out(name: str) -> bool:
    return name_hash(name) % HELD_OUT == 0


@dataclass
class Batch:
    """inputs, targets (B, T) int64; answers (B, T) bool: the targets that have digits of a pass key asked for."""

    inputs: np.ndarray
    targets: np.ndarray
    answers: np.ndarray


def texts(source: Source, field: str) -> Iterator[tuple[str, bool]]:
    """The texts of a source, and which of them are held out: files by their names, rows by what they say."""
    if source.path.is_dir():
        files = text_files(source.path)
        kept = set(held_out(files))
        yield from ((read_text(file), file in kept) for file in files)
        return
    for where, row in json_lines(source.path):
        if not isinstance(row.get(field), str) or not is_utf8(row[field]):
            raise ValueError(f"{where} has no text under {field!r}: --text-field names another")
        yield row[field], is_held_out(row[field])


def read_corpora(
    sources: list[Source], tokenizer: Tokenizer, field: str = "text", shortest: int = 0
) -> tuple["Corpus", "Corpus"]:
    """Training documents, and held-out ones. shortest: of fewer letters a text is left out. Raises OSError or ValueError."""
    found = {False: [], True: []}  # held out -> sources -> documents
    for source in sources:
        read = {False: [], True: []}
        for text, held in texts(source, field):
            if len(text) >= shortest:
                read[held].append(np.array(tokenizer.encode(text, eos=True), dtype=np.int32))
        if not read[False]:
            raise ValueError(f"{source.path} has no document to train on, of at least {shortest} letters")
        for held, documents in read.items():
            found[held].append((documents, source.weight))
    return tuple(Corpus(found[held], tokenizer) for held in (False, True))


def cumulative(weights: list[float]) -> np.ndarray:
    """For `draw`."""
    shares = np.cumsum(np.array(weights) / sum(weights))
    return shares / shares[-1]


def draw(rng: np.random.Generator, shares: np.ndarray) -> int:
    """As rng.choice(len(shares), p=...), whose time goes by their number."""
    return int(shares.searchsorted(rng.random(), side="right"))


class Corpus:
    """Documents as token ids, and the documents that are made of them."""

    def __init__(self, sources: list[tuple[list[np.ndarray], float]], tokenizer: Tokenizer):
        """sources: documents, and how often text is of these, relative to others; one of them is drawn by its length."""
        sources = [source for source in sources if source[0]]
        self.sources = [(documents, cumulative([len(x) for x in documents])) for documents, _ in sources]
        self.shares = cumulative([weight for _, weight in sources]) if sources else np.array([])
        self.documents = [document for documents, _ in sources for document in documents]
        self.bos = np.array(tokenizer.encode(""), dtype=np.int64)
        self.tokenizer = tokenizer
        self.intro, self.grass = (np.array(tokenizer.encode(t, bos=False)) for t in (INTRO, GRASS))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    def digest(self) -> str:
        """A hash of all documents, as token ids, and of how sources are mixed."""
        hashed = sha256(self.shares[:-1].tobytes())  # nothing where there is one
        for document in self.documents:
            hashed.update(document.tobytes())
        return hashed.hexdigest()

    def text(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n tokens of text from a random place on; where a document ends, `</s>` follows, and another one of its source."""
        parts, length = [], 0
        documents, shares = self.sources[draw(rng, self.shares) if len(self.sources) > 1 else 0]
        while length < n or not parts:
            document = documents[draw(rng, shares)]
            parts.append(document if parts else document[rng.integers(max(len(document) - n + 1, 1)) :])
            length += len(parts[-1])
        return np.concatenate(parts)[:n]

    def filler(self, rng: np.random.Generator, n: int, style: str) -> np.ndarray:
        """n tokens of real text, of the grass filler repeated, or of a mixture of both."""
        if style == "text":
            return self.text(rng, n)
        if style == "grass":
            start = rng.integers(len(self.grass))
            return np.resize(np.roll(self.grass, -start), n)
        parts, length = [], 0
        while length < n or not parts:
            parts.append(self.filler(rng, int(rng.integers(20, 200)), str(rng.choice(["text", "grass"]))))
            length += len(parts[-1])
        return np.concatenate(parts)[:n]

    def passkey(
        self,
        rng: np.random.Generator,
        n: int,
        window: int,
        dense: bool,
        cut: float = 0.0,
        repeated: float = 0.0,
        single: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """n tokens with a pass key stated once and asked for later; and which of them have digits of an answer.

        dense: asked for again and again, a few words of filler between, so that a document has many answers to learn
        from. Otherwise: stated in the first window, and asked for once in each of the others.

        The hard cases can be made more frequent. cut: in this share of documents that are not dense the statement
        lies across the border of the first two windows, so that what is behind it was read without what stands before it.
        repeated: this share of keys has at most three different digits, so that a digit does not tell which comes next.
        single: this share of statements names the key once, and not twice, which is what a cut leaves of one.
        """
        digits = rng.integers(0, 10, 5)
        if repeated and rng.random() < repeated:
            digits = rng.choice(digits[:3], 5)
        key = "".join(map(str, digits))
        style = str(rng.choice(STYLES))
        stated = KEY.format(key=key)
        if single and rng.random() < single:
            stated = str(rng.choice(stated.split(" Remember it. ")))
        statement = np.array(self.tokenizer.encode(stated, bos=False))
        asked, answer = map(np.array, question_and_answer(self.tokenizer, key))
        least = max(len(statement), len(asked)) + 1
        if window < least:
            raise ValueError(f"a pass key takes windows of at least {least} tokens, not {window}")
        start = [self.bos, self.intro if rng.random() < 0.5 else self.intro[:0]]
        if dense:
            places, place = [], int(rng.integers(0, max(window // 4, 1)))
            while place < n:
                places.append(place)
                place += int(rng.integers(1, 16)) + len(asked)
        else:
            if cut and rng.random() < cut:
                places = [window - int(rng.integers(1, max(len(statement), 2)))]
            else:
                places = [int(rng.integers(0, window - len(statement)))]
            places += [int(rng.integers(w, w + window - len(asked))) for w in range(window, n - window + 1, window)]

        parts, marks, length = start, [np.zeros(sum(map(len, start)), bool)], sum(map(len, start))
        for i, place in enumerate(places):
            gap = self.filler(rng, max(place - length, 0), style)
            piece = asked if i else statement
            mark = np.zeros(len(gap) + len(piece), bool)
            if i:
                mark[len(gap) :] = answer
            parts, marks, length = [*parts, gap, piece], [*marks, mark], length + len(mark)
        parts.append(self.filler(rng, max(n - length, 0), style))
        marks.append(np.zeros(len(parts[-1]), bool))
        return np.concatenate(parts)[:n], np.concatenate(marks)[:n]

    def document(
        self, rng: np.random.Generator, n: int, window: int, kind: str, **hard: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """n tokens of a kind of document, and which of them have digits of an answer."""
        if kind in KEYED:
            return self.passkey(rng, n, window, kind == "dense", **hard)
        tokens = self.text(rng, n) if kind == "text" else self.filler(rng, n, str(rng.choice(STYLES)))
        return tokens, np.zeros(n, bool)

    def batch(
        self, seed: tuple[int, ...], documents: int, window: int, mix: dict[str, float], extra: list[int], **hard: float
    ) -> Batch:
        """Entries of window tokens: as many consecutive chunks of each document as there are entries in `extra` for it.

        mix: how often each kind of document comes, relative to the others. extra: how many entries before it each entry
        sees. A question has one answer only if no other document's key is seen, so where entries see others, documents with
        a key stand behind enough documents without: the contrast is between a key and everything else.
        hard: `cut`, `repeated` and `single` of `passkey`.
        """
        rng = np.random.default_rng(seed)
        packing = len(extra) // documents
        others = max(seen - i % packing for i, seen in enumerate(extra))  # entries of other documents that are seen
        spacing = 1 + -(-others // packing)
        n = packing * window + 1
        tokens, answers = np.empty((documents, n), np.int64), np.zeros((documents, n), bool)
        for i in range(documents):
            kinds = [kind for kind in mix if (i + 1) % spacing == 0 or kind not in KEYED]
            shares = np.array([mix[kind] for kind in kinds])
            kind = str(rng.choice(kinds, p=shares / shares.sum()))
            tokens[i], answers[i] = self.document(rng, n, window, kind, **hard)
        entries = (documents * packing, window)
        return Batch(tokens[:, :-1].reshape(entries), tokens[:, 1:].reshape(entries), answers[:, 1:].reshape(entries))


def encode(tokenizer: Tokenizer, path: Path) -> np.ndarray:
    return np.array(tokenizer.encode(read_text(path)), dtype=np.int32)
