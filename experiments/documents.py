"""Which documents experiments read: held-out ones of a folder, all or some."""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

from training.data import DATA, held_out, text_files


def add_document_flags(parser: argparse.ArgumentParser):
    """--data and --documents, for `document_files`."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        default=DATA,
        help="folder of .txt files, of which the held-out ones are read (default: training/data)",
    )
    add(
        "--documents",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="read those whose file names match, such as 'hol_*' 'coq_*' (default: all)",
    )


def document_files(args: argparse.Namespace) -> list[Path]:
    """The held-out files of --data whose names match one of --documents. Raises ValueError where a pattern matches none."""
    files = held_out(text_files(args.data))
    for pattern in args.documents:
        if not any(fnmatchcase(file.name, pattern) for file in files):
            raise ValueError(f"--documents {pattern}: none of the {len(files)} held out in {args.data} is named so")
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in args.documents)]
