"""Questions and their answers, for prompts that show many of them: TREC, WebQuestions, and files of one's own."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cli.texts import read_json_lines, read_text
from longllama import require

DATA = Path(__file__).resolve().parent / "data"  # where fetch_wordnet.py puts glosses
SOURCES = {  # the files of a task, and where they come from
    "trec": (("train_5500.label", "TREC_10.label"), "get them from https://cogcomp.seas.upenn.edu/Data/QA/QC"),
    "webqs": (
        ("webquestions.examples.train.json", "webquestions.examples.test.json"),
        "get WebQuestions from https://nlp.stanford.edu/software/sempre",
    ),
    "wordnet": (("wordnet.jsonl",), "python evaluation/fetch_wordnet.py makes it"),
}
COARSE = {  # what TREC calls the first half of a label
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "number",
}  # fmt: skip
TESTED = 8  # of a file of one's own about one question in this many is asked, and the others are examples


@dataclass(frozen=True)
class Question:
    """answers: any of them is right, and an example shows the first. Where there are labels, it is the one label."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """train: what examples are drawn from. test: what is asked. labels: those to choose from; none: answers are written."""

    train: list[Question]
    test: list[Question]
    labels: list[str]

    def ask(self, question: Question) -> str:
        return f"Question: {question.text} {'Type' if self.labels else 'Answer'}:"

    def show(self, question: Question) -> str:
        return f"{self.ask(question)} {question.answers[0]}"


def checked(text, answers, complaint: str) -> Question:
    """Each text on one line, as an example is. Raises ValueError, with the complaint, for what is no question with answers."""
    texts = [text, *answers] if isinstance(answers, list) and answers else [None]
    require(all(isinstance(x, str) and x.strip() for x in texts), complaint)
    text, *answers = (" ".join(x.split()) for x in texts)
    return Question(text, tuple(answers))


def read_trec(path: Path) -> Iterator[Question]:
    """Lines such as `DESC:manner How did serfdom develop ?`, of the label `description manner`."""
    for n, line in enumerate(path.read_text(encoding="latin-1").rstrip().split("\n"), 1):
        complaint = f"{path}, line {n} is no TREC label and question, such as DESC:manner How did serfdom develop ?"
        match = re.fullmatch(r"([A-Z]+):(\w+) (.+)", line)
        require(match is not None and match[1] in COARSE, complaint)
        yield checked(match[3], [f"{COARSE[match[1]]} {match[2]}"], complaint)


def read_webqs(path: Path) -> Iterator[Question]:
    """Objects with an `utterance`, and a `targetValue` such as `(list (description "James K. Polk") (description 1845))`."""
    try:
        rows = [(row["utterance"], str(row["targetValue"])) for row in json.loads(read_text(path))]
    except (ValueError, RecursionError, KeyError, TypeError):  # RecursionError: nested too deep
        raise ValueError(f"{path} is no list of questions as WebQuestions has them") from None
    for n, (text, values) in enumerate(rows, 1):
        found = re.findall(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]+))\)', values)
        answers = [re.sub(r"\\(.)", r"\1", quoted or plain) for quoted, plain in found]
        yield checked(text, answers, f"{path}: question {n} has no text, or no answer")


def read_rows(path: Path) -> Iterator[tuple[Question, bool]]:
    """Of each line of a file of JSON lines, the question, and whether its answer is a label."""
    for where, row in read_json_lines(str(path), "--task"):
        complaint = (
            f'{where} is neither {{"text": TEXT, "label": TEXT}} nor {{"question": TEXT, "answers": [TEXT, ...]}}'
        )
        labelled = "label" in row
        text, answers = (row.get("text"), [row["label"]]) if labelled else (row.get("question"), row.get("answers"))
        yield checked(text, answers, complaint), labelled


def as_task(train: list[Question], test: list[Question], labelled: bool) -> Task:
    return Task(train, test, sorted({question.answers[0] for question in (*train, *test)}) if labelled else [])


def split(path: Path) -> Task:
    """A file of JSON lines: examples and questions by a hash of the text, so that more lines change nothing for these."""
    rows = [*read_rows(path)]
    kinds = {labelled for _, labelled in rows}
    train, test = parts = [], []
    require(len(kinds) < 2, f"--task {path} has both labels and answers: make it two files")
    for question, _ in rows:
        parts[sha256(question.text.encode()).digest()[0] % TESTED == 0].append(question)
    few = f"--task {path} has too few lines, {len(rows)}: about one in {TESTED} is asked, and the others are examples"
    require(bool(train and test), few)
    return as_task(train, test, *kinds)


def load_task(name: str, folder: Path) -> Task:
    """One of SOURCES, whose files are in the folder, or a file of JSON lines. Raises OSError or ValueError."""
    if name not in SOURCES:
        return split(Path(name))
    files, source = SOURCES[name]
    missing = [file for file in files if not (folder / file).is_file()]
    require(not missing, f"--task {name} needs {' and '.join(missing)} in {folder}: {source}")
    if name == "wordnet":
        return split(folder / files[0])
    train, test = ([*(read_trec if name == "trec" else read_webqs)(folder / file)] for file in files)
    require(bool(train and test), f"--task {name}: {' or '.join(files)} in {folder} has no questions")
    return as_task(train, test, labelled=name == "trec")
