"""Many-shot evaluation (the paper's table 1): as many examples as a context holds, and after them one question.

    python evaluation/manyshot.py --task wordnet --lengths 1k,4k --draws 2 --questions 50
    python evaluation/manyshot.py --model DIR --task trec --data FOLDER --device cuda
    python evaluation/manyshot.py --model DIR OTHER_DIR --task FILE.jsonl --picture shots.png

A prompt is `<s>`, a line for each example, `Question: TEXT Type: LABEL` or `Question: TEXT Answer: ANSWER`, and the beginning of
such a line. Where there are labels, the answer is the one whose tokens have the highest mean log-probability. Else it is what the
model writes up to the line break, greedily; it is right if it is one of the question's answers, after SQuAD's normalisation.

Each draw draws its examples anew, as many as leave room for the longest question with its answer; a longer context begins with
the examples of a shorter one. They are read once, and every question goes on from a fork of that memory. Their last
last_context_length tokens stay local, or fewer, so that question and answer always fit the window behind them.

A file of one's own has a JSON object on each line, {"text": TEXT, "label": TEXT} or {"question": TEXT, "answers": [TEXT, ...]}.
About one in eight, by a hash of the text, is asked, and the others are examples.
"""

import os
import re
import statistics
import string
import sys
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cli.completions import complete
from cli.flags import add_model_flags, number, parse_lengths, parser_for, short
from cli.loading import load, pick_device
from cli.picture import import_pyplot, save_picture
from evaluation.questions import DATA, Question, Task, load_task
from experiments.output import add_output_flags, by_name, check_outputs, save_table
from fast import FastLlama
from longllama import Cache, require
from tokenizer import Tokenizer

WRITTEN = 32  # tokens, at most, of an answer that is written


@dataclass(frozen=True)
class Asked:
    """A question as ids that go on from the line of an example, and the ids of each label, which go on from the question."""

    question: Question
    ids: list[int]
    labels: list[list[int]]

    @property
    def room(self) -> int:
        """How many tokens it takes, with its answer."""
        return len(self.ids) + max(map(len, self.labels), default=WRITTEN)


@dataclass(frozen=True)
class Result:
    model: str
    length: int
    examples: int
    right: float  # share of the questions


