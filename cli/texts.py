"""Texts from files and from standard input, and the pass key that demonstrations hide in them."""

import argparse
import io
import sys
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


def read_prompt(args: argparse.Namespace) -> str:
    """What --prompt or --prompt-file gives."""
    if args.prompt is not None:
        if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # how Python keeps other bytes
            raise ValueError("--prompt is not UTF-8 text: convert it first")
        return args.prompt
    if args.prompt_file is None:
        raise ValueError("there is no text to read: give --prompt TEXT or --prompt-file FILE")
    if args.prompt_file != "-":
        return read_text(Path(args.prompt_file), "--prompt-file")
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    if not data:
        raise ValueError("--prompt-file -: standard input is closed or empty; pipe a text into it, or name a file")
    return decode(data, "--prompt-file -")


def hide_key(text: str, key: str = "71428", at: int = 9000) -> str:
    """A text with a pass key in it, `at` characters from its start, and the question for it at its end."""
    return f"{text[:at]} {KEY.format(key=key)} {text[at:]} {QUESTION}"
