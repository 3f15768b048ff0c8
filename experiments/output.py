"""What experiments share: names of models, and their tables and pictures."""

import argparse
from pathlib import Path

from cli.ending import printable

from cli.flags import check_new_file, new_path
from cli.picture import import_pyplot
from fast.files import replacing

KINDS = (".png", ".svg", ".pdf")  # of pictures


def by_name(paths: list[Path]) -> dict[str, Path]:
    """Models by the names of their folders, or by their paths where two have one name; each once."""
    folders = {path.resolve(): path for path in paths}
    names = [folder.name for folder in folders]
    labels = (folder.name if names.count(folder.name) == 1 else str(path) for folder, path in folders.items())
    return {printable(label): path for label, path in zip(labels, folders.values())}


def add_output_flags(parser: argparse.ArgumentParser, drawn: str):
    """--table and --picture, for `check_outputs`."""
    parser.add_argument("--table", type=new_path, metavar="FILE", help="write the table here too")
    parser.add_argument("--picture", type=new_path, metavar="FILE", help=f"draw {drawn} (needs matplotlib)")


def check_outputs(args: argparse.Namespace):
    """Raises ValueError, before the work begins, for what could not be drawn or written after it."""
    for flag in ("--table", "--picture"):
        if path := vars(args)[flag[2:]]:
            check_new_file(flag, path)
    if args.picture:
        import_pyplot()
        if args.picture.suffix not in KINDS:
            raise ValueError(f"--picture {args.picture}: name a .png, .svg or .pdf file")


def save_table(text: str, path: Path):
    with replacing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
