"""How programs end: a user's mistake is one line and status 2, Ctrl-C is no mistake, and a bug is a traceback.

What the tests of programs share stands here: running a program's main, and the one line that a failed one says.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from cli.ending import UserError, ending_well, first_line, out_of_memory, printable, user_errors

import pytest
import torch

from cli.flags import parser_for

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
        (ValueError("one\ntwo"), UserError, "^one two$"),
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
    assert (
        first_line(ValueError("\n one\ntwo ")) == "one two"
        and first_line(RuntimeError("one\ntwo")) == "one"
        and first_line(KeyError()) == "KeyError"
    )
    assert not out_of_memory(RuntimeError("a bug")) and out_of_memory(RuntimeError("out of memory"))


def test_what_takes_less_memory_is_what_a_program_says():
    with pytest.raises(UserError, match="^out of memory: try fewer rows$"), user_errors("fewer rows"):
        raise MemoryError


RAW = "a\x1b[2J\x1b]52;c;aGk=\x07b\x9bc\x7f\u202eok\u2066"  # clears a screen, fills a clipboard, turns letters around


def test_what_steers_a_terminal_is_made_visible():
    assert printable(RAW) == "a\ufffd[2J\ufffd]52;c;aGk=\ufffdb\ufffdc\ufffd\ufffdok\ufffd"
    assert printable("one\ntwo\r\n\tthree\u2028four") == "one two   three four"
    assert printable("one\ntwo\r\n\tthree", "\n\t") == "one\ntwo\ufffd\n\tthree"
    plain = "é 日本語\u3000\u00a0क\u094d\u200dष 👩\u200d💻 \u200f\u05d0"  # joiners, spaces and marks of scripts stay
    assert printable(plain) == printable(plain, "\n\t") == plain
    codes = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not {*printable("".join(codes))} & {*codes} and {*printable("".join(codes), "\n\t")} & {*codes} == {*"\n\t"}


def on_a_terminal(*command) -> str:
    """What a program of this repository writes to a terminal."""
    pty = pytest.importorskip("pty")
    outer, inner = pty.openpty()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    written = b""
    with suppress(OSError):  # Linux says so that the other end is closed
        while part := os.read(outer, 4096):
            written += part
    os.close(outer)
    process.wait()
    return written.decode().replace("\r\n", "\n")


def test_text_of_a_model_is_cleaned_for_a_terminal_and_goes_elsewhere_as_it_is():
    script = ["-c", f"from cli.ending import say, tell\nsay({RAW!r} + '\\n'); tell({RAW!r})"]
    assert on_a_terminal(*script) == 2 * (printable(RAW) + "\n")
    done = run_program(*script)
    assert (done.stdout, done.stderr) == (RAW + "\n", printable(RAW) + "\n")


def ends(capsys, error: BaseException | None, prints: str = "") -> tuple[int, str, str]:
    """Status, standard output and standard error of a program that prints something and then raises an error."""
    status = 0
    try:
        parser = parser_for("It ends.")
        parser.prog = "program.py"
        with ending_well(parser):
            print(prints, end="")
            if error is not None:
                raise error
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_a_program_ends_with_a_line_and_status_2_or_quietly_where_its_user_stops_it(capsys):
    assert ends(capsys, None, "text") == (0, "text", "")
    for error in (UserError("what to do"), ValueError("what\nto do")):
        assert ends(capsys, error, "text") == (2, "text", "program.py: error: what to do\n")
    assert ends(capsys, FileNotFoundError(2, "No such file", "x")) == (2, "", "program.py: error: x: No such file\n")
    assert ends(capsys, ValueError(f"no {RAW}\r")) == (2, "", f"program.py: error: no {printable(RAW)}\n")
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


PROGRAM = (
    "from argparse import SUPPRESS, ArgumentParser\n"
    "from cli.ending import ending_well\n"
    "with ending_well(ArgumentParser(usage=SUPPRESS)):\n    "
)


def test_a_program_whose_output_nobody_reads_ends_quietly():
    for script in ("print('x' * 9)", "print('x' * 9, flush=True)", "[print('x' * 999) for _ in range(999)]"):
        ours, theirs = os.pipe()
        os.close(ours)
        done = run_program("-c", PROGRAM + script, capture_output=False, stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_text_that_cannot_be_written_is_one_line():
    for script in ("print('x' * 9)", "print('x' * 9, flush=True)", "[print('x' * 999) for _ in range(999)]"):
        with open("/dev/full", "w") as full:
            done = run_program("-c", PROGRAM + script, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, "-c: error: [Errno 28] No space left on device\n")


PROGRAMS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")) if path.parent.name != "cli"]
PROGRAMS = [path for path in PROGRAMS if "with ending_well(parser" in path.read_text(encoding="utf-8")]
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_torch_is_imported_ends_a_program_without_a_word(program, tmp_path):
    """It comes in the midst of the import of a torch that says so, and then never ends."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(99)\n")
    command = [sys.executable, str(ROOT / program), "--help"]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # who runs the tests may have it ignored
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "preexec_fn": default, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_packages_do_not_warn_in_front_of_a_program_and_imports_change_nothing_for_others(tmp_path):
    says = "import signal, warnings\nwarnings.warn('of torch')\nprint(signal.getsignal(2) is signal.default_int_handler)\nexit()"
    (tmp_path / "torch.py").write_text(says)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_program("generate.py", env=env)
    assert (done.stdout, done.stderr) == ("False\n", "")
    done = run_program("-c", "import generate", env=env)
    assert done.stdout == "True\n" and "UserWarning: of torch" in done.stderr
