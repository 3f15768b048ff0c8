"""Trains a tokenizer such as the tiny model's, on the same text as a model.

    python training/train_tokenizer.py --output tiny/tokenizer.model
    python training/train_tokenizer.py --data my_books --vocab-size 8000 --output my_tokenizer.model

A SentencePiece BPE of 2048 pieces with LLaMA's settings: byte fallback, digits split, no normalisation, spaces kept.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, first_line, say

import sentencepiece

from cli.flags import check_new_file, new_path, number, parser_for
from cli.texts import read_text
from fast.files import replacing
from fast.model import LARGEST
from training.data import DATA, held_out, text_files
from training.tasks import GRASS, INTRO, KEY, QUESTION

LEAST = 260  # pieces: a byte each, <unk>, <s>, </s>, and one of text
PASSKEY_LINES = 20_000  # of about 1,300,000: enough that the words of the pass-key task are whole pieces


def lines(folder: Path):
    files = text_files(folder)
    kept = set(held_out(files))
    for path in files:
        if path not in kept:
            yield from (line for line in read_text(path).splitlines() if line)
    task = " ".join((INTRO, GRASS, KEY.format(key="0123456789"), QUESTION))
    yield from itertools.repeat(task, PASSKEY_LINES)


def train(folder: Path, output: Path, vocab_size: int):
    """Raises OSError, and ValueError where the text has not as many pieces in it, or the size has no room for the bytes."""
    sentences = list(lines(folder))  # what is wrong with a text is told as it is
    with replacing(output) as unfinished, unfinished.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # indentation
                max_sentence_length=1 << 20,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=1,
            )
        except RuntimeError as error:
            raise ValueError(f"--vocab-size {vocab_size}: {first_line(error).split('] ')[-1]}") from None


def main():
    parser = parser_for(__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder of .txt files (default: training/data)",
    )
    parser.add_argument("--output", type=new_path, required=True, help="file to write")
    parser.add_argument("--vocab-size", type=number(int, LEAST, LARGEST), default=2048, help="pieces (default 2048)")
    args = parser.parse_args()
    with ending_well(parser):
        check_new_file("--output", args.output)
        train(args.data, args.output, args.vocab_size)
        say(f"wrote {args.output}\n")


if __name__ == "__main__":
    main()
