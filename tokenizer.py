"""Text to token ids and back, with LLaMA's conventions: of a SentencePiece model, or of a tokenizer.json.

Ids are those of raw SentencePiece or of the tokenizers library, `<s>` in front; of a tokenizer.json, what its own
post-processor puts there, if anything. Two things differ from what the tokenizers of other libraries do:

* Control text is text. `</s>` in a prompt is the characters `<`, `/`, `s`, `>`, never the id that ends a document;
  special tokens are asked for by id (`bos=True`, `tokenizer.eos_id`), or by name in what a chat template wrote.
* Spaces are whatever the file makes of them: OpenLLaMA v1's drops leading, trailing and repeated ones (so it is poor at
  code), v2's keeps all.
"""

import codecs
import json
import re
from hashlib import sha256
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how pieces write a space
PLAIN = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
BYTES = {chr(byte): byte for byte in PLAIN} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}  # GPT-2's letters

codecs.register_error("replace each", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """`Tokenizer(path)` is of the kind that the file is of, as `pathlib.Path(path)` is. Raises OSError, ValueError.

    bos_id: the id in front of a text, None where there is none; eos_id: what ends it; pad_id: None where there is none;
    special: name -> id of all control tokens, those too that files beside it add; vocab_size: how many ids there are;
    digest: a hash of the file.
    drops_one_space, drops_all_spaces: how many leading spaces decoding drops: the one that encoding put there, or all.
    errors: what decoding makes of bytes that are no text, as `bytes.decode` has it.
    """

    def __new__(cls, path: str | Path):
        kind = JsonTokenizer if Path(path).suffix == ".json" else SentencePieceTokenizer
        return super().__new__(kind if cls is Tokenizer else cls)

    def __reduce__(self):  # a copy reads the file again
        return type(self), (self.path,)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """bos, eos: with bos_id in front, if there is one; with eos_id behind."""
        start = [] if self.bos_id is None else [self.bos_id]
        return start * bos + self.encode_text(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Special tokens, and ids that the model has but the tokenizer has not, are no text."""
        decoder = StreamDecoder(self)
        return "".join(map(decoder.feed, ids)) + decoder.flush()

    def ends_text(self, i: int) -> bool:
        """Whether an id can be one that ends a text: it is control text, and does not begin one."""
        return i in self.special.values() and (i != self.bos_id or i == self.eos_id)

    def begins_word(self, i: int) -> bool:
        return self.is_text(i) and self.piece(i).startswith(SPACE)


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model."""

    errors = "replace each"

    def __init__(self, path: str | Path):
        self.path, self.sp = Path(path), SentencePieceProcessor()
        model = self.path.read_bytes()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model, as LLaMA 1 and 2 have it: get it again") from None
        self.vocab_size, self.bos_id, self.eos_id = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
        self.pad_id = self.sp.pad_id() if self.sp.pad_id() >= 0 else None
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no <s> or no </s>: it is no tokenizer of a LLaMA")
        self.digest = sha256(model).hexdigest()
        self.special = added_tokens(self.path)
        self.special |= {self.piece(i): i for i in range(self.vocab_size) if self.sp.is_control(i)}
        # A piece that begins with a space shows what becomes of it: "\u2581" itself, where there is one.
        ids = (i for i in (self.sp.piece_to_id(SPACE), *range(self.vocab_size)) if self.begins_word(i))
        start = next(ids, None)
        self.drops_one_space = start is not None and not self.sp.decode([start]).startswith(" ")
        self.drops_all_spaces = start is not None and self.sp.decode([start, start]) == ""

    def encode_text(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def encode_special(self, text: str, guard: str) -> list[int]:
        """Of a text in which the name of a special token is that token. `guard`, a character that stands nowhere else, breaks up
        a name that is to stay text, and is left out."""
        names = "|".join(re.escape(name) for name in sorted(self.special, key=len, reverse=True))
        parts = re.split(f"({names})", text)  # text, name, text, ..., text
        ids = [[self.special[x]] if n % 2 else self.sp.encode(x.replace(guard, "")) for n, x in enumerate(parts)]
        return sum(ids, [])

    def is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and not self.sp.is_control(i) and not self.sp.is_unknown(i)

    def piece(self, i: int) -> str:
        return self.sp.id_to_piece(i)

    def bytes_of(self, i: int) -> bytes:
        """What an id adds to a text, in UTF-8."""
        if not self.is_text(i):
            return b""
        piece = self.piece(i)  # <0x0A>, or a text
        return bytes([int(piece[1:-1], 16)]) if self.sp.is_byte(i) else piece.replace(SPACE, " ").encode()


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, of bytes as Llama 3 has it or of SentencePiece's kind as Llama 2 has it, by the tokenizers library. What
    ends a text is said by the files beside it."""

    drops_all_spaces = False

    def __init__(self, path: str | Path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path} is read by another package: pip install tokenizers") from None
        self.path = Path(path)
        data = self.path.read_bytes()
        self.digest = sha256(data).hexdigest()
        files = [beside(self.path, name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
        self.named = {key: content(token) for file in files for key, token in file.items() if key.endswith("_token")}
        try:
            self.fast = tokenizers.Tokenizer.from_buffer(sound(data, {*self.named.values()}))
            show = self.fast.decoder.decode  # of pieces
        except Exception as error:  # of the library's one kind; and a file may have no decoder
            raise ValueError(f"{path} is no tokenizer.json that can be read: {str(error).splitlines()[0]}") from None
        self.of_bytes = show(["\u0120"]) == " "
        self.errors = "replace" if self.of_bytes else "replace each"
        self.drops_one_space = not self.of_bytes and show([SPACE + "a"]) == "a"
        if not self.of_bytes and show(["a", SPACE + "b", "<0x41>"]) != "a bA":
            raise ValueError(f"{path} writes spaces and bytes otherwise than LLaMA's tokenizers do: it is none of them")
        known = [name for name in self.named.values() if name and self.fast.token_to_id(name) is not None]
        self.fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in known])
        self._find_ids()

    def _find_ids(self):
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True  # as text
        self.special = {x.content: i for i, x in self.fast.get_added_tokens_decoder().items() if x.special}
        self.vocab_size = 1 + max(self.fast.get_vocab().values())
        start = self.fast.encode("a")
        self.bos_id = start.ids[0] if start.special_tokens_mask[:1] == [1] else None
        self.pad_id = self.special.get(self.named.get("pad_token"))
        ends = [self.special.get(self.named.get("eos_token"))]
        for name in ("generation_config.json", "config.json"):
            said = beside(self.path, name).get("eos_token_id")
            ends += said if isinstance(said, list) else [said]
        self.eos_id = next((i for i in ends if i in self.special.values()), None)
        if self.eos_id is None:
            raise ValueError(
                f"{self.path}: no file beside it says what ends a text: get its tokenizer_config.json, too"
            )

    def encode_text(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str, guard: str) -> list[int]:
        """See `SentencePieceTokenizer`."""
        from tokenizers import normalizers

        kept = self.fast.normalizer
        try:  # special tokens are found first, then the guard goes
            self.fast.normalizer = normalizers.Sequence([normalizers.Replace(guard, ""), *[kept] * (kept is not None)])
            self.fast.encode_special_tokens = False
            return self.encode_text(text)
        finally:
            self.fast.normalizer, self.fast.encode_special_tokens = kept, True

    def is_text(self, i: int) -> bool:
        piece = self.piece(i)
        return bool(piece) and piece not in self.special

    def piece(self, i: int) -> str:
        return self.fast.id_to_token(i) or "" if 0 <= i < self.vocab_size else ""

    def begins_word(self, i: int) -> bool:
        return self.bytes_of(i).startswith(b" ")

    def bytes_of(self, i: int) -> bytes:
        """See `SentencePieceTokenizer`."""
        piece = self.piece(i) if self.is_text(i) else ""
        if self.of_bytes:
            return bytes(BYTES[c] for c in piece) if BYTES.keys() >= {*piece} else piece.encode()
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()


class StreamDecoder:
    """Decodes ids one by one. The texts that `feed` and the final `flush` return, joined, are `Tokenizer.decode` of all ids.

    Text comes as soon as it is whole: only the bytes of an unfinished character are held back. `continues`: the ids go on
    after other text, so that a leading space belongs to them.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self.tokenizer = tokenizer
        self.drops_space = tokenizer.drops_one_space and not continues
        self.decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)

    def feed(self, i: int) -> str:
        data = self.tokenizer.bytes_of(i)
        if data and self.drops_space:
            starts = self.tokenizer.begins_word(i)
            self.drops_space = starts and data == b" " and self.tokenizer.drops_all_spaces
            data = data[starts:]
        return self.decoder.decode(data)

    def flush(self) -> str:
        """What was held back, at the end of the ids: bytes that are no character, as U+FFFD."""
        return self.decoder.decode(b"", final=True)

    @property
    def pending(self) -> bytes:
        """The first bytes of a character."""
        return self.decoder.getstate()[0]


def sound(data: bytes, special: set[str]) -> bytes:
    """A tokenizer.json whose special tokens are found as they are written, and not made by merges of their letters."""
    raw = json.loads(data)
    tokens = [token for token in raw["added_tokens"] if token["special"]]
    special, merges = special | {token["content"] for token in tokens}, raw["model"]["merges"]
    kept = [x for x in merges if "".join(x.split(" ") if isinstance(x, str) else x) not in special]  # "a b", or a pair
    if len(kept) == len(merges) and not any(token["normalized"] for token in tokens):
        return data
    for token in tokens:
        token["normalized"] = False
    raw["model"]["merges"] = kept
    return json.dumps(raw).encode()


def beside(path: Path, name: str) -> dict:
    """The object in a JSON file in a tokenizer's folder; where there is none, or it is broken, nothing is known of it."""
    try:
        raw = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def content(token) -> str:
    """The text of a special token, which stands in Hugging Face's files by itself or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def added_tokens(path: Path) -> dict[str, int]:
    """Special tokens that Hugging Face's files add to a tokenizer.model beside them: what ends a turn of a chat, say."""
    decoder = beside(path, "tokenizer_config.json").get("added_tokens_decoder")
    listed = decoder.items() if isinstance(decoder, dict) else ()
    added = {content(token): i for i, token in listed if isinstance(token, dict) and token.get("special")}
    added |= beside(path, "added_tokens.json")
    return {name: int(i) for name, i in added.items() if name and str(i).isdecimal()}
