"""Flags: their values, their help, and what they load."""

import argparse
import json
import re
import shutil
from pathlib import Path

from cli.ending import UserError, user_errors

import pytest
import torch

from cli.flags import (
    SAMPLING_FLAGS,
    add_sampling_flags,
    check_new_file,
    check_new_folder,
    listed,
    number,
    parse_length,
    parse_lengths,
    parse_stop,
    parse_temperature,
    parser_for,
    short,
)
from cli.loading import TINY, load, overflow_warnings, own_memory, pick_device, warnings
from fast import FastLlama, FastMemory
from fast.test_model import small_model
from longllama import Cache, Memory
from tokenizer import Tokenizer

CPU = torch.device("cpu")


def refused(kind, text: str) -> bool:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    try:
        parser.parse_args([f"--x={text}"])
    except argparse.ArgumentError as error:
        return "\n" not in str(error)
    return False


def test_numbers_are_within_their_limits():
    share = number(float, 0.1, 1)
    assert number(int, 1)("7") == 7 and share("1") == 1.0 and share(".5") == 0.5 and number(float, 0)("1e-9") == 1e-9
    for kind, texts in ((number(int, 1), ("0", "-3", "1.5", "many", "")), (share, ("0", "1.7", "nan", "-1", "x"))):
        assert all(refused(kind, text) for text in texts)
    with pytest.raises(argparse.ArgumentTypeError, match="^0 is not at least 0.1 and at most 1$"):
        share("0")
    assert not refused(number(float, 0), "1e9") and refused(number(float, 0), "1e39")
    assert number(int, 0, 2**63 - 1)(str(2**63 - 1)) == 2**63 - 1 and number(int, 1)(str(2**28)) == 2**28


@pytest.mark.parametrize("text", ["1_0", "١٢", "１", " 5", "5 ", "5\n", "0x10", "²", "", "+", "1e2e3"])
def test_numbers_are_written_in_plain_digits(text):
    for kind in (number(int, 0), number(float, 0), parse_length, parse_temperature):
        assert refused(kind, text)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999", "1" * 5000, "9" * 30, str(2**28 + 1), "1e400k"])
def test_numbers_beyond_all_use_are_refused_and_not_counted_up_to(text):
    assert refused(number(int, 0), text) and refused(parse_length, text)
    assert refused(parse_length, "257M") and parse_length("256M") == 2**28


def test_temperatures_too_small_to_divide_by_are_refused():
    assert parse_temperature("0") == 0 and parse_temperature("1e-5") == 1e-5
    assert all(refused(parse_temperature, text) for text in ("1e-6", "1e-46", "-1"))


def test_stop_strings_may_be_several_with_one_flag_or_many():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_sampling_flags(parser)
    for words, right in (([], []), (["--stop", "a", "\n"], ["a", "\n"]), (["--stop", "a", "--stop=-b"], ["a", "-b"])):
        assert parser.parse_args(words).stop == right
    assert refused(parse_stop, "") and parse_stop(" ") == " "
    assert set(SAMPLING_FLAGS) | {"stop"} == vars(parser.parse_args([])).keys()


def test_lengths_are_written_short_and_read_back():
    assert [parse_length(text) for text in ("512", "16k", "1M", "3k")] == [512, 16384, 1 << 20, 3072]
    assert parse_lengths("1k,512") == [1024, 512] and listed(number(int, 1))("3,4") == [3, 4]
    assert [short(n) for n in (512, 1024, 65536, 1 << 20, 1536, 1000)] == ["512", "1k", "64k", "1M", "1536", "1000"]
    assert all(parse_length(short(n)) == n for n in (1, 512, 1024, 5000, 3 << 20))
    for text in ("", "k", "0", "0k", "-1", "1.5k", "1kk", "1G", "x"):
        assert refused(parse_length, text) and refused(parse_lengths, f"512,{text}")


