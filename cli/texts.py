"""Texts from files and from standard input, and the pass key that demonstrations hide in them."""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
# The chat that LongLLaMA-Instruct was tuned on: what it begins with, and what stands before each turn.
OPENING = (
    "A chat between a user (denoted as USER:) and an artificial intelligence assistant (denoted as ASSISTANT:). "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\n\n"
)
USER, ASSISTANT = "\nUSER: ", "\nASSISTANT: "


def decode(data: bytes, name: str) -> str:
    """UTF-8, without the mark that some editors begin a file with, line ends as "\\n". Raises ValueError, with the name of where
    it is from."""
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=None).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from None


def read_text(path: Path, flag: str = "") -> str:
    """The text of a file. Raises ValueError, which names it and the flag that it came with."""
    name = f"{flag} {path}".strip()
    try:
        return decode(path.read_bytes(), name)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None


def read_input(name: str, flag: str) -> str:
    """The text of a file, or for "-" of standard input. Raises ValueError, which names the flag."""
    if name != "-":
        return read_text(Path(name), flag)
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    if not data:
        raise ValueError(f"{flag} -: standard input is closed or empty; pipe a text into it, or name a file")
    return decode(data, f"{flag} -")


def is_utf8(text: str) -> bool:
    """Python keeps other bytes of flags, and JSON half characters, as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_prompt(args: argparse.Namespace) -> str:
    """What --prompt or --prompt-file gives."""
    if args.prompt is not None:
        if not is_utf8(args.prompt):
            raise ValueError("--prompt is not UTF-8 text: convert it first")
        return args.prompt
    if args.prompt_file is None:
        raise ValueError("there is no text to read: give --prompt TEXT or --prompt-file FILE")
    return read_input(args.prompt_file, "--prompt-file")


def read_json_lines(name: str, flag: str) -> Iterator[tuple[str, dict]]:
    """The objects in a file of JSON lines, or for "-" in standard input: see `json_objects`."""
    return json_objects(read_input(name, flag).split("\n"), f"{flag} {name}")


def json_objects(lines: Iterable[str | bytes], name: str) -> Iterator[tuple[str, dict]]:
    """The objects of JSON lines, each with what to call it, the name and its line. Empty lines are skipped. Raises ValueError."""
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}: line {n}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # if it is nested too deep
            raise ValueError(f"{where} is broken JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object")
        yield where, row


def hide_key(text: str, key: str = "71428", at: int = 9000) -> str:
    """A text with a pass key in it, `at` characters from its start, and the question for it at its end."""
    return f"{text[:at]} {KEY.format(key=key)} {text[at:]} {QUESTION}"
