"""Ctrl-C and SIGTERM, which may end a run between two steps, and not in the middle of one."""

import os
import signal
import sys
from contextlib import suppress


class Stop:
    """Within it, SIGINT (Ctrl-C) and SIGTERM end the program at once, with status 130 or 143, until `waits` is true: then the
    first is noted in `number`, for the run to end after its step. A second Ctrl-C still ends at once; a second SIGTERM does not,
    since schedulers and torchrun may both send one."""

    def __init__(self):
        self.number, self.waits = 0, False

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame):
        if self.number and number == signal.SIGTERM:
            return
        if self.waits and not self.number:
            self.number = number
            say("this step is finished and a checkpoint written; Ctrl-C (again) ends at once")
            return
        say("ended at once" if self.waits else "ended before the first step, so there is nothing to save")
        sys.exit(128 + number)


def say(text: str):
    """In the middle of anything, also of another line that is being printed."""
    with suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: {text}\n".encode())
