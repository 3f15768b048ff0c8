"""How programs end: a user's mistake is one line and status 2, Ctrl-C is no mistake, and a bug is a traceback.

Programs import this before torch, which takes seconds: Ctrl-C is quiet from then on. And what goes to a terminal goes through
here: text that may come from anywhere must not steer it.
"""

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What steers a terminal, or the order of its letters.
STEERS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_program() -> bool:
    """Whether Python runs a program of ours, or its child, and not a test or a notebook that imports from one."""
    main = sys.modules.get("__mp_main__", sys.modules["__main__"])
    return ROOT in Path(getattr(main, "__file__", None) or "/").resolve().parents[:2]


if is_program():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `ending_well`: no traceback of half an import
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of packages, to their own users: they would stand in front of our line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


LESS_MEMORY = "a shorter text, or a smaller --dtype or --mem-dtype"


class UserError(Exception):
    """One line for the user."""


def first_line(error: Exception) -> str:
    """What an error says, on one line. OSError and ValueError are ours, and said whole: a name in them may have several lines.
    Others go on with advice."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(lines) if isinstance(error, (OSError, ValueError)) else lines[0]


def printable(text: str, kept: str = "") -> str:
    """Text that may come from anywhere, for a terminal: what steers it becomes U+FFFD, but line ends and tabs become spaces.
    kept: those that stay instead."""

    def replacement(match: re.Match) -> str:
        c = match[0]
        return c if c in kept else " " if c.isspace() and not kept else "\ufffd"

    return STEERS.sub(replacement, text)


def say(text: str):
    """A model's text to standard output, as it comes; byte for byte, if that is no terminal."""
    print(printable(text, "\n\t") if sys.stdout.isatty() else text, end="", flush=True)


def tell(*lines: str):
    """Lines to standard error."""
    print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def warn(text: str):
    tell(f"{Path(sys.argv[0]).name}: warning: {text}")


def out_of_memory(error: Exception) -> bool:
    said = any(text in str(error) for text in ("allocate memory", "out of memory", "not enough memory"))
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


@contextmanager
def user_errors(less: str = LESS_MEMORY) -> Iterator[None]:
    """OSError and ValueError, which say what does not fit, too little memory, and no compiler, become a `UserError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(first_line(error)) from None
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise UserError(f"out of memory: try {less}") from None
        if type(error).__module__.startswith("torch._inductor"):  # torch's compiler: most often another one is missing
            raise UserError(
                f"--compile fails here: {first_line(error)}; install a C++ compiler, or leave it out"
            ) from None
        raise


@contextmanager
def ending_well(parser: argparse.ArgumentParser, less: str = LESS_MEMORY) -> Iterator[None]:
    """Around a program: it ends with one line and status 2 for a `UserError`, and quietly where its user stops it. less: what
    takes less memory."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the text
    before = signal.getsignal(signal.SIGINT)
    try:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with user_errors(less):
            yield
            sys.stdout.flush()  # what waits in there has a reader, or not
    except UserError as error:
        drop_output()
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough
        drop_output()
        sys.exit(0)
    finally:
        signal.signal(signal.SIGINT, before)


def drop_output():
    """Gives up what cannot be written, on a full disk say: else Python tries again when it ends, and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
