"""Runs programs that a model wrote, each in a process of its own that confine.py keeps to computing."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Event

NBYTES = 1 << 30  # of memory
PATIENCE = 5  # seconds that may pass for each that is computed: on a busy machine, and where a program sleeps
PASSED, LATE = "passed", "timed out"


def run_program(program: str, seconds: int, stop: Event) -> tuple[str, list[str]]:
    """What became of a program: PASSED if it came to its end, LATE, or how it failed. And what nothing keeps it from here. stop:
    set by another thread, it ends the program."""
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("confine.py"))]
    proof = secrets.token_hex()  # which no program can know, or say by accident
    with TemporaryDirectory() as folder, TemporaryFile() as asked:
        asked.write(f"{proof}\n{seconds} {NBYTES} {os.getpid()}\n{program}".encode(errors="surrogatepass"))
        asked.seek(0)
        streams = {"stdin": asked, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, bufsize=0, **streams) as process:
            deadline = time.monotonic() + PATIENCE * seconds
            while process.poll() is None and time.monotonic() < deadline and not stop.wait(0.01):
                pass
            late = process.returncode in (None, -signal.SIGXCPU)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, and any that it started where nothing keeps it from that
            status = process.wait()
            os.set_blocking(process.stdout.fileno(), False)
            said = (process.stdout.read(4096) or b"").decode(errors="replace")
    first, *lacks = said.split("\n")
    if first == proof:
        return PASSED, lacks
    ended = f"ended by signal {-status}" if status < 0 else f"ended early, with status {status}"
    return LATE if late else f"failed: {said or ended}", []


def lacking(seconds: int) -> list[str]:
    """What nothing keeps programs from on this system. Raises ValueError where none can be run."""
    if os.name != "posix":
        raise ValueError("--run needs Linux, or another system of its kind: elsewhere programs have no limits")
    result, lacks = run_program("", seconds, Event())
    if result != PASSED:
        raise ValueError(f"no program can be run here: one that does nothing {result}")
    return lacks


def run_programs(programs: Iterable[str], seconds: int) -> Iterator[str]:
    """What became of each, in their order; as many run at once as there are processors."""
    pool, stop = ThreadPoolExecutor(os.cpu_count()), Event()
    try:
        for result, _ in pool.map(partial(run_program, seconds=seconds, stop=stop), programs):
            yield result
    finally:  # after Ctrl-C too
        stop.set()
        pool.shutdown(cancel_futures=True)