def following(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids of a text where it stands behind another. Alone it may have others."""
    head, ids = (tokenizer.encode(x, bos=False) for x in (before, before + text))
    return ids[len(os.path.commonprefix([head, ids])) :]


def as_asked(tokenizer: Tokenizer, task: Task, question: Question) -> Asked:
    example, text = task.show(task.train[0]), task.ask(question)
    labels = [following(tokenizer, text, f" {label}") for label in task.labels]
    return Asked(question, following(tokenizer, example, f"\n{text}"), labels)


def fit(tokenizer: Tokenizer, lines: list[str], room: int) -> tuple[int, list[int]]:
    """How many of the lines, from the first on, take no more than `room` tokens together, and the ids of these."""

    def ids(n: int) -> list[int]:
        return tokenizer.encode("\n".join(lines[:n]))

    n = bisect_right(range(1, len(lines) + 1), room, key=lambda n: len(ids(n)))
    return n, ids(n)


def normalised(text: str) -> str:
    """As SQuAD compares answers: without capitals, punctuation, articles and more than one space between words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


class Exam:
    """A model, and the questions that it is asked after examples."""

    def __init__(
        self, model: FastLlama, tokenizer: Tokenizer, task: Task, questions: Sequence[Question], batch_size: int = 8
    ):
        self.model, self.tokenizer, self.task, self.batch_size = model, tokenizer, task, batch_size
        self.window, self.device = model.config.max_position_embeddings, model.norm.weight.device
        self.asked = [as_asked(tokenizer, task, question) for question in questions]
        self.room = max(asked.room for asked in self.asked)
        too_long = f"a question takes {self.room} tokens with its answer, and the window has {self.window}"
        require(self.room < self.window, too_long)

    @torch.no_grad()
    def read(self, ids: list[int]) -> Cache:
        """A cache of the examples, with room for any question and its answer behind what stays local."""
        last = min(self.model.config.last_context_length, self.window - self.room)
        ids = torch.tensor([ids], device=self.device)
        logits, cache = self.model(ids, last_context_length=last, logits_to_keep=1)
        require(bool(logits.isfinite().all()), "logits are no finite numbers")
        return cache

    @torch.no_grad()
    def label_scores(self, cache: Cache, asked: Asked) -> Tensor:
        """The mean log-probability of each label's tokens, (labels,), where the question goes on from the cache."""
        cache, ids, scores = cache.fork(), torch.tensor([asked.ids], device=self.device), []
        first, _ = self.model(ids, cache, last_context_length=self.window, logits_to_keep=1)  # (1, 1, V)
        for i in range(0, len(asked.labels), self.batch_size):
            labels = [torch.tensor(label, device=self.device) for label in asked.labels[i : i + self.batch_size]]
            targets = pad_sequence(labels, batch_first=True)  # (n, T): padded behind, where no label sees it
            logits = first.expand(len(labels), -1, -1)
            if targets.shape[1] > 1:
                rows = cache.expand(len(labels))
                more, _ = self.model(targets[:, :-1], rows, last_context_length=self.window)
                logits = torch.cat((logits, more), dim=1)  # (n, T, V)
            losses = F.cross_entropy(logits.float().mT, targets, reduction="none")  # (n, T)
            scores += [-row[: len(label)].mean() for row, label in zip(losses, labels)]
        return torch.stack(scores)

    def written(self, cache: Cache) -> dict[Question, str]:
        """What the model writes to each question. Those of a batch have as many tokens: none is padded."""
        texts, by_tokens = {}, defaultdict(list)
        for asked in self.asked:
            by_tokens[len(asked.ids)].append(asked)
        for group in by_tokens.values():
            for i in range(0, len(group), self.batch_size):
                batch = group[i : i + self.batch_size]
                settings = {"cache": cache.expand(len(batch)), "last_context_length": self.window, "temperature": 0}
                prompts = [asked.ids for asked in batch]
                said = complete(self.model, self.tokenizer, prompts, WRITTEN, stops=["\n"], **settings)
                texts |= {asked.question: text for asked, text in zip(batch, said)}
        return texts

    def answers(self, cache: Cache) -> list[bool]:
        """Which questions are answered right, each going on from the cache by itself."""
        if labels := self.task.labels:
            best = [labels[self.label_scores(cache, asked).argmax()] for asked in self.asked]
            return [label in asked.question.answers for label, asked in zip(best, self.asked)]
        texts = self.written(cache)
        return [normalised(texts[x.question]) in map(normalised, x.question.answers) for x in self.asked]

    def measure(self, name: str, length: int, order: Sequence[int]) -> Result:
        """All questions after examples in this order, in prompts of at most `length` tokens."""
        lines = [self.task.show(self.task.train[i]) for i in order[:length]]
        n, ids = fit(self.tokenizer, lines, length - self.room)
        require(n > 0, f"--lengths {length}: no example fits beside {self.room} tokens of a question and its answer")
        started = time.perf_counter()
        cache, read = self.read(ids), time.perf_counter()
        right = statistics.mean(self.answers(cache))
        seconds = (time.perf_counter() - read) / len(self.asked)
        tell(
            f"{name} {short(length)}: {n} examples, read once in {read - started:.2f} s; {len(self.asked)} questions, "
            f"{seconds:.3f} s each; {100 * right:.1f}% right"
        )
        return Result(name, length, n, right)


def spread(draws: list[Result]) -> tuple[float, float]:
    """What is right, in percent: mean and standard deviation over draws, of which one has none."""
    shares = [100 * draw.right for draw in draws]
    return statistics.mean(shares), statistics.stdev(shares) if len(shares) > 1 else 0.0


def percent(draws: list[Result]) -> str:
    mean, deviation = spread(draws)
    return f"{mean:.1f}%" + f" ± {deviation:.1f}" * (len(draws) > 1)


def by_cell(results: list[Result]) -> dict[str, dict[int, list[Result]]]:
    """The draws of each model and length."""
    cells = defaultdict(lambda: defaultdict(list))
    for result in results:
        cells[result.model][result.length].append(result)
    return cells


def table(results: list[Result]) -> str:
    """Markdown: two rows for each model, what is right and how many examples were shown; a column for each length."""
    lengths = sorted({result.length for result in results})
    lines = [f"| model | | {' | '.join(map(short, lengths))} |", "| --- " * (len(lengths) + 2) + "|"]
    for model, cells in by_cell(results).items():
        right = [percent(cells[n]) if n in cells else "" for n in lengths]
        shown = [f"{statistics.mean(x.examples for x in cells[n]):.0f}" if n in cells else "" for n in lengths]
        lines += [f"| {model} | right | {' | '.join(right)} |", f"| {model} | examples | {' | '.join(shown)} |"]
    return "\n".join(lines)


def picture(results: list[Result], path: Path):
    """What is right by length: a line for each model, and bars of a standard deviation."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for model, cells in by_cell(results).items():
        means, deviations = zip(*(spread(cells[n]) for n in sorted(cells)))
        axis.errorbar(sorted(cells), means, deviations, marker="o", capsize=4, label=model)
    lengths = sorted({result.length for result in results})
    axis.set_xticks(lengths, map(short, lengths))
    axis.set(title="answers after as many examples as fit", xlabel="prompt length, tokens", ylabel="right, %")
    axis.legend()
    save_picture(figure, path)


def alike(labels: list[list[int]]) -> str:
    """How many labels only their later tokens tell apart. They share what their first one adds to the mean."""
    first = Counter(ids[0] for ids in labels)
    return f"{sum(first[ids[0]] > 1 for ids in labels)} of {len(labels)} labels begin with the same token as another"


def describe(name: str, task: Task, questions: list[Question]) -> str:
    """What is asked, and what is right by always giving the commonest label."""
    text = f"{name}: {len(questions):,} of {len(task.test):,} questions, examples from {len(task.train):,}"
    if not task.labels:
        return text
    commonest = statistics.mode(question.answers[0] for question in task.train)
    share = statistics.mean(commonest in question.answers for question in questions)
    return f"{text}, {len(task.labels)} labels; always the commonest, {commonest}: {100 * share:.1f}% right"


def main():
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_model_flags(parser, several=True)
    add("--task", required=True, metavar="TASK", help="trec, webqs, wordnet, or a file of your own, of JSON lines")
    add("--data", type=Path, default=DATA, metavar="DIR", help="where a task's files are (default: evaluation/data)")
    add("--lengths", type=parse_lengths, default=[2048, 4096, 6144, 8192], help="of prompts (default 2k,4k,6k,8k)")
    add("--draws", type=number(int, 1), default=20, metavar="N", help="of examples, for each length (default 20)")
    add("--questions", type=number(int, 1), metavar="N", help="ask so many, the same in all draws (default: all)")
    add("--batch-size", type=number(int, 1), default=8, metavar="N", help="labels or answers at once (default 8)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same examples every time (default 0)")
    add_output_flags(parser, "what is right by length")
    args = parser.parse_args()
    with ending_well(parser):
        check_outputs(args)
        task, results = load_task(args.task, args.data), []
        chosen = np.random.default_rng(args.seed).permutation(len(task.test))[: args.questions]
        questions = [task.test[i] for i in chosen]
        tell(describe(args.task, task, questions))
        try:
            for name, path in by_name(args.model).items():
                loaded = load(path, pick_device(args.device), args.dtype, weights=args.weights)
                exam = Exam(*loaded, task, questions, args.batch_size)
                if task.labels:
                    tell(f"{name}: {alike(exam.asked[0].labels)}")
                for length in dict.fromkeys(args.lengths):
                    for draw in range(args.draws):
                        order = np.random.default_rng((args.seed, draw)).permutation(len(task.train))
                        results.append(exam.measure(name, length, order))
        finally:  # what was measured is told, also where one model cannot read so much
            if results:
                print(table(results), flush=True)
        if args.table:
            save_table(table(results), args.table)
        if args.picture:
            picture(results, args.picture)


if __name__ == "__main__":
    main()
