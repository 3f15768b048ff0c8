"""generate.py --prompts: a line of JSON for each prompt, continued as it would be alone."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import generate
from cli.loading import TINY, load
from cli.test_completions import alone, naive
from cli.test_ending import one_line, run_main
from cli.test_generate import before_each
from fast import FastLlama, load_memory
from tokenizer import Tokenizer

GREEDY = ("--temperature", 0)
BOOK = (TINY / "book.txt").read_text(encoding="utf-8")
TEXTS = [BOOK[n * 1000 : n * 1000 + length] for n, length in enumerate((200, 90, 7, 1100, 300, 300, 3), 5)]
TEXTS += ["", "The sea, — 日本語\u2028\n\t\"and\\", TEXTS[0]]  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> tuple[FastLlama, Tokenizer]:
    torch.set_num_threads(1)
    return load(TINY, torch.device("cpu"))


@pytest.fixture
def prompts(tmp_path):
    """Writes a file of prompts, with other fields beside them."""

    def write(texts: list[str]) -> Path:
        rows = [{"id": n, "prompt": text, "kept": [None, {"é": 1e3}]} for n, text in enumerate(texts)]
        (tmp_path / "prompts").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
        return tmp_path / "prompts"

    return write


def run(*args) -> int:
    return run_main(generate.main, "--device", "cpu", *args)


def completed(capsys, texts: list[str]) -> list[str]:
    """What was written after each prompt; everything else that stood there is written again, in order."""
    lines = capsys.readouterr().out.splitlines()
    rows = list(map(json.loads, lines))
    found = [row.pop("completion") for row in rows]
    assert rows == [{"id": n, "prompt": text, "kept": [None, {"é": 1e3}]} for n, text in enumerate(texts)]
    assert all(line.isascii() and line.isprintable() for line in lines)
    return found


@pytest.mark.parametrize("batch", [(), ("--batch", 3), ("--batch", 1)], ids=str)
def test_each_prompt_is_continued_as_it_would_be_alone(batch, prompts, tiny, capsys):
    right = [alone(tiny, tiny[1].encode(text), 20, temperature=0) for text in TEXTS]
    stops = [right[1][5:9], right[3][12:16], " the"]
    flags = ("--prompts", prompts(TEXTS), "--max-new-tokens", 20, *GREEDY, *batch, "--quiet")
    assert run(*flags) == 0
    assert completed(capsys, TEXTS) == right
    assert run(*flags, "--stop", *stops[:2], "--stop", stops[2]) == 0
    assert completed(capsys, TEXTS) == [naive(text, stops) for text in right]


def test_where_a_window_overflows_each_prompt_is_continued_as_it_would_be_alone_too(prompts, tiny, capsys):
    """200 new tokens leave room for 56 in the window of 256: the longest prompt is alone, and so is the one before it."""
    texts, new = [TEXTS[n] for n in (1, 0, 2, 6)], 200
    with before_each(FastLlama, lambda model: calls.append(1)):
        calls = []
        assert run("--prompts", prompts(texts), "--max-new-tokens", new, *GREEDY, "--quiet") == 0
        assert len(calls) == 3 * new
    assert completed(capsys, texts) == [alone(tiny, tiny[1].encode(text), new, temperature=0) for text in texts]


def test_all_prompts_go_on_from_a_saved_memory(prompts, tiny, tmp_path, capsys):
    model, tokenizer = tiny
    saved, texts = tmp_path / "memory", [" What next?", " The pass key is", " Who?", " What now?", " What next?", " a"]
    reading = ("--prompt", BOOK[:3000] + " The pass key is 71428.", "--max-new-tokens", 0, "--save-memory", saved)
    assert run(*reading) == 0
    cache, right, lengths = load_memory(saved, model, tokenizer=tokenizer.digest), [], set()
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        right.append(alone(tiny, ids, 12, temperature=0, cache=cache.fork()))
        lengths.add(len(ids))
    capsys.readouterr()
    assert run("--prompts", prompts(texts), "--load-memory", saved, "--max-new-tokens", 12, *GREEDY) == 0
    assert completed(capsys, texts) == right and 1 < len(lengths) < len(texts)
    assert right[0] != alone(tiny, tokenizer.encode(texts[0]), 12, temperature=0)


def test_a_seed_gives_the_same_texts_again_and_a_prompt_that_comes_again_another_one(prompts, capsys):
    flags = ("--prompts", prompts(["The sea"] * 5), "--batch", 2, "--max-new-tokens", 9, "--quiet")

    def drawn(*more) -> list[str]:
        assert run(*flags, *more) == 0
        return completed(capsys, ["The sea"] * 5)

    assert drawn("--seed", 3) == drawn("--seed", 3) != drawn("--seed", 4)
    assert len(set(drawn("--seed", 3))) == 5
    assert len(set(drawn("--seed", 3, "--top-k", 1))) == 1 == len(set(drawn("--min-p", 1)))
    assert drawn() != drawn()


def test_lines_are_written_when_their_batch_is_done_and_stay(prompts, capsys):
    calls = []

    def interrupted(module: nn.Module):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt

    with before_each(FastLlama, interrupted):
        assert run("--prompts", prompts(["The sea"] * 5), "--batch", 2, "--max-new-tokens", 4) == 130
    assert len(completed(capsys, ["The sea"] * 4)) == 4


def test_prompts_come_from_standard_input_too_and_what_they_took_is_said(capsys, monkeypatch):
    lines = (
        "\ufeff" + json.dumps({"prompt": "a", "completion": "old"}) + "\r\n" + json.dumps({"prompt": "the sea " * 80})
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run("--prompts", "-", "--max-new-tokens", 0, "--last-context-length", 256) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["completion"] for line in out.splitlines()] == ["", ""]
    assert re.search(r"^2 prompts, \d+ tokens, continued in \d+\.\d s$", err, re.MULTILINE)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run("--prompts", "-", "--max-new-tokens", 20, "--last-context-length", 256) == 0
    assert "generate.py: warning: --prompts -: line 2: a local context of " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "is broken JSON"), ("[" * 100_000, "is broken JSON"), ('{"prompt": ' + "1" * 5000 + "}", "is broken JSON"),
        ("[]", "is no JSON object"), ('"text"', "is no JSON object"), ("null", "is no JSON object"),
        ("{}", 'has no text as its "prompt"'), ('{"prompt": 3}', "has no text"), ('{"prompt": null}', "has no text"),
        (r'{"prompt": "\ud800"}', "has no text"), ('{"Prompt": "a"}', "has no text"),
    ],
)  # fmt: skip
def test_a_broken_line_is_one_message_with_its_number_before_the_model_is_read(line, said, tmp_path, capsys):
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n\n' + line + '\n{"prompt": "b"}\n')
    assert run("--prompts", tmp_path / "prompts", "--model", "missing") == 2
    assert one_line(capsys).startswith(f"generate.py: error: --prompts {tmp_path / 'prompts'}: line 3 {said}")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prompts", "prompts", "--prompt", "a"], "not allowed with"),
        (["--prompts", "prompts", "--prompt-file", "a"], "not allowed with"),
        (["--prompts", "prompts", "--save-memory", "memory"], "--save-memory keeps"), (["--prompts", "missing"], "missing"),
        (["--prompts", "empty"], "has no prompts"), (["--prompts", "prompts", "--batch", "0"], "--batch"),
        (["--prompt", "a", "--batch", "2"], "--batch says"), (["--prompts", "prompts", "--stop", ""], "--stop"),
        (["--prompts", "none", "--load-memory", "memory"], "line 2: --load-memory goes on"),
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused_in_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n')
    (tmp_path / "none").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    assert run("--prompt", "The sea", "--max-new-tokens", 0, "--save-memory", "memory", "--quiet") == 0
    assert run(*flags) == 2
    assert said in one_line(capsys)


def test_without_memory_layers_a_prompt_that_is_too_long_is_named_before_any_is_continued(prompts, tmp_path, capsys):
    for name in ("model.safetensors", "tokenizer.model"):
        (tmp_path / name).symlink_to(TINY / name)
    config = json.loads((TINY / "config.json").read_text()) | {"mem_layers": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain, texts = load(tmp_path, torch.device("cpu")), [BOOK[:100], BOOK[5000:5400]]
    T = len(plain[1].encode(texts[1]))
    flags = ("--model", tmp_path, "--prompts", prompts(texts), *GREEDY, "--quiet", "--max-new-tokens")
    assert T > 128 and run(*flags, 256 - T + 2) == 2
    assert f"line 3: {T} tokens and {256 - T + 2} new ones exceed the window of 256" in one_line(capsys)
    calls = []
    with before_each(FastLlama, lambda model: calls.append(1)):
        assert run(*flags, 256 - T) == 0
    assert len(calls) == 256 - T  # both at once
    assert completed(capsys, texts) == [alone(plain, plain[1].encode(text), 256 - T, temperature=0) for text in texts]