def test_help_begins_with_what_a_program_does_and_ends_with_its_commands():
    doc = 'Does it.\n\nMore.\n\n    python it.py --a "b"\n    python it.py    # as this\n\nAnd more.\n'
    said = parser_for(doc).format_help()
    assert said.startswith("Does it.\n") and "More." not in said and "usage" not in said
    assert said.endswith('examples:\n    python it.py --a "b"\n    python it.py    # as this\n')


def test_a_new_file_may_replace_a_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "link", Path("new")):
        check_new_file("--save-memory", path)
    for path in (tmp_path, tmp_path / "missing" / "new", Path("/dev/null"), tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match=f"^--save-memory {path}: name a file"):
            check_new_file("--save-memory", path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


LOOP, PROC = "loop", "/proc/new"


@pytest.mark.parametrize("name, why", [("n" * 256, "too long"), (LOOP, ""), (f"{LOOP}/x", ""), (PROC, "")])
@pytest.mark.parametrize("check", [check_new_file, check_new_folder])
def test_where_a_result_cannot_be_written_is_found_by_trying(name, why, check, tmp_path):
    if name == PROC and not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    (tmp_path / LOOP).symlink_to(tmp_path / LOOP)
    with pytest.raises(ValueError, match=f"^--output {re.escape(str(tmp_path / name))}.*{why}") as raised:
        check("--output", tmp_path / name)
    assert "\n" not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == [LOOP]


def test_a_disk_known_to_be_too_small_is_told(tmp_path):
    for check in (check_new_file, check_new_folder):
        with pytest.raises(ValueError, match="--output .* takes 1,000,000,000,000.0 MB, and its disk has"):
            check("--output", tmp_path / "new", 10**18)
    assert not any(tmp_path.iterdir())


def test_auto_takes_the_best_device_and_others_are_tried():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == best and pick_device("cpu") == CPU
    for name in ("meta", "abacus", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"^--device {name} is none that torch can use here"):
            pick_device(name)


def test_dtypes_are_those_that_are_named_and_auto_is_float32_on_a_cpu():
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model, tokenizer = load(TINY, CPU, name)
        assert type(model) is FastLlama and not model.training and tokenizer.vocab_size == model.config.vocab_size
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_overrides_of_0_are_taken_and_of_none_are_not(tmp_path):
    for file in ("model.safetensors", "tokenizer.model"):
        shutil.copyfile(TINY / file, tmp_path / file)
    raw = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"keep_local": 6}))
    for given, taken in (0, 0), (None, 6):
        assert load(tmp_path, CPU, keep_local=given)[0].config.keep_local == taken


# -------------------------------------------------------------------------------------------- --memory FILE.py:CLASS

OWN = """
from dataclasses import dataclass
import torch
from fast import FastMemory
from longllama import Memory

class Newest(FastMemory):
    def choose(self, k, real):
        return torch.arange(max(k.shape[2] - 9, 0), k.shape[2]).expand(*k.shape[:2], -1)

class OfTheCore(Memory):
    pass

number = 3
"""


@pytest.fixture
def own(tmp_path) -> Path:
    (tmp_path / "own memory.py").write_text(OWN)
    (tmp_path / "raises.py").write_text("print(1 / 0)\n")
    (tmp_path / "broken.py").write_text("class Own(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "own.txt").write_text(OWN)
    return tmp_path


@torch.no_grad()
def test_a_memory_of_ones_own_is_used(own):
    model, tokenizer = load(TINY, CPU, memory=f"{own / 'own memory.py'}:Newest", mem_topk=5)
    _, cache = model(torch.tensor([tokenizer.encode("the whale " * 300)]))
    memories = [layer.memory for layer in cache.layers if layer.memory is not None]
    assert memories and all(type(x).__name__ == "Newest" and isinstance(x, FastMemory) for x in memories)
    assert all(x.length > 300 and x.blocks[0][0].shape[2] == 9 for x in memories)
    assert issubclass(own_memory(f"{own / 'own memory.py'}:OfTheCore"), Memory)


def test_a_file_of_ones_own_may_hold_dataclasses(tmp_path):
    """They look for their module by its name."""
    begin = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / "own.py").write_text(begin + OWN + "\n@dataclass\nclass Settings:\n    n: int = 3\n")
    assert issubclass(own_memory(f"{tmp_path / 'own.py'}:Newest"), FastMemory)


