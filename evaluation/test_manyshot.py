"""Many-shot evaluation, checked: python -m pytest evaluation

Truth is a scorer on transformers' LlamaForCausalLM that reads every prompt anew, and SQuAD's definition, written out in cases.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.loading import TINY
from evaluation import manyshot
from evaluation.fetch_wordnet import glosses
from evaluation.manyshot import WRITTEN, Exam, Result, as_asked, fit, normalised, table
from evaluation.questions import Question, Task, load_task
from experiments.test_experiments import one_thread  # noqa: F401  as there
from fast import FastConfig, FastLlama
from tokenizer import Tokenizer

ROOT = TINY.parent
TOKENIZERS = [TINY / "tokenizer.model", ROOT / "testdata" / "prose.model"]
TOKENIZERS += sorted((ROOT.parent / "shared" / "tokenizers").glob("*.model"))  # too large to be kept here
WORDS = ["whale", "ship", "proof", "theorem", "king", "river", "gold", "seven", "green", "union"]


def texts(n: int) -> list[str]:
    return [f"{WORDS[i % 10]} of the {WORDS[i * 7 % 9]} {WORDS[(i + i // 10) % 10]}{' ?' * (i % 2)}" for i in range(n)]


LABELS = ["noun", "noun animal", "verb", "a rather long label, of words", "adverb 12"]
LABELLED = Task(
    [Question(text, (LABELS[i % 5],)) for i, text in enumerate(texts(50)[:40])],
    [Question(text, (LABELS[i % 5],)) for i, text in enumerate(texts(50)[40:])],
    LABELS,
)
ANSWERED = Task(LABELLED.train, LABELLED.test, [])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY / "tokenizer.model")


@pytest.fixture(scope="module")
def tiny():
    return FastLlama.from_pretrained(TINY, mem_dtype="float32")


@pytest.fixture
def run(monkeypatch):
    """run(*flags): the exit status of the program."""

    def run(*flags) -> int:
        monkeypatch.setattr(sys, "argv", ["manyshot.py", *map(str, flags)])
        try:
            manyshot.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


@pytest.fixture
def rows(tmp_path):
    """A file of 80 lines, half of them much longer than the others."""
    lines = [{"text": text * (1 + i % 2 * 3), "label": LABELS[i % 3]} for i, text in enumerate(texts(80))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shown(task: Task, n: int) -> str:
    return "\n".join(map(task.show, task.train[:n]))


# ------------------------------------------------------------------------------------------------------- Classification


@torch.no_grad()
def naive_scores(reference: LlamaForCausalLM, tokenizer: Tokenizer, task: Task, examples: str, question: Question):
    """The mean log-probability of each label, from a prompt of one text, read anew."""
    prompt, scores = f"{examples}\n{task.ask(question)}", []
    for label in task.labels:
        start, ids = len(tokenizer.encode(prompt)), torch.tensor(tokenizer.encode(f"{prompt} {label}"))
        logprobs = reference(ids[None]).logits[0].log_softmax(dim=-1)
        scores.append(logprobs[start - 1 : -1].gather(-1, ids[start:, None]).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_labels_and_their_scores_are_those_of_a_naive_scorer_on_transformers(batch_size, tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 2048, "max_position_embeddings": 1024}
    reference = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    model = FastLlama(FastConfig(**shape, mem_layers=(1,))).eval()
    reference.load_state_dict(model.hf_tensors())
    exam, examples = Exam(model, tokenizer, LABELLED, LABELLED.test, batch_size), shown(LABELLED, 20)
    cache = exam.read(tokenizer.encode(examples))
    assert cache.memory_length == 0 and cache.local_length > 300  # all is local: LLaMA
    right = []
    for asked in exam.asked:
        expected = naive_scores(reference, tokenizer, LABELLED, examples, asked.question)
        scores = exam.label_scores(cache, asked)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        assert scores.argmax() == expected.argmax()
        right.append(LABELS[expected.argmax()] in asked.question.answers)
    assert exam.answers(cache) == right and len({*right}) == 2


@torch.no_grad()
def test_with_memory_scores_are_those_of_one_reading_of_examples_question_and_label(tiny, tokenizer):
    exam, ids = Exam(tiny, tokenizer, LABELLED, LABELLED.test[:4]), tokenizer.encode(shown(LABELLED, 40))
    cache, last = exam.read(ids), min(128, 256 - exam.room)
    assert cache.local_length == last and cache.memory_length == len(ids) - last > 2 * 256
    for asked in exam.asked:
        for label, score in zip(asked.labels, exam.label_scores(cache, asked)):
            after = torch.tensor(asked.ids + label)
            whole = torch.cat((torch.tensor(ids), after))
            logits, _ = tiny(whole[None], last_context_length=last + len(after))
            logprobs = logits[0, -len(label) - 1 : -1].log_softmax(dim=-1)
            torch.testing.assert_close(score, logprobs.gather(-1, after[-len(label) :, None]).mean(), atol=1e-4, rtol=0)
    assert cache.local_length == last  # questions went on from forks


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.name)
@pytest.mark.parametrize("task", [LABELLED, ANSWERED], ids=["labels", "answers"])
def test_the_pieces_of_a_prompt_are_those_of_its_whole_text(path, task):
    tokenizer = Tokenizer(path)
    hard = ['  "Quoted", he said ...  twice', "naïve 東京 12,345 \u2014 \U0001f40b", "(a) b:c/d", "ends in Type:", "x"]
    task = Task([Question(" ".join(text.split()), ("noun animal",)) for text in hard] + task.train, [], task.labels)
    examples = shown(task, 12)
    for question in task.train:
        asked = as_asked(tokenizer, task, question)
        for label, ids in zip(task.labels, asked.labels):
            whole = tokenizer.encode(f"{examples}\n{task.ask(question)} {label}")
            assert whole == tokenizer.encode(examples) + asked.ids + ids
        assert tokenizer.encode(f"{examples}\n{task.ask(question)}") == tokenizer.encode(examples) + asked.ids


# ----------------------------------------------------------------------------------------------------------- Generation


@torch.no_grad()
def test_answers_are_written_as_each_prompt_alone_is_continued_up_to_a_line_break(tiny, tokenizer):
    exam, ids = Exam(tiny, tokenizer, ANSWERED, ANSWERED.test, batch_size=3), tokenizer.encode(shown(ANSWERED, 40))
    texts, whole_lines = exam.written(exam.read(ids)), 0
    last = min(128, 256 - exam.room)
    for asked in exam.asked:
        prompt = torch.tensor([ids + asked.ids])
        said = tiny.generate(prompt, WRITTEN, temperature=0, last_context_length=last + len(asked.ids))
        text = tokenizer.decode(prompt[0].tolist() + [i.item() for i in said])[
            len(tokenizer.decode(prompt[0].tolist())) :
        ]
        assert texts[asked.question] == text.split("\n")[0]
        whole_lines += "\n" in text
    assert whole_lines and len({len(asked.ids) for asked in exam.asked}) > 1


class Says(Exam):
    """Writes the same to every question."""

    said = ""

    def written(self, cache):
        return {asked.question: self.said for asked in self.asked}


@pytest.mark.parametrize(
    "said, right", [("The U.S.A.", True), (" america", True), ("us", False), ("USA America", False)]
)
def test_an_answer_is_right_if_it_is_any_of_those_that_the_question_has(said, right, tiny, tokenizer):
    question = Question("where?", ("USA", "an America!"))
    exam = Says(tiny, tokenizer, Task(ANSWERED.train, [question], []), [question])
    exam.said = said
    assert exam.answers(tiny.new_cache()) == [right]


@pytest.mark.parametrize(
    "text, right",
    [
        ("The Eiffel Tower!", "eiffel tower"),  # lower case, no punctuation, no article
        (" a  cat\tand an Owl\n", "cat and owl"),  # single spaces, none around
        ("U.S.A.", "usa"),  # punctuation goes without a trace
        ("the-end", "theend"),  # and goes first, so this is no article
        ("theatre another man", "theatre another man"),  # articles are whole words
        ("‘the’ end", "‘ ’ end"),  # punctuation is ASCII's, and an article may stand beside another mark
        ("A", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_squad_defines_it(text, right):
    assert normalised(text) == right


# -------------------------------------------------------------------------------------------------------------- Prompts


def test_as_many_examples_as_fit_are_shown(tokenizer):
    lines = [LABELLED.show(question) for question in LABELLED.train]
    for room in (60, 150, 151, 152, 153, 154, 155):
        n, ids = fit(tokenizer, lines, room)
        assert ids == tokenizer.encode("\n".join(lines[:n])) and len(ids) <= room
        assert len(tokenizer.encode("\n".join(lines[: n + 1]))) > room
    assert fit(tokenizer, lines, 10**6)[0] == len(lines) and fit(tokenizer, lines, 3)[0] == 0


@torch.no_grad()
def test_no_prompt_is_longer_than_asked_for_and_none_overflows_the_window(tiny, tokenizer):
    task = Task(LABELLED.train, [*LABELLED.test, Question("long " * 90, ("noun",))], LABELS)
    exam, windows = Exam(tiny, tokenizer, task, task.test), []
    assert 128 < exam.room < 256
    hook = tiny.embed_tokens.register_forward_hook(lambda module, inputs, output: windows.append(inputs[0].numel()))
    result = exam.measure("tiny", 700, range(40))
    hook.remove()
    lines = [task.show(question) for question in task.train[: result.examples]]
    ids = len(tokenizer.encode("\n".join(lines)))
    assert ids + exam.room <= 700 and sum(windows[: -(-ids // 256) + 1]) == ids
    cache = exam.read(tokenizer.encode("\n".join(lines)))
    assert cache.local_length == 256 - exam.room
    exam.label_scores(cache, exam.asked[-1])


def test_the_same_command_draws_the_same_examples_and_another_draw_others(rows, run, capsys):
    flags = ["--task", rows, "--lengths", "512", "--questions", 3, "--draws"]
    outputs = []
    for draws in (4, 4, 1):
        assert run(*flags, draws) == 0
        outputs.append(capsys.readouterr())
    counts = [[line.split(", read")[0] for line in err.splitlines()[2:]] for _, err in outputs]
    assert outputs[0].out == outputs[1].out and counts[0] == counts[1] and len({*counts[0]}) > 1
    assert counts[2] == counts[0][:1]


# ---------------------------------------------------------------------------------------------------------------- Files


def test_trec_and_webquestions_are_read_as_their_authors_wrote_them(tmp_path):
    train = "DESC:manner How did serfdom develop in Russia ?\r\nNUM:dist How tall is the Caf\u00e9\x85tower ?\r\n"
    (tmp_path / "train_5500.label").write_text(train, encoding="latin-1", newline="")
    (tmp_path / "TREC_10.label").write_text("DESC:manner How far is it ?\n", encoding="latin-1")
    task = load_task("trec", tmp_path)
    assert task.labels == ["description manner", "number dist"]
    assert task.show(task.train[1]) == "Question: How tall is the Café tower ? Type: number dist"
    assert task.ask(task.test[0]) == "Question: How far is it ? Type:" and task.test[0].answers == (
        "description manner",
    )
    answers = {
        "who?": (
            '(list (description "Jazmyn (Jaz) Bieber") (description Padm\u00e9))',
            ("Jazmyn (Jaz) Bieber", "Padmé"),
        ),
        "which?": ('(list (description "The \\"Zone\\"") (description 1.5))', ('The "Zone"', "1.5")),
    }
    rows = [{"url": "x", "utterance": text, "targetValue": value} for text, (value, _) in answers.items()]
    for part in ("train", "test"):
        (tmp_path / f"webquestions.examples.{part}.json").write_text(json.dumps(rows))
    task = load_task("webqs", tmp_path)
    assert task.labels == [] and task.test == [Question(text, right) for text, (_, right) in answers.items()]
    assert task.show(task.train[0]) == "Question: who? Answer: Jazmyn (Jaz) Bieber"


def test_a_file_of_ones_own_is_split_by_its_texts_and_more_lines_move_none(rows, tmp_path):
    task, path = load_task(str(rows), tmp_path), tmp_path / "more.jsonl"
    path.write_text(json.dumps({"text": "one\nmore", "label": "other"}) + "\n\n" + rows.read_text())
    more = load_task(str(path), tmp_path)
    assert {*task.train} < {*more.train} | {Question("one more", ("other",))} and {*task.test} <= {*more.test}
    assert not {*more.train} & {*more.test} and len(task.test) in range(3, 25)
    assert task.labels == sorted(LABELS[:3]) and more.labels == sorted([*LABELS[:3], "other"])
    path.write_text("".join(json.dumps({"question": text, "answers": ["a", "b"]}) + "\n" for text in texts(40)))
    assert load_task(str(path), tmp_path).labels == []


def test_wordnets_glosses_are_read_from_its_package(tmp_path):
    data, manual = tmp_path / "usr/share/wordnet", tmp_path / "usr/share/man/man5"
    data.mkdir(parents=True)
    manual.mkdir(parents=True)
    with gzip.open(manual / "lexnames.5WN.gz", "wt") as file:
        file.write("_\n00\tadj.all\tall\n05\tnoun.animal\tnouns denoting animals\n29\tverb.body\tverbs of care\n")
    licence = "  1 This software and database is | free  \n"
    (data / "data.noun").write_text(
        licence + '01 05 n 02 cat 0 true_cat 0 001 @ 02 n 0000 | feline mammal; usually soft; "a cat"; "cats purr"  \n'
        f"02 05 n 01 dog 0 000 | {'long ' * 50}  \n03 05 n 01 cut 0 000 | in two files  \n"
    )
    (data / "data.verb").write_text(licence + "04 29 v 01 shave 0 000 01 + 08 00 | remove body hair with a razor  \n")
    (data / "data.adj").write_text(licence + "05 00 a 01 able 0 000 | in two files  \n")
    (data / "data.adv").write_text(licence)
    assert glosses(tmp_path) == {
        "feline mammal; usually soft": "noun animal",
        "remove body hair with a razor": "verb body",
    }


GOOD = json.dumps({"text": "good", "label": "yes"})


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("trec", {}, ["train_5500.label and TREC_10.label", "https://cogcomp"]),
        ("webqs", {}, ["webquestions.examples.train.json", "https://nlp.stanford"]),
        ("wordnet", {}, ["wordnet.jsonl", "python evaluation/fetch_wordnet.py"]),
        ("trec", {"train_5500.label": "DESC:manner How ?\nWHY:x How ?", "TREC_10.label": ""}, ["line 2 is no TREC"]),
        (
            "webqs",
            {
                f"webquestions.examples.{part}.json": '[{"utterance": "a", "targetValue": "(list)"}]'
                for part in ("train", "test")
            },
            ["question 1 has no text, or no answer"],
        ),
        ("webqs", {f"webquestions.examples.{part}.json": "{}" for part in ("train", "test")}, ["has no questions"]),
        ("nowhere.jsonl", {}, ["nowhere.jsonl", "No such file"]),
        ("own", {"own": f"{GOOD}\nbad"}, ["line 2 is broken JSON"]),
        ("own", {"own": f'{GOOD}\n{{"text": "a", "label": ""}}'}, ["line 2 is neither"]),
        ("own", {"own": f'{GOOD}\n{{"question": "a", "answers": "b"}}'}, ["line 2 is neither"]),
        ("own", {"own": f"{GOOD}\n[1]"}, ["line 2 is no JSON object"]),
        ("own", {"own": f'{GOOD}\n{{"question": "a", "answers": ["b"]}}'}, ["both labels and answers"]),
        ("own", {"own": GOOD}, ["too few lines, 1"]),
        ("own", {"own": ""}, ["too few lines, 0"]),
    ],
)
def test_files_that_are_missing_or_wrong_are_one_line_and_exit_status_2(name, content, named, run, tmp_path, capsys):
    for file, text in content.items():
        (tmp_path / file).write_text(text)
    assert run("--task", tmp_path / name if "own" in name else name, "--data", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(x in err for x in named)


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "--task"),
        (["--task", "trec", "--lengths", "x"], "--lengths"),
        (["--task", "trec", "--draws", "0"], "--draws"),
        (["--task", "trec", "--picture", "shots.doc"], ".png"),
    ],
)
def test_mistakes_in_flags_are_one_line_and_exit_status_2(flags, named, run, capsys):
    assert run(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and named in err


# --------------------------------------------------------------------------------------------------- Tables and pictures


def test_the_table_has_mean_and_spread_over_draws_and_blanks_where_nothing_was_measured():
    results = [
        Result("a", 2048, 20, 0.5),
        Result("a", 2048, 23, 0.7),
        Result("a", 512, 5, 0.25),
        Result("b", 2048, 9, 1.0),
    ]
    assert table(results).splitlines() == [
        "| model | | 512 | 2k |",
        "| --- | --- | --- | --- |",
        "| a | right | 25.0% | 60.0% ± 14.1 |",  # of two, each 10 from the mean: 10 * sqrt(2)
        "| a | examples | 5 | 22 |",
        "| b | right |  | 100.0% |",
        "| b | examples |  | 9 |",
    ]


def test_the_table_is_written_and_a_picture_drawn_and_what_was_measured_is_told_where_a_model_fails(
    rows, run, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    plain, files = tmp_path / "plain", [tmp_path / "table.md", tmp_path / "shots.svg"]
    shutil.copytree(TINY, plain)
    (plain / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | {"mem_layers": []}))
    flags = ["--task", rows, "--lengths", "256,512", "--draws", 2, "--questions", 2, "--model"]
    assert run(*flags, TINY, "--table", files[0], "--picture", files[1]) == 0
    out, err = capsys.readouterr()
    assert files[0].read_text() == out and "<!-- tiny -->" in files[1].read_text()
    assert "2 of " in err.splitlines()[0] and "3 labels; always the commonest" in err and "read once in" in err
    assert "tiny: 2 of 3 labels begin with the same token as another" in err  # noun, noun animal
    files[0].unlink()
    assert run(*flags, plain, "--table", files[0]) == 2
    out, err = capsys.readouterr()
    assert [line.split(" | ")[:2] for line in out.splitlines()[2:]] == [["| plain", "right"], ["| plain", "examples"]]
    assert "without mem_layers" in err and out.splitlines()[0] == "| model | | 256 |" and not files[0].exists()
