"""The experiments' programs, checked: python -m pytest experiments"""

import argparse
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.loading import TINY
from convert import save_pretrained
from examples.knn_memory import ask
from experiments import dictionary, distraction, passkey
from experiments import perplexity as evaluation
from experiments.dictionary import KEY, RECORD, VALUE, WINDOW, K, Q, Stage, V
from experiments.documents import add_document_flags, document_files
from experiments.perplexity import change, perplexity, positions, window_losses
from fast import FastConfig, FastLlama
from tokenizer import Tokenizer
from training.data import BOOK as HELD
from training.data import held_out, text_files
from training.tasks import prompt_ids, random_key

BOOK = (TINY / "book.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tiny model's tensors are too small to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    return FastLlama.from_pretrained(TINY), Tokenizer(TINY / "tokenizer.model")


@pytest.fixture
def run(monkeypatch):
    """run(main, *flags): the exit status of a program."""

    def run(main, *flags) -> int:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]


def models(folder: Path) -> tuple[Path, Path]:
    """Two more of the tiny model: one of the same name, and one without memory layers."""
    other, plain = folder / "tiny", folder / "plain"
    for path, changes in ((other, {}), (plain, {"mem_layers": []})):
        shutil.copytree(TINY, path)
        config = json.loads((TINY / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
    return other, plain


# -------------------------------------------------------------------------------------------------------- Documents


def texts(folder: Path, book: str) -> Path:
    """A folder of short documents, and one that is held out whatever other documents there are."""
    folder.mkdir()
    for i in range(300):
        (folder / f"{('hol', 'coq')[i % 2]}_{i:03}.txt").write_text("Short.", encoding="utf-8")
    (folder / HELD).write_text(book, encoding="utf-8")
    return folder


def test_only_held_out_documents_whose_names_match_are_read(tmp_path):
    files = held_out(text_files(texts(tmp_path / "data", "Long.")))

    def found(*patterns: str) -> list[Path]:
        parser = argparse.ArgumentParser()
        add_document_flags(parser)
        flags = ["--data", str(tmp_path / "data"), *(["--documents", *patterns] if patterns else [])]
        return document_files(parser.parse_args(flags))

    assert found() == found("*") == files and len(files) > 3
    assert found("moby_*") == found("*_dick_???.txt", "moby*") == [tmp_path / "data" / HELD]
    assert found("moby_*", "hol_*") == [file for file in files if not file.name.startswith("coq")]


@pytest.mark.parametrize("program", [evaluation, distraction])
def test_a_pattern_that_no_document_matches_is_named(program, run, tmp_path, capsys):
    data = texts(tmp_path / "data", "Long.")
    assert run(program.main, "--data", data, "--documents", "moby_*", "MOBY_*") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--documents MOBY_*: none" in err and str(data) in err


def test_perplexity_is_that_of_the_documents_asked_for(run, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in [f"hol_{i}.txt" for i in range(100)] + [HELD]:
        (tmp_path / "data" / name).write_text(BOOK[: 5000 if name == HELD else 2000], encoding="utf-8")
    flags = ["--data", tmp_path / "data", "--windows", "0", "--stride", "1"]
    tokens = {}
    for patterns in (["*"], ["moby_*"], ["hol_*"]):
        assert run(evaluation.main, *flags, "--documents", *patterns) == 0
        tokens[patterns[0]] = int(rows(capsys.readouterr().out)[-1][-1].replace(",", ""))
    ids = [len(Tokenizer(TINY / "tokenizer.model").encode(BOOK[:n])) for n in (5000, 2000)]
    assert tokens["moby_*"] == (ids[0] - 1) // 256 * 256 and tokens["hol_*"] % ((ids[1] - 1) // 256 * 256) == 0
    assert tokens["*"] == tokens["moby_*"] + tokens["hol_*"]


# -------------------------------------------------------------------------------------------------------- Pass keys


def test_a_pass_key_is_hidden_in_text_only(run, tmp_path, capsys):
    (tmp_path / "book").write_bytes(b"caf\xe9")
    assert run(passkey.main, "--text", tmp_path / "book") == 2
    out, err = capsys.readouterr()
    assert f"--text {tmp_path / 'book'} is not UTF-8 text (byte 3)" in err and err.count("\n") == 1 and out == ""


def test_the_pass_key_table_has_a_row_for_each_model_and_is_printed_where_one_fails(run, tmp_path, capsys):
    other, plain = models(tmp_path)
    flags = ["--lengths", "512,512", "--trials", "2", "--filler", "grass", "--model"]
    assert run(passkey.main, *flags, TINY, other, TINY, plain) == 2
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if "grass" in line]
    names = [f"| {name}{kind}" for name in (TINY, other) for kind in ("", ", no memory")]
    assert [row.split(" | ")[0] for row in rows] == names
    assert all(row.endswith("(2) |") for row in rows) and "exceed the window" in err


def test_tiny_finds_a_pass_key_hundreds_of_windows_back(tiny, run, capsys):
    assert run(passkey.main, "--lengths", "64k", "--trials", "1", "--filler", "text", "--seed", "4") == 0  # at 4%
    assert "100% (1)" in capsys.readouterr().out
    model, tokenizer = tiny
    text, rng = tokenizer.encode(BOOK, bos=False), torch.Generator().manual_seed(0)
    blind = FastLlama.from_pretrained(TINY, mem_layers=())  # the same question without what memory holds
    for depth in (0.1, 0.9):
        ids = torch.tensor([prompt_ids(tokenizer, 1 << 12, depth, "90417", text, rng)])
        assert ids.shape == (1, 1 << 12)
        found = tokenizer.decode([i.item() for i in model.generate(ids, 6, temperature=0)])
        lost = tokenizer.decode([i.item() for i in blind.generate(ids[:, -128:], 6, temperature=0)])
        assert found.strip() == "90417" != lost.strip()


def test_without_memory_a_pass_key_is_found_in_the_last_window_alone(tiny):
    model, tokenizer = tiny
    fillers = {"text": tokenizer.encode(BOOK, bos=False)}
    blind = FastLlama.from_pretrained(TINY, mem_layers=())  # has none, and refuses more than its window
    trials, others, remembered = (
        passkey.measure(of, tokenizer, "tiny", fillers, 800, 6, 2, remembers)
        for of, remembers in ((model, False), (blind, False), (model, True))
    )
    assert trials == others and [t.depth for t in trials] == [t.depth for t in remembered]
    near, far = ([t.found for t in trials if (t.depth > 1 - 256 / 800) == end] for end in (True, False))
    assert any(near) and not any(far) and sum(t.found for t in remembered) > sum(near)


TOKENIZERS = [TINY / "tokenizer.model", *sorted((TINY.parent.parent / "shared" / "tokenizers").glob("*.model"))]


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.name)
def test_the_originals_prompt_has_about_the_length_asked_for_and_its_filler_begins_anew_behind_the_key(path):
    tokenizer = Tokenizer(path)
    for length, depth, key in (100, 0.0, "7"), (3000, 0.37, "49999"), (20000, 1.0, "123"):
        ids = passkey.original_prompt(tokenizer, length, depth, key)
        assert abs(len(ids) - length) <= 8
        intro, before, needle, after, question = tokenizer.decode(ids).split("\n")
        assert intro.startswith("There is an important info") and question == "What is the pass key? The pass key is"
        assert needle == f"The pass key is {key}. Remember it. {key} is the pass key."
        grass = " ".join([passkey.GRASS] * 9000)
        assert all(grass.startswith(x) for x in (before, after)) and len(before) == round(depth * len(before + after))
    with pytest.raises(ValueError, match="at least"):
        passkey.original_prompt(tokenizer, 20, 0.5, "7")


@pytest.mark.skipif(len(TOKENIZERS) == 1, reason="needs OpenLLaMA's tokenizer")
def test_as_many_characters_of_filler_as_in_the_original_make_as_many_tokens():
    """Counted by the original's script: 440,000 characters, 117,404 tokens."""
    tokenizer = Tokenizer(TOKENIZERS[1])
    _, before, _, after, _ = tokenizer.decode(passkey.original_prompt(tokenizer, 117404, 0.5, "12345")).split("\n")
    assert abs(len(before + after) - 440_000) < 40


def test_the_original_draws_numbers_of_one_to_five_digits_and_tiny_finds_them(tiny, run, capsys):
    rng = torch.Generator().manual_seed(0)
    keys = [passkey.original_key(rng) for _ in range(20_000)]
    assert {len(key) for key in keys} == {1, 2, 3, 4, 5} and 49_900 < max(map(int, keys)) <= 50_000 and "0" not in keys
    assert run(passkey.main, "--filler", "original", "--lengths", "2k", "--trials", "3") == 0
    [_, _, remembered, alone] = rows(capsys.readouterr().out)
    assert remembered == ["tiny", "original", "100% (3)"] and alone[:2] == ["tiny, no memory", "original"]


class Sure(FastLlama):
    """Says what it is told to."""

    said: tuple[int, ...] = ()

    def generate(self, input_ids, max_new_tokens, **sampling):
        for i in [*self.said, *[0] * max_new_tokens][:max_new_tokens]:
            yield torch.full((len(input_ids),), i)


@pytest.mark.parametrize("pieces", [(), ("KEY",), ("\u2581KEY",), ("KEY.",)], ids=str)
@pytest.mark.parametrize(
    "text, found", [(" KEY.", True), (" KEY", True), (" KEY7", False), (" 4KEY", False), (" KE", False)]
)
def test_a_pass_key_is_found_by_any_tokenizer_where_it_is_said(pieces, text, found, tmp_path):
    key = random_key(torch.Generator().manual_seed(0))
    pieces = [piece.replace("KEY", key) for piece in pieces]
    with (tmp_path / "m").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["What is the key? 0 1 2 3 4 5 6 7 8 9."] * 9), model_writer=file, vocab_size=400,
            hard_vocab_limit=False, byte_fallback=True, minloglevel=2, user_defined_symbols=pieces,
        )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "m")
    model = Sure(
        FastConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.said = tuple(tokenizer.encode(text.replace("KEY", key).replace("KE", key[:4]).strip(), bos=False))
    [trial] = passkey.measure(model, tokenizer, "sure", {"text": [5, 6]}, 400, 1, seed=0)
    assert trial.found == found == ask(model, tokenizer, torch.ones(1, 9), key, model.new_cache()).found


def test_a_table_is_written_and_a_picture_drawn(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "table.md", tmp_path / "found.svg"
    flags = ["--lengths", "512,1k", "--trials", 2, "--filler", "grass", "--table", table, "--picture", picture]
    assert run(passkey.main, *flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.svg", "table.md"]
    assert table.read_text() == capsys.readouterr().out and rows(table.read_text())[0][2:] == ["512", "1k"]
    assert "<!-- tiny, no memory -->" in picture.read_text()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lengths", "10"], "at least"),
        (["--lengths", "x"], "'x' is no length"),
        (["--trials", "0"], "--trials"),
        (["--model", "nowhere"], "nowhere"),
        (["--picture", "found.doc"], ".png"),
        (["--table", "nowhere/table.md"], "--table"),
        (["--memory", "nowhere.py:Mine"], "--memory"),
        (["--trials", "1" + "0" * 30], "--trials"),
        (["--depth-bins", "1" + "0" * 30], "--depth-bins"),
    ],
)
def test_mistakes_in_flags_are_one_line_and_exit_status_2(flags, named, run, capsys):
    assert run(passkey.main, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and named in err


# ------------------------------------------------------------------------------------------------------- Perplexity


@torch.no_grad()
def test_memory_lowers_the_perplexity_of_tiny_on_a_book_it_never_saw(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(BOOK)])[:, : 40 * 256]
    with_memory, _ = model(ids, last_context_length=256)
    without = model(ids.view(40, 256))[0].view_as(with_memory)
    losses = [F.cross_entropy(x[0, 256:-1], ids[0, 257:]).item() for x in (with_memory, without)]
    assert losses[0] < losses[1]


def source(tokenizer: Tokenizer, name: str) -> torch.Tensor:
    """A file of this repository, which tiny has never seen either, as ids."""
    return torch.tensor(tokenizer.encode((TINY.parent / name).read_text(encoding="utf-8")))


def test_memory_lowers_the_perplexity_of_tiny_on_this_code_and_more_of_it_lowers_it_further(tiny):
    model, tokenizer = tiny
    documents = [source(tokenizer, "longllama.py")]
    none, one, many = (perplexity(window_losses(model, documents, memory, 16, 4)) for memory in (0, 1, 16))
    assert many < 0.85 * one and one < 0.85 * none


@torch.no_grad()
def test_perplexity_is_of_the_same_windows_with_any_memory(tiny):
    """Against each window, read by hand after the windows before it."""
    model, tokenizer = tiny
    documents = [torch.tensor(tokenizer.encode(BOOK[start : start + 9000])) for start in (0, 20000)]
    for memory in (0, 2):
        losses = []
        for document in documents:
            for w in range(3, (len(document) - 1) // 256, 2):
                cache = model.new_cache()
                for before in range(w - memory, w):
                    model(document[None, before * 256 : (before + 1) * 256], cache, last_context_length=256)
                logits, _ = model(document[None, w * 256 : (w + 1) * 256], cache, last_context_length=256)
                losses.append(F.cross_entropy(logits[0], document[w * 256 + 1 : (w + 1) * 256 + 1]))
        found = window_losses(model, documents, memory, 3, stride=2)
        assert torch.cat(found).shape == (len(losses), 256) and len(losses) >= 6 and len(found) == 2
        assert perplexity(found) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-3)
    with pytest.raises(ValueError, match="no document is longer than 1000 windows"):
        window_losses(model, documents, 0, 1000, stride=1)


@torch.no_grad()
def test_perplexity_by_position_is_that_of_documents_read_whole_and_of_windows_read_alone(tiny):
    model, tokenizer = tiny
    n, window = 5, 256
    texts = torch.tensor([tokenizer.encode(BOOK[start:])[: n * window + 1] for start in (0, 20000)])
    whole, _ = model(texts[:, :-1], last_context_length=window)
    alone, _ = model(texts[:, :-1].reshape(2 * n, window), last_context_length=window)
    alone = alone.view_as(whole)
    for logits, remembers in (whole, True), (alone, False):
        losses = F.cross_entropy(logits.mT, texts[:, 1:], reduction="none")
        right = [losses[:, a * window : b * window].mean().exp().item() for a, b in ((0, 1), (1, 2), (2, 4), (4, 5))]
        assert evaluation.by_position(model, texts, remembers) == pytest.approx(right, rel=1e-4)
    assert not torch.allclose(whole[:, window:], alone[:, window:], atol=0.1)  # so the two cases are not one


def drawn(*counts: int, window: int = 160) -> list[torch.Tensor]:
    """Losses of so many windows of documents, each with something of its own."""
    rng = torch.Generator().manual_seed(sum(counts) + window)
    return [torch.rand(n, window, generator=rng).double() + torch.rand(1, generator=rng).item() for n in counts]


def test_the_error_of_what_memory_changes_is_that_of_documents_and_not_of_their_windows():
    """By the naive formula; and where documents have as many windows, by that of the mean of their means."""
    losses, none = drawn(3, 7, 1, 4), drawn(3, 7, 1, 5)[:3] + drawn(4)
    total, n = 0.0, 0
    for x, y in zip(losses, none):
        for a, b in zip(x.tolist(), y.tolist()):
            total, n = total + sum(p - q for p, q in zip(a[64:128], b[64:128])) / 64, n + 1
    squares = 0.0
    for x, y in zip(losses, none):
        stray = sum((a - b)[64:128].mean().item() - total / n for a, b in zip(x, y))
        squares += stray**2
    assert change(losses, none, 64, 128) == pytest.approx((total / n, (squares * 4 / 3) ** 0.5 / n))
    same, others = drawn(5, 5, 5), drawn(5, 5, 5, window=161)
    means = np.array([(x - y[:, :160])[:, :64].mean().item() for x, y in zip(same, others)])
    found = change(same, [y[:, :160] for y in others], 0, 64)
    assert found == pytest.approx((means.mean(), means.std(ddof=1) / 3**0.5))
    repeated = [[x.repeat(9, 1) for x in some] for some in (losses, none)]  # windows that tell nothing new
    assert change(*repeated, 64, 128) == pytest.approx(change(losses, none, 64, 128))


def test_losses_by_position_in_the_window_are_those_of_its_tokens():
    none, one = drawn(2, 4), drawn(2, 4, window=161)
    found = positions({1: [x[:, :160] for x in one], 0: none})
    assert [row[0] for row in found] == ["0-63", "64-127", "128-159", "0-159"]
    for (start, stop), row in zip(((0, 64), (64, 128), (128, 160), (0, 160)), found):
        whole, other = (torch.cat(x)[:, start:stop].mean().item() for x in (none, one))
        assert float(row[1]) == pytest.approx(whole, abs=6e-4)
        assert float(row[2].split(" ± ")[0]) == pytest.approx(other - whole, abs=6e-4) and len(row) == 3
    (row,) = positions({0: drawn(3, window=64), 1: drawn(3, window=64)})
    assert row[2] == "+0.000"  # of one document: no error is told


def test_bins_double_up_to_the_windows_asked_for():
    assert evaluation.labels(1) == ["1"] and evaluation.labels(8) == ["1", "2", "3-4", "5-8"]
    assert evaluation.labels(65) == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65"]


def test_the_picture_of_perplexity_compares_the_same_tokens_with_memory_and_without(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, other = texts(tmp_path / "data", BOOK[:5000]), models(tmp_path)[0]
    files = ["--table", tmp_path / "table.md", "--picture", tmp_path / "picture.svg"]
    assert run(evaluation.main, "--data", data, "--windows", "0", "2", "--model", TINY, other, *files) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "table.md").read_text() == out and len(rows(out)) == 4
    drawn = (tmp_path / "picture.svg").read_text()
    assert all(f"{name}, {kind}" in drawn for name in (TINY, other) for kind in ("with memory", "each window alone"))
    found = re.findall(r"window (\d) of 1 documents: ([\d.]+), alone ([\d.]+)", err)
    assert [label for label, _, _ in found] == ["1", "2"] * 2 and found[:2] == found[2:]  # two of the same model
    assert found[0][1] == found[0][2] and found[1][1] != found[1][2]


def test_the_perplexity_table_has_a_row_for_each_model(run, tmp_path, capsys):
    data, (other, plain) = texts(tmp_path / "data", BOOK[:6000]), models(tmp_path)
    flags = ["--data", data, "--windows", "0", "1", "--stride", "1", "--model", TINY, other, TINY, plain]
    assert run(evaluation.main, *flags) == 2  # one without memory layers cannot read two windows
    out, err = capsys.readouterr()
    found = rows(out)
    assert found[0] == ["model", "0 windows", "1 window", "tokens"]
    assert [row[0] for row in found[2:]] == [str(TINY), str(other)]
    assert found[2][1:] == found[3][1:] and all(1 < float(value) < 100 for value in found[2][1:3])
    assert err.splitlines()[1] == f"{TINY}, 1 window: {found[2][2]}" and str(plain) in err.splitlines()[-1]
    assert run(evaluation.main, "--data", tmp_path / "nowhere") == 2
    assert run(evaluation.main, "--data", data, "--windows", "1000") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and "no document is longer than 1000 windows" in err


def test_the_table_of_positions_is_of_the_same_windows_as_that_of_perplexity(run, tmp_path, capsys):
    data, (other, _) = texts(tmp_path / "data", BOOK[:4000]), models(tmp_path)
    flags = ["--data", data, "--stride", "1", "--model", TINY, other, "--table", tmp_path / "table.md", "--positions"]
    assert run(evaluation.main, *flags, "--windows", "1", "0") == 0
    out = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == out
    first, second = (rows(part) for part in out.split("\n\n"))
    assert second[0] == ["model", "tokens", "none", "1 window"]
    assert [row[:2] for row in second[2:6]] == [
        [str(TINY), tokens] for tokens in ("0-63", "64-127", "128-255", "0-255")
    ]
    one, none = (np.log(float(first[2][i])) for i in (1, 2))
    assert float(second[5][2]) == pytest.approx(none, abs=5e-3)
    assert float(second[5][3]) == pytest.approx(one - none, abs=5e-3) and one < none
    assert float(second[2][3]) < float(second[4][3])  # memory is worth most where little else stands before
    assert run(evaluation.main, *flags, "--windows", "1") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--windows 0" in err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_results_that_are_not_finite_are_refused(value, run, tmp_path, capsys):
    data, (other, _) = texts(tmp_path / "data", BOOK[:6000]), models(tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"][3, 3] = value
    save_file(weights, other / "model.safetensors")
    flags = ["--data", data, "--windows", "0", "--model", other]
    for main, more in (evaluation.main, flags), (passkey.main, ["--lengths", "512", "--trials", "1", "--model", other]):
        assert run(main, *more) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "finite" in err
        assert main is passkey.main or f"{other}: the perplexity after 0 windows is not finite" in err


# ------------------------------------------------------------------------------------------------------ Distraction


@pytest.fixture(scope="module")
def documents(tiny) -> list[torch.Tensor]:
    """Five of the book's parts, as if they were of different books."""
    ids = torch.tensor(tiny[1].encode(BOOK[:60000], bos=False))
    return [part.contiguous() for part in ids.split(3000)][:5]


def test_tiny_tells_its_own_past_from_other_code(tiny):
    model, tokenizer = tiny
    files = ("longllama.py", "training/train.py", "examples/chat.py", "convert.py")
    windows = distraction.draw([source(tokenizer, file) for file in files], 256, 24, 7, seed=0)
    result = distraction.measure(model, "tiny", windows, distraction.remembered(model, windows.past), 8)
    assert result.shares.mean() > 1.25 / 8


class Watching(distraction.Contexts):
    """Computes the share of the first context by the formula, over all keys at once, in float64."""

    def attend(self, q, real):
        k = (
            torch.cat([k for k, _, _ in self.blocks], dim=2)
            .double()
            .repeat_interleave(q.shape[1] // self.blocks[0][0].shape[1], 1)
        )
        weights = (q.double() @ k.mT * q.shape[3] ** -0.5).softmax(dim=-1)  # (B, H, T, d * W)
        self.right = weights[..., : self.blocks[0][0].shape[2]].sum(dim=-1).mean(dim=(0, 2))
        return super().attend(q, real)


@pytest.mark.parametrize("d", [1, 3, 6])
@torch.no_grad()
def test_the_share_of_the_own_past_is_that_of_the_formula(d, tiny, documents):
    model, window = tiny[0], tiny[0].config.max_position_embeddings
    windows = distraction.draw(documents, window, 8, 5, seed=1)
    [(k, v)] = distraction.remembered(model, windows.past)
    seen = torch.cat((torch.arange(8)[:, None], windows.others[:, : d - 1]), dim=1)
    memory = Watching(model.config, (k[seen], v[seen]))
    _, cache = model(windows.current, model.new_cache(lambda _: memory), last_context_length=window)
    shares = distraction.measure(model, "tiny", windows, [(k, v)], d).shares[0]
    assert torch.allclose(memory.share.double(), memory.right, atol=1e-5)
    assert torch.allclose(shares.double(), memory.right, atol=1e-5) and len(shares) == model.config.num_attention_heads


@torch.no_grad()
def test_contexts_that_are_the_own_past_again_get_one_share_each(tiny, documents):
    model, window = tiny[0], tiny[0].config.max_position_embeddings
    windows = distraction.draw(documents, window, 4, 3, seed=2)
    same = replace(windows, others=torch.arange(4)[:, None].expand(-1, 3))
    four = distraction.measure(model, "tiny", same, distraction.remembered(model, windows.past), 4)
    assert torch.allclose(four.shares, torch.full_like(four.shares, 0.25))


@torch.no_grad()
def test_with_the_own_past_alone_perplexity_is_that_of_reading_on(tiny, documents):
    model, window = tiny[0], tiny[0].config.max_position_embeddings
    windows = distraction.draw(documents, window, 4, 3, seed=2)
    kept = distraction.remembered(model, windows.past)
    one, four = (distraction.measure(model, "tiny", windows, kept, d).perplexity for d in (1, 4))
    both = torch.cat((windows.past, windows.current), dim=1)
    logits, _ = model(both, last_context_length=window, logits_to_keep=window)
    right = F.cross_entropy(logits.mT, windows.targets).exp().item()
    assert one == pytest.approx(right, rel=1e-4) and four != pytest.approx(right, rel=1e-4)


def test_windows_follow_their_past_and_others_are_of_other_documents(documents):
    windows = distraction.draw(documents, 100, 20, 15, seed=3)
    whole = torch.cat((windows.past, windows.current, windows.targets[:, -1:]), dim=1)
    owners = [
        next(i for i, x in enumerate(documents) if (x.unfold(0, 201, 1) == row).all(dim=1).any()) for row in whole
    ]
    assert torch.equal(windows.current[:, 1:], windows.targets[:, :-1]) and len(set(owners)) == 5
    for row, owner in zip(windows.others.tolist(), owners):
        assert len(set(row)) == 15 and owner not in [owners[i] for i in row]
    with pytest.raises(ValueError, match="give fewer than 17 windows of others: add --windows"):
        distraction.draw(documents, 100, 20, 17, seed=3)
    with pytest.raises(ValueError, match="two documents of more than 6000 tokens"):
        distraction.draw(documents, 3000, 20, 3, seed=3)


def test_the_distraction_table_and_picture_show_each_head_of_each_model(tiny, run, tmp_path, capsys):
    other, plain = models(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(40):
        (data / f"{i:02}.txt").write_text(BOOK[4000 * i : 4000 * (i + 1)], encoding="utf-8")
    flags = ["--data", data, "--contexts", "2", "1", "--windows", "4", "--model", TINY]
    files = ["--table", tmp_path / "table", "--picture", tmp_path / "picture.svg"]
    assert run(distraction.main, *flags, other, *files) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "table").read_text() == out and "<svg" in (tmp_path / "picture.svg").read_text()
    table = rows(out)
    assert table[0] == ["model", "", "d = 1", "d = 2"] and table[-1] == ["1/d", "1.000", "0.500"]
    heads = range(tiny[0].config.num_attention_heads)
    labels = ["r_d, all heads", *(f"layer 3, head {i}" for i in heads), "perplexity"]
    first, second = table[2 : 2 + len(labels)], table[2 + len(labels) : -1]
    assert [row[1] for row in first] == [row[1] for row in second] == labels
    assert [row[2:] for row in first] == [row[2:] for row in second]  # two of the same model
    assert run(distraction.main, *flags, plain) == 2 and "has no mem_layers" in capsys.readouterr().err


def test_keys_are_all_different_and_records_are_spelled_out():
    keys, values = dictionary.draw(np.random.default_rng(0), 5000)
    assert len({tuple(key) for key in keys.tolist()}) == 5000
    assert {*keys.flatten().tolist()} == {*values.flatten().tolist()} == {*range(dictionary.SYMBOLS)}
    ids = dictionary.spell(K, keys[:2], values[:2]).tolist()
    (k, other), (v, another) = keys[:2].tolist(), values[:2].tolist()
    assert ids == [K, *k, V, *v, K, *other, V, *another]


def test_logits_of_values_are_those_before_them():
    positions = torch.arange(2 * RECORD).view(1, -1, 1)
    assert dictionary.of_values(positions).flatten().tolist() == [5, 6, 13, 14]
    ids = dictionary.spell(Q, *dictionary.draw(np.random.default_rng(0), 2))
    assert ids[5] == V == ids[13]


@pytest.mark.parametrize("most", [1, 0])
def test_the_loss_is_that_of_reading_records_and_then_questions(most):
    """d = 1 and plain: what is seen in training is what is seen when a dictionary of one window has been read."""
    torch.manual_seed(0)
    model, n = dictionary.new_model(plain=most == 0), WINDOW // RECORD
    seen = []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    loss, share = dictionary.train_step(model, Stage(3, n, 1, 1), most, np.random.default_rng(0))
    records, questions = seen[0].view(3, 2, WINDOW).unbind(1)
    with torch.no_grad():
        _, cache = model(records, last_context_length=WINDOW)
        logits, _ = model(questions, cache, last_context_length=WINDOW)
    at = torch.arange(WINDOW) % RECORD
    asked = ((at == KEY + 1) | (at == KEY + 2)).nonzero().flatten()
    wanted, logits = questions[:, asked + 1], logits[:, asked]
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), atol=2e-2, rtol=0
    )
    right = (logits.argmax(dim=-1) == wanted).view(-1, VALUE).all(dim=-1).float().mean().item()
    assert share == pytest.approx(right, abs=0.05)
    pairs = [x.view(3, n, RECORD)[..., 1:].tolist() for x in (records, questions)]
    assert [sorted(document) for document in pairs[0]] == [sorted(document) for document in pairs[1]]


def test_no_key_is_in_two_documents_and_few_symbols_make_keys_alike():
    model, keys = dictionary.new_model(plain=False), set()
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: keys.update(map(tuple, inputs[0].tolist())))
    dictionary.train_step(model, Stage(4, 32, 3, 1, symbols=4), 3, np.random.default_rng(0))
    records = torch.tensor([row for row in keys if row[0] == K]).view(-1, RECORD)[:, 1 : KEY + 1]
    assert len({tuple(key) for key in records.tolist()}) == 4 * 32  # no key is in two documents
    assert all(len(set(place)) <= 4 for place in records.T.tolist())


