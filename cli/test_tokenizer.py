"""Ids and texts are those of SentencePiece itself, streamed or not."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import sentencepiece

from cli.loading import TINY
from tokenizer import StreamDecoder, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # the real tokenizers are too large to be kept here
OURS = [ROOT / "testdata" / "prose.model", TINY / "tokenizer.model"]
RELEASED = sorted((SHARED / "tokenizers").glob("*.model"))
PATHS = OURS + RELEASED
TEXTS = [
    "My name is Julien", "", " ", "  two leading", "trailing ", "a\nb\n\nc", "naïve café — “quotes”…", "日本語",
    "👩\u200d👩\u200d👧 emoji", "</s><s>",
]  # fmt: skip

each_tokenizer = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def streamed(tokenizer: Tokenizer, ids: list[int], **options) -> str:
    decoder = StreamDecoder(tokenizer, **options)
    return "".join(map(decoder.feed, ids)) + decoder.flush()


@each_tokenizer
def test_ids_and_text_are_those_of_sentencepiece(path):
    raw, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer(path)
    for text in TEXTS:
        ids = raw.encode(text)
        assert tokenizer.encode(text) == [1, *ids] and tokenizer.encode(text, bos=False, eos=True) == [*ids, 2]
        assert tokenizer.decode([1, *ids, 2, 10**6]) == raw.decode(ids)


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_recorded_ids_of_the_released_tokenizers(path):
    tokenizer = Tokenizer(path)
    for case in json.loads((SHARED / "golden" / "tokenizer_cases.json").read_text())[path.name]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@each_tokenizer
def test_streamed_text_is_the_text_of_all_ids(path):
    tokenizer, rng = Tokenizer(path), random.Random(0)
    nasty = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\x80\xc0a "]
    nasty += [tokenizer.sp.piece_to_id("▁"), 0, 1, 2]
    for ids in [
        *map(tokenizer.encode, TEXTS),
        *([rng.choice([rng.randrange(tokenizer.vocab_size), *nasty]) for _ in range(9)] for _ in range(3000)),
    ]:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_streaming_holds_back_only_unfinished_characters():
    tokenizer = Tokenizer(PATHS[0])
    ids = tokenizer.encode("x € 😀y", bos=False)
    decoder, text = StreamDecoder(tokenizer), ""
    for i, _ in enumerate(ids):
        text += decoder.feed(ids[i])
        whole = tokenizer.decode(ids[: i + 1])
        assert text == whole.rstrip("\ufffd")  # which is how SentencePiece shows bytes that wait for more
    assert text == "x € 😀y"


def test_a_continuation_keeps_its_leading_space():
    tokenizer = Tokenizer(PATHS[0])
    ids = tokenizer.encode("the sea", bos=False)
    assert streamed(tokenizer, ids, continues=True) == " the sea" and streamed(tokenizer, ids) == "the sea"


def special_tokenizer(path: Path, text: str = "the sea", **options) -> Path:
    options = {"vocab_size": 3 + len({*text.replace(" ", "\u2581"), "\u2581"}), "minloglevel": 1} | options
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text] * 9), model_writer=file, **options)
    return path


@pytest.mark.parametrize("lacks", ["bos_id", "eos_id"])
def test_a_tokenizer_without_beginning_or_end_is_refused(lacks, tmp_path):
    with pytest.raises(ValueError, match="no <s> or no </s>"):
        Tokenizer(special_tokenizer(tmp_path / "m", **{lacks: -1}))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(b"no tokenizer")
    with pytest.raises(ValueError, match="m is not a SentencePiece model"):
        Tokenizer(tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "missing")


def test_ids_out_of_range_and_control_ids_are_no_text():
    tokenizer = Tokenizer(PATHS[0])
    for i in (-1, tokenizer.vocab_size, 0, 1, 2):
        assert tokenizer.decode([i]) == StreamDecoder(tokenizer).feed(i) == "" and not tokenizer.is_text(i)


@pytest.mark.parametrize(
    "kept", [{"add_dummy_prefix": False, "remove_extra_whitespaces": False}, {}], ids=["kept", "dropped"]
)
def test_tokenizers_that_keep_or_drop_all_spaces_stream_the_text_of_all_ids(kept, tmp_path):
    tokenizer = Tokenizer(special_tokenizer(tmp_path / "m", **kept))
    space, rest = tokenizer.sp.piece_to_id("\u2581"), tokenizer.encode("sea", bos=False)
    for ids in ([space, space, *rest], [space, *rest, space, space, *rest], rest + rest, tokenizer.encode("  the sea")):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == ("  the sea" if kept else "the sea")


@pytest.mark.parametrize(
    "kept", [{"add_dummy_prefix": False, "remove_extra_whitespaces": False}, {}], ids=["kept", "one"]
)
@pytest.mark.parametrize("text", ["鯨 在 海裡", "η θάλασσα είναι", "海と空"])
def test_spaces_are_streamed_right_by_tokenizers_that_have_no_latin_letter(text, kept, tmp_path):
    tokenizer = Tokenizer(special_tokenizer(tmp_path / "m", text, **kept))
    assert tokenizer.sp.is_unknown(tokenizer.sp.piece_to_id("a")) or "e" in text
    space, rng = tokenizer.sp.piece_to_id("\u2581"), random.Random(0)
    for _ in range(300):
        ids = [space] * rng.randrange(3) + [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 6))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer.sp.decode([i for i in ids if i > 2])
    assert streamed(tokenizer, tokenizer.encode(text)) == text


def test_what_ends_a_text_is_control_text_other_than_its_beginning(tmp_path):
    names = {
        "control_symbols": ["<|eot|>"],
        "user_defined_symbols": ["<|im_end|>"],
        "pad_id": 3,
        "hard_vocab_limit": False,
    }
    tokenizer = Tokenizer(special_tokenizer(tmp_path / "m", vocab_size=14, **names))
    ends = [i for i in range(-1, 20) if tokenizer.ends_text(i)]
    assert [tokenizer.sp.id_to_piece(i) for i in ends] == ["</s>", "<pad>", "<|eot|>"]


def test_the_digest_is_that_of_the_file(tmp_path):
    path = special_tokenizer(tmp_path / "m")
    assert Tokenizer(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()