@pytest.mark.parametrize(
    "name, said",
    [
        ("missing.py:Newest", "there is no file missing.py"),
        ("own.txt:Newest", "write FILE.py:CLASS"), ("own memory.py", "write FILE.py:CLASS"), ("Newest", "write FILE.py:CLASS"),
        ("own memory.py:Oldest", "has no class Oldest"), ("own memory.py:number", "has no class number"),
        ("own memory.py:", "has no class"), ("raises.py:Own", "does not run: ZeroDivisionError: division by zero"),
        ("broken.py:Own", "does not run: SyntaxError: "), ("needs.py:Own", "does not run: ModuleNotFoundError: "),
    ],
)  # fmt: skip
def test_a_memory_that_is_not_there_or_does_not_run_is_refused_in_one_line(name, said, own, monkeypatch):
    monkeypatch.chdir(own)
    with pytest.raises(UserError, match=f"^--memory .*{re.escape(said)}") as raised, user_errors():
        load(TINY, CPU, memory=name)
    assert "\n" not in str(raised.value)


def test_a_memory_that_does_not_know_a_setting_is_refused(own):
    with pytest.raises(ValueError, match="^OfTheCore knows no mem_topk, mem_device or float8"):
        load(TINY, CPU, memory=f"{own / 'own memory.py'}:OfTheCore", mem_topk=5)


# ---------------------------------------------------------------------------------------------------------- Warnings


@torch.no_grad()
def test_overflow_is_warned_of_only_where_there_is_one_and_a_way_around_it():
    def warned(model: FastLlama, T: int, new: int, cache: Cache | None = None) -> list[str]:
        return list(overflow_warnings(T, new, model, cache or model.new_cache()))

    assert warned(small_model(keep_local=2), 10, 10) == []
    model = small_model()
    assert "at most 8 new tokens avoid it" in warned(model, 30, 16)[0]
    assert "--last-context-length 1 avoids it" in warned(model, 30, 15)[0]
    assert warned(model, 30, 8) == [] != warned(model, 30, 9)
    _, cache = model(torch.ones(1, 15, dtype=torch.long), last_context_length=15)
    assert "at most 1 new tokens avoid it" in warned(model, 1, 4, cache)[0]


def test_a_bos_token_as_text_is_warned_of():
    model, tokenizer = small_model(), Tokenizer(TINY / "tokenizer.model")
    given = [1, 2, 3], 1, model, tokenizer, model.new_cache()
    assert "the text <s>; the bos token is added" in next(warnings(" <s> sea", *given))
    assert list(warnings("sea <s>", *given)) == []


@torch.no_grad()
def test_a_text_that_a_model_without_memory_ends_in_its_midst_is_warned_of():
    """The window is of 16 tokens, and the last new token is not read."""
    model = small_model(mem_layers=())

    def warned(T: int, new: int, cache: Cache | None = None) -> list[str]:
        return list(overflow_warnings(T, new, model, cache or model.new_cache()))

    assert warned(10, 7) == [] and "--max-new-tokens 7 avoids it" in warned(10, 8)[0]
    assert "--mem-layers gives it one" in warned(17, 1)[0]  # which is refused before anything is written
    _, cache = model(torch.ones(1, 9, dtype=torch.long))
    assert warned(1, 7, cache) == [] and "--max-new-tokens 7 avoids it" in warned(1, 8, cache)[0]
    ids = torch.ones(1, 10, dtype=torch.long)
    assert len(list(model.generate(ids, 7, eos_token_id=None))) == 7
    with pytest.raises(ValueError, match="exceed the window"):
        list(model.generate(ids, 8, eos_token_id=None))
