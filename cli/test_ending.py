"""How programs end: a user's mistake is one line and status 2, Ctrl-C is no mistake, and a bug is a traceback.

What the tests of programs share stands here: running a program's main, and the one line that a failed one says.
"""

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.ending import UserError, ending_well, first_line, out_of_memory, user_errors

ROOT = Path(__file__).resolve().parents[1]


def run_main(main: Callable[[], None], *args) -> int:
    """Exit status of a program's main with these arguments."""
    argv, sys.argv = sys.argv, [f"{main.__module__}.py", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
    return 0


def one_line(capsys) -> str:
    """What a failed program said: one line on standard error, and nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return err


def run_program(*command, **options) -> subprocess.CompletedProcess:
    """A program of this repository, in a process of its own."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"cwd": ROOT, "env": buffered, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *map(str, command)], **options)


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (MemoryError(), UserError, "^out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), UserError, "^out of memory"),
        (RuntimeError("not enough memory: you tried"), UserError, "^out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 10 TB"), UserError, "^out of memory"),
        (torch.OutOfMemoryError("of any text"), UserError, "^out of memory"),
        (OSError(2, "No such file", "x"), UserError, "^x: No such file$"),
        (ValueError("one\ntwo"), UserError, "^one$"),
        (ValueError(), UserError, "^ValueError$"),
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
        (TypeError("a bug"), TypeError, "^a bug$"),
        (BrokenPipeError(), BrokenPipeError, "^$"),
        (UserError("as it is"), UserError, "^as it is$"),
    ],
    ids=repr,
)
def test_users_mistakes_become_one_line_and_bugs_stay_what_they_are(error, kind, said):
    with pytest.raises(kind, match=said), user_errors():
        raise error


def test_the_first_line_of_an_error_names_the_file():
    assert first_line(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
    assert first_line(OSError("file: cannot be written")) == "file: cannot be written"
    assert first_line(ValueError("\n one\ntwo ")) == "one" and first_line(KeyError()) == "KeyError"
    assert not out_of_memory(RuntimeError("a bug")) and out_of_memory(RuntimeError("out of memory"))


def ends(capsys, error: BaseException | None, prints: str = "") -> tuple[int, str, str]:
    """Status, standard output and standard error of a program that prints something and then raises an error."""
    status = 0
    try:
        with ending_well(argparse.ArgumentParser(prog="program.py", usage=argparse.SUPPRESS)):
            print(prints, end="")
            if error is not None:
                raise error
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_a_program_ends_with_a_line_and_status_2_or_quietly_where_its_user_stops_it(capsys):
    assert ends(capsys, None, "text") == (0, "text", "")
    for error in (UserError("what to do"), ValueError("what to do\nmore")):
        assert ends(capsys, error, "text") == (2, "text", "program.py: error: what to do\n")
    assert ends(capsys, FileNotFoundError(2, "No such file", "x")) == (2, "", "program.py: error: x: No such file\n")
    assert ends(capsys, KeyboardInterrupt(), "text so far") == (130, "text so far", "")


def test_a_bug_is_a_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ends(capsys, ZeroDivisionError())


def test_streams_that_are_closed_or_lack_a_character_are_no_mistake(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for streams in ({"stdout": None}, {"stderr": None}, {"stdout": None, "stderr": None}, {"stdout": ascii_only}):
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            with ending_well(argparse.ArgumentParser()):
                print("éa", flush=True)
                print("a", file=sys.stderr)
    assert ascii_only.buffer.getvalue() == b"?a\n"


PROGRAM = "import argparse\nfrom cli.ending import ending_well\nwith ending_well(argparse.ArgumentParser()):\n    "


def test_a_program_whose_output_nobody_reads_ends_quietly():
    for script in ("print('x' * 9)", "print('x' * 9, flush=True)", "[print('x' * 999) for _ in range(999)]"):
        ours, theirs = os.pipe()
        os.close(ours)
        done = run_program("-c", PROGRAM + script, capture_output=False, stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        assert (done.returncode, done.stderr) == (0, "")
