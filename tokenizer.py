"""Text to token ids and back: a SentencePiece model with LLaMA's conventions.

Ids are those of raw SentencePiece, `<s>` in front. Two things differ from what the fast tokenizers of other libraries do:

* Control text is text. `</s>` in a prompt is the characters `<`, `/`, `s`, `>`, never the id that ends a document;
  special tokens are asked for by id (`bos=True`, `tokenizer.eos_id`).
* Spaces are whatever the SentencePiece model makes of them: OpenLLaMA v1's drops leading, trailing and repeated ones
  (so it is poor at code), v2's keeps all.
"""

import codecs
from hashlib import sha256
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how pieces write a space


class Tokenizer:
    """bos_id, eos_id: ids of `<s>` and `</s>`; vocab_size: how many ids there are; digest: a hash of the file. Raises OSError,
    ValueError."""

    def __init__(self, path: str | Path):
        model = Path(path).read_bytes()
        self.sp = SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(
                f"{path} is not a SentencePiece model, as LLaMA 1 and 2 have it (Llama 3 has another kind): get it again"
            ) from None
        self.vocab_size, self.bos_id, self.eos_id = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no <s> or no </s>: it is no tokenizer of a LLaMA")
        self.digest = sha256(model).hexdigest()
        # How many leading spaces decoding drops: none, the one that encoding put there, or all.
        # A piece that begins with a space shows it: "\u2581" itself, where there is one.
        ids = (i for i in (self.sp.piece_to_id(SPACE), *range(self.vocab_size)) if self.is_text(i))
        start = next((i for i in ids if self.sp.id_to_piece(i).startswith(SPACE)), None)
        self.drops_one_space = start is not None and not self.sp.decode([start]).startswith(" ")
        self.drops_all_spaces = start is not None and self.sp.decode([start, start]) == ""

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.sp.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Special tokens, and ids that the model has but the tokenizer has not, are no text."""
        return self.sp.decode([i for i in ids if self.is_text(i)])

    def ends_text(self, i: int) -> bool:
        """Whether an id can be one that ends a text: it is control text, and does not begin one."""
        return 0 <= i < self.vocab_size and self.sp.is_control(i) and (i != self.bos_id or i == self.eos_id)

    def is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and not self.sp.is_control(i) and not self.sp.is_unknown(i)


class StreamDecoder:
    """Decodes ids one by one. The texts that `feed` and the final `flush` return, joined, are `Tokenizer.decode` of all ids.

    Text comes as soon as it is whole: only the bytes of an unfinished character are held back. `continues`: the ids go on
    after other text, so that a leading space belongs to them.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self.tokenizer = tokenizer
        self.drops_space = tokenizer.drops_one_space and not continues
        self.pending = b""  # the first bytes of a character

    def feed(self, i: int) -> str:
        if not self.tokenizer.is_text(i):
            return ""
        piece = self.tokenizer.sp.id_to_piece(i)
        if self.tokenizer.sp.is_byte(i):
            self.drops_space = False
            return self._feed_byte(bytes([int(piece[1:-1], 16)]))  # <0x0A>
        if self.drops_space:
            self.drops_space = self.tokenizer.drops_all_spaces and piece == SPACE
            piece = piece.removeprefix(SPACE)
        return self.flush() + piece.replace(SPACE, " ")

    def flush(self) -> str:
        """What was held back, at the end of the ids: bytes that are no character, each as U+FFFD."""
        pending, self.pending = self.pending, b""
        return "\ufffd" * len(pending)

    def _feed_byte(self, byte: bytes) -> str:
        replaced, self.pending = "", self.pending + byte
        while True:
            try:
                text = codecs.getincrementaldecoder("utf-8")().decode(self.pending)
            except UnicodeDecodeError:  # SentencePiece replaces a byte that starts no character, and tries the next
                replaced, self.pending = replaced + "\ufffd", self.pending[1:]
                continue
            if text:  # and "" while the character is unfinished
                self.pending = b""
            return replaced + text
