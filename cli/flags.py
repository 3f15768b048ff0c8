"""Flags, and the types of their values."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cli.ending import first_line, printable

from cli.loading import DTYPES, TINY
from cli.texts import hide_key, read_text
from fast import MEM_DTYPES
from fast.files import check_writable
from fast.model import LARGEST
from fast.quantised import KINDS


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, whatever was in the flags."""

    def error(self, message: str):
        self.exit(2, printable(f"{self.prog}: error: {message}") + "\n")

    def parse_known_args(self, args=None, namespace=None):
        for flag, _, value in (word.partition("=") for word in (sys.argv[1:] if args is None else args)):
            if flag.startswith("--") and value == "--":  # some Pythons take that for an empty list
                self.error(f"argument {flag}: expected a value, not --")
        return super().parse_known_args(args, namespace)


def parser_for(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with the first line of a program's docstring, and ends with the commands in it."""
    commands = "\n".join(re.findall(r"^    .*", doc, re.MULTILINE))
    return Parser(
        description=doc.split("\n")[0],
        usage=argparse.SUPPRESS,
        epilog=f"examples:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# What a number is written as: `int` and `float` alone take other digits, 1_000, nan and spaces, and give up on 5,000 digits.
NUMBERS = {int: r"[+-]?[0-9]{1,4000}", float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}
HIGHEST = {int: LARGEST, float: 1e38}


def number(kind: type, low: float, high: float | None = None):
    """An argparse type: a number from low to high, or to what is far beyond all use."""
    high = HIGHEST[kind] if high is None else high

    def parse(text: str):
        if not re.fullmatch(NUMBERS[kind], text):
            raise ValueError
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low} and at most {high}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parse_temperature(text: str) -> float:
    """An argparse type: what `FastLlama.generate` takes."""
    value = number(float, 0)(text)
    if 0 < value < 1e-5:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor at least 1e-5")
    return value


parse_temperature.__name__ = "number"


def new_path(text: str) -> Path:
    """An argparse type: where a result is to be. Nothing, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file or a folder")
    return Path(text)


def listed(parse: Callable) -> Callable:
    """An argparse type: several of another type, with commas between them."""

    def parse_list(text: str) -> list:
        return [parse(part) for part in text.split(",")]

    parse_list.__name__ = f"list of {parse.__name__}s"
    return parse_list


def parse_length(text: str) -> int:
    """An argparse type: 512, 16k or 1M."""
    units = {"k": 1 << 10, "M": 1 << 20}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        return number(int, 1, LARGEST // unit)(digits) * unit
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no length such as 512, 16k or 1M, of at most 256M") from None


parse_lengths = listed(parse_length)


def short(n: int) -> str:
    """What `parse_length` takes."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def add_model_flags(parser: argparse.ArgumentParser, several: bool = False):
    """--model, --device, --dtype and --weights, for `pick_device` and `load`. several: of models."""
    add, default, nargs = parser.add_argument, [TINY] if several else TINY, "+" if several else None
    add(
        "--model",
        type=Path,
        nargs=nargs,
        default=default,
        metavar="DIR",
        help="default: the tiny model that comes along",
    )
    add("--device", default="auto", help="auto (cuda, mps or cpu, the first there is), or a torch device")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, float32 on the CPU")
    add("--weights", choices=KINDS, help="round weights to 8 or 4 bits as they are read (default: as they are stored)")


def add_own_memory_flag(parser: argparse.ArgumentParser):
    """--memory, for `load`."""
    parser.add_argument("--memory", metavar="FILE.py:CLASS", help="a memory of your own, see examples/own_memory.py")


WINDOW_FLAGS = ("mem_layers", "max_position_embeddings")


def add_window_flags(parser: argparse.ArgumentParser):
    """WINDOW_FLAGS, for `with_window`."""
    add, layers, window = (
        parser.add_argument,
        "layers with a memory, from 0 on",
        "a window smaller than the model's own",
    )
    add("--mem-layers", type=number(int, 0), nargs="+", metavar="I", help=layers)
    add("--window", type=number(int, 1), dest="max_position_embeddings", metavar="N", help=window)


MEMORY_FLAGS = (*WINDOW_FLAGS, "last_context_length", "mem_dtype", "mem_device", "mem_topk", "keep_local")


def add_memory_flags(parser: argparse.ArgumentParser):
    """MEMORY_FLAGS, which override config.json, and --memory."""
    add, count = parser.add_argument, number(int, 1)
    add_window_flags(parser)
    add("--last-context-length", type=count, metavar="N", help="this many tokens at a text's end stay local")
    add(
        "--keep-local", type=number(int, 0), metavar="N", help="when the window is full, its newest N tokens stay local"
    )
    add("--mem-dtype", choices=MEM_DTYPES, help="what memory is stored as (default: what config.json says)")
    add("--mem-device", choices=["cpu"], help="keep memory in main memory, and stream it to the GPU: longer texts fit")
    add("--mem-topk", type=count, metavar="K", help="attend to each query's K best tokens of memory only")
    add_own_memory_flag(parser)


def parse_stop(text: str) -> str:
    """An argparse type: a text that something can end before."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: every text would end before it")
    return text


SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_sampling_flags(parser: argparse.ArgumentParser):
    """SAMPLING_FLAGS, which `FastLlama.generate` takes, and --stop, for `Completion`."""
    add = parser.add_argument
    add("--temperature", type=parse_temperature, default=0.8, metavar="X", help="0: always the likeliest (default 0.8)")
    add("--top-k", type=number(int, 1), metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=number(float, 1e-6, 1), metavar="P", help="draw from the likeliest of probability P")
    add("--min-p", type=number(float, 0, 1), metavar="P", help="draw from those at least P times as likely as the best")
    penalty, stop = "above 1: tokens read or written come less likely again", "end before any of these texts"
    add("--repetition-penalty", type=number(float, 1e-3, 1e3), metavar="X", help=penalty)
    add("--stop", type=parse_stop, nargs="+", action="extend", default=[], metavar="TEXT", help=stop)
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="draw the same tokens every time")


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    return {name: getattr(args, name) for name in names}


BATCH = 8  # prompts at once, if --batch does not say


def add_prompt_flags(parser: argparse.ArgumentParser, many: bool = False):
    """--prompt or --prompt-file, for `read_prompt`. many: or --prompts and --batch, for `read_prompts`."""
    prompt = parser.add_mutually_exclusive_group()  # `read_prompt` asks for one: a misspelt flag is told first
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="'-' is standard input")
    if many:
        said = 'many texts, JSON lines {"prompt": "..."}: each is written with its "completion" added'
        prompt.add_argument("--prompts", metavar="FILE", help=said)
        parser.add_argument(
            "--batch", type=number(int, 1), metavar="N", help=f"of --prompts, N at once (default {BATCH})"
        )


def demonstration() -> list[str]:
    """Flags that ask for a pass key, 180 windows back in the book that comes along: where a program was given none."""
    return ["--prompt", hide_key(read_text(TINY / "book.txt")), "--max-new-tokens", "6", "--temperature", "0"]


def check_new_file(flag: str, path: Path, nbytes: int = 0):
    """Refuses, before the work begins, a path that its result, of so many bytes if they are known, could not be written to."""
    taken = os.path.exists(path) and not os.path.isfile(path)  # unlike Path's own, they raise nothing for long names
    if taken or not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise ValueError(f"{flag} {path}: name a file, not a folder or device, in a folder that exists")
    try:
        check_writable(path, nbytes)
    except OSError as error:
        raise ValueError(f"{flag} {first_line(error)}") from None


def check_new_folder(flag: str, path: Path, nbytes: int = 0):
    """Refuses, before the work begins, a folder that a result could not be written to. Folders that are missing may be made."""
    missing = []
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path / "config.json", nbytes)
    except OSError as error:
        told = (
            "it is no folder: name one"
            if isinstance(error, (FileExistsError, NotADirectoryError))
            else first_line(error)
        )
        raise ValueError(f"{flag} {path}: {told}") from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
