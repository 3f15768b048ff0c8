"""Fetches WordNet's glosses, with the files they are from, into evaluation/data/wordnet.jsonl.

    python evaluation/fetch_wordnet.py
    python evaluation/fetch_wordnet.py && python evaluation/manyshot.py --task wordnet --lengths 1k,4k --draws 2 --questions 50

A gloss is the definition of a word. WordNet's authors wrote them in 45 files, by part of speech and subject, such as noun.animal:
these are the labels. Left out are examples of use behind a definition, definitions that are in several files, and very long ones.
It is WordNet 3.0, Debian package wordnet-base (Princeton University's own permissive licence). Nothing is installed.
"""

import gzip
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

from cli.flags import check_new_folder, parser_for
from evaluation.questions import DATA, SOURCES
from fast.files import replacing
from training.fetch_data import fetch_debian

PACKAGE = "wordnet-base=1:3.0-37*"
LONGEST = 200  # characters: what a prompt has room for goes by its longest question, and 1 gloss in 130 is longer


def glosses(unpacked: Path) -> dict[str, str]:
    """Label by gloss, of a package that was unpacked."""
    manual = gzip.decompress((unpacked / "usr/share/man/man5/lexnames.5WN.gz").read_bytes()).decode()
    names = {number: f"{part} {subject}" for number, part, subject in re.findall(r"(?m)^(\d\d)\t(\w+)\.(\w+)", manual)}
    labels: dict[str, set[str]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (unpacked / "usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                words, _, gloss = line.partition("|")
                definition = gloss.split('; "')[0].strip()
                labels.setdefault(definition, set()).add(names[words.split()[1]])
    return {gloss: min(found) for gloss, found in labels.items() if len(found) == 1 and len(gloss) <= LONGEST}


def fetch():
    check_new_folder("the folder of glosses", DATA)
    with tempfile.TemporaryDirectory() as temporary:
        found = glosses(fetch_debian((PACKAGE,), Path(temporary)))
    DATA.mkdir(exist_ok=True)
    [name], _ = SOURCES["wordnet"]
    with replacing(DATA / name) as unfinished:
        rows = (json.dumps({"text": gloss, "label": label}) + "\n" for gloss, label in found.items())
        unfinished.write_text("".join(rows), encoding="utf-8")
    print(f"{len(found):,} glosses of {len({*found.values()})} labels in {DATA / name}")


def main():
    parser = parser_for(__doc__)
    parser.parse_args()
    with ending_well(parser):
        fetch()


if __name__ == "__main__":
    main()