def test_dictionaries_are_asked_and_a_model_that_is_not_trained_knows_nothing():
    torch.manual_seed(0)
    assert dictionary.ask(dictionary.new_model(plain=False), 1024, 0) < 0.02


@pytest.mark.parametrize("kind", ["d = 1", "d = 64"])
def test_trained_models_find_a_record_among_hundreds(kind):
    model = FastLlama.from_pretrained(dictionary.home(dictionary.MODELS, 0, kind))
    assert dictionary.ask(model, 4096, 1) > 0.95


def test_a_plain_model_takes_over_what_was_learned_with_a_memory():
    """Which has no weights: where all is local both compute the same."""
    models, ids = [dictionary.new_model(plain) for plain in (False, True)], torch.arange(40)[None]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        (x, _), (y, _) = (model(ids, last_context_length=40) for model in models)
    assert torch.equal(x, y)


def test_the_plain_model_knows_the_task_and_is_lost_in_a_larger_dictionary():
    path = dictionary.home(dictionary.MODELS, 0, "plain")
    model = FastLlama.from_pretrained(path, max_position_embeddings=4096 + WINDOW)
    assert not model.config.mem_layers
    assert dictionary.ask(model, 256, 1) > 0.95 and dictionary.ask(model, 4096, 1) < 0.05


