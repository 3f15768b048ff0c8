"""How programs end: a user's mistake is one line and status 2, Ctrl-C is no mistake, and a bug is a traceback."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(Exception):
    """One line for the user."""


def first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text that may come from anywhere, on one line and without control characters: it goes to a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def warn(text: str):
    print(f"{Path(sys.argv[0]).name}: warning: {printable(text)}", file=sys.stderr)


def out_of_memory(error: Exception) -> bool:
    said = any(text in str(error) for text in ("allocate memory", "out of memory", "not enough memory"))
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextmanager
def user_errors() -> Iterator[None]:
    """OSError and ValueError, which say what does not fit, too little memory, and no compiler, become a `UserError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(first_line(error)) from None
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise UserError("out of memory: try a shorter text, or a smaller --dtype or --mem-dtype") from None
        if type(error).__module__.startswith("torch._inductor"):  # torch's compiler: most often another one is missing
            raise UserError(
                f"--compile fails here: {first_line(error)}; install a C++ compiler, or leave it out"
            ) from None
        raise


@contextmanager
def ending_well(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Around a program: it ends with one line and status 2 for a `UserError`, and quietly where its user stops it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the text
    try:
        with user_errors():
            yield
            sys.stdout.flush()  # what waits in there has a reader, or not
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
