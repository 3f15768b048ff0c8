"""Runs a Python program that a model wrote, in a process that has first given up what such a program does not need.

execution.py starts it, once for each program. Standard input is a line that proves the program's end, a line with the seconds and
bytes that it may take and with who waits for it, and the program. Standard output gets the proof when the program has come to its
end, and else the error that it ended with. There is the standard library, and no package.

What is given up, the system keeps from the program, whatever it does: more time and memory, and files that grow (limits of the
process), all files but Python's own (Landlock), and every call of the system that computing does not need (seccomp). So there is
no network, no other process, no thread and no signal, and nothing is written. Landlock and seccomp are Linux's, and need no
rights. It is no more than that: a fault of the kernel is open to the program, and one that means to deceive its test can, since
both are in the same process.
"""

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterator

REFUSED, ALLOWED = 0x00050001, 0x7FFF0000  # what a filter answers: SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OPENAT = {"x86_64": 257, "aarch64": 56}
CALLS = {  # what Python computes with, by its numbers on both
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160),
    "getcwd": (79, 17), "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "getrandom": (318, 278),
    "statx": (332, 291), "faccessat2": (439, 439), "stat": (4,), "lstat": (6,), "access": (21,), "readlink": (89,),
}  # fmt: skip


def limit(seconds: int, nbytes: int) -> Iterator[str]:
    """Sets limits of the process. Says what it could not limit."""
    for name, soft, hard, what in (
        ("RLIMIT_CPU", seconds, seconds + 1, "taking more time"),  # a signal, that it may ignore, and then the end
        ("RLIMIT_AS", nbytes, nbytes, "taking more memory"),
        ("RLIMIT_FSIZE", 0, 0, "writing to files"),
        ("RLIMIT_NPROC", 0, 0, "starting processes"),
        ("RLIMIT_CORE", 0, 0, "leaving its memory in a file"),
    ):
        try:
            kind = getattr(resource, name)
            most = resource.getrlimit(kind)[1]
            known = most != resource.RLIM_INFINITY
            resource.setrlimit(kind, (min(soft, most), min(hard, most)) if known else (soft, hard))
        except (AttributeError, OSError, ValueError):
            yield what


def close_files(libc: ctypes.CDLL, readable: list[str]) -> bool:
    """Landlock: from now on, what is beneath these folders can be opened, to be read, and nothing else. Whether it can be had."""
    everything, reading = (1 << 13) - 1, 1 << 2 | 1 << 3  # of its first version; files and folders
    create_ruleset, add_rule, restrict_self, beneath = 444, 445, 446, 1
    ruleset = libc.syscall(create_ruleset, struct.pack("Q", everything), 8, 0)
    if ruleset < 0:
        return False
    for folder in readable:
        opened = os.open(folder, os.O_PATH)
        libc.syscall(add_rule, ruleset, beneath, struct.pack("=Qi", reading, opened), 0)
        os.close(opened)
    return libc.syscall(restrict_self, ruleset, 0) == 0


def rules(machine: str) -> bytes:
    """A program for the kernel, in the language of BPF. CALLS are allowed, openat too if it is to read, and nothing else."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    number, architecture, flags = 0, 4, 32  # where these stand in what the kernel shows of a call
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    code = [
        (load, 0, 0, architecture),
        (equal, 1, 0, ARCHITECTURES[machine]),  # the numbers are how many of the next to leave out, if so and if not
        (answer, 0, 0, REFUSED),
        (load, 0, 0, number),
        (equal, 0, 4, OPENAT[machine]),
        (load, 0, 0, flags),
        (any_bit, 0, 1, writes),
        (answer, 0, 0, REFUSED),
        (answer, 0, 0, ALLOWED),
    ]
    column = list(ARCHITECTURES).index(machine)
    for numbers in CALLS.values():
        if column < len(numbers):
            code += [(equal, 0, 1, numbers[column]), (answer, 0, 0, ALLOWED)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in [*code, (answer, 0, 0, REFUSED)])


def close_calls(libc: ctypes.CDLL) -> bool:
    """seccomp: from now on the kernel refuses what is not in `rules`. Whether it can be had."""
    machine, set_seccomp, filtered = os.uname().machine, 22, 2
    if machine not in ARCHITECTURES:
        return False
    code = ctypes.create_string_buffer(rules(machine))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    return libc.prctl(set_seccomp, filtered, program, 0, 0) == 0


def confine(seconds: int, nbytes: int, parent: int) -> Iterator[str]:
    """Gives up what the program does not need. Says what the system does not keep it from."""
    yield from limit(seconds, nbytes)
    linux = sys.platform == "linux"
    libc = ctypes.CDLL(None)
    if linux:
        end_with_parent, no_new_privileges = 1, 38
        libc.prctl(end_with_parent, 9, 0, 0, 0)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)
        libc.prctl(no_new_privileges, 1, 0, 0, 0)  # without which neither of the two is had
    libraries = (f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64")
    if not (linux and close_files(libc, [path for path in libraries if os.path.isdir(path)])):
        yield "reading your files"
    if not (linux and close_calls(libc)):
        yield "writing files, using the network, and starting and ending processes"


def main():
    proof, limits, program = sys.stdin.buffer.read().split(b"\n", 2)
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    lacks = list(confine(*map(int, limits.split())))
    try:
        exec(compile(program.decode(), "program", "exec"), {"__name__": "__main__"})
        said = "\n".join([proof.decode(), *lacks]).encode()
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".removesuffix(": ").encode(errors="replace")[:300]
    os.write(answer, said)
    os._exit(0)


if __name__ == "__main__":
    main()