def test_models_that_are_there_are_asked_and_the_table_and_picture_show_them(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    models, files = tmp_path / "models", [tmp_path / "table.md", tmp_path / "picture.svg"]
    shutil.copytree(dictionary.MODELS / "seed0", models / "seed0")
    plain = dictionary.home(models, 0, "plain")
    shutil.rmtree(plain, ignore_errors=True)
    torch.manual_seed(0)
    save_pretrained(dictionary.new_model(plain=True), plain)  # which knows nothing
    flags = ["--models", models, "--lengths", "512,2k", "--table", files[0], "--picture", files[1]]
    assert run(dictionary.main, *flags) == 0
    rows = capsys.readouterr().out.splitlines()
    assert (
        files[0].read_text().splitlines() == rows and rows[0] == "| | 512 | 2k |" and files[1].stat().st_size > 10_000
    )
    shares = {row.split(" | ")[0][2:]: [float(x.strip("% |")) for x in row.split(" | ")[1:]] for row in rows[2:]}
    assert shares.keys() == dictionary.KINDS.keys()
    assert min(shares["d = 1"]) > 95 and min(shares["d = 64"]) > 95 and max(shares["plain"]) < 2


def test_dictionaries_that_cannot_be_are_refused(run, capsys):
    assert run(dictionary.main, "--lengths", "8") == 2
    assert "--lengths must be of 256 to 128M tokens" in capsys.readouterr().err
