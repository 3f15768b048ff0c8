"""Texts are UTF-8 with line ends as "\\n", whatever editor wrote them, and what is not is refused with the byte."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from cli.texts import KEY, QUESTION, decode, hide_key, read_json_lines, read_prompt, read_text

TEXT = "one\r\ntwo\nthree\rcafé — 日本語\r\n"
READ = "one\ntwo\nthree\ncafé — 日本語\n"


def prompt_of(prompt: str | None = None, prompt_file: str | None = None) -> str:
    return read_prompt(SimpleNamespace(prompt=prompt, prompt_file=prompt_file))


@pytest.fixture
def pipe(monkeypatch):
    """Gives bytes to standard input; None closes it."""

    def put(data: bytes | None):
        monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))

    return put


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_a_byte_order_mark_is_dropped_and_every_line_end_becomes_a_newline(mark, tmp_path, pipe):
    data = mark + TEXT.encode()
    (tmp_path / "text").write_bytes(data)
    pipe(data)
    assert decode(data, "x") == READ
    assert read_text(tmp_path / "text") == READ
    assert prompt_of(prompt_file=str(tmp_path / "text")) == READ
    assert prompt_of(prompt_file="-") == READ


def test_a_mark_that_stands_elsewhere_and_spaces_stay(tmp_path):
    text = "  a\ufeffb \n\n "
    assert decode(text.encode(), "x") == text and decode(b"", "x") == ""


def test_what_is_not_utf8_is_refused_with_the_byte_and_the_name_of_where_it_is_from(tmp_path, pipe):
    path = tmp_path / "book"
    path.write_bytes("café".encode("latin-1"))
    pipe(b"a caf\xe9")
    for read, name, byte in (
        (lambda: read_text(path), str(path), 3), (lambda: read_text(path, "--text"), f"--text {path}", 3),
        (lambda: prompt_of(prompt_file=str(path)), f"--prompt-file {path}", 3),
        (lambda: prompt_of(prompt_file="-"), "--prompt-file -", 5),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"^{re.escape(name)} is not UTF-8 text \(byte {byte}\): convert it first$"
        ):
            read()


def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_flag(tmp_path):
    with pytest.raises(ValueError, match=rf"^--text {tmp_path / 'missing'}: No such file or directory$"):
        read_text(tmp_path / "missing", "--text")
    with pytest.raises(ValueError, match=rf"^--prompt-file {tmp_path}: Is a directory$"):
        prompt_of(prompt_file=str(tmp_path))


def test_a_prompt_is_taken_as_it_is_and_may_be_empty(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for prompt in ("", " The sea\r\n", "café"):
        assert prompt_of(prompt=prompt) == prompt
    assert prompt_of(prompt_file=str(tmp_path / "empty")) == ""
    with pytest.raises(ValueError, match="--prompt is not UTF-8"):
        prompt_of(prompt="caf\udce9")


@pytest.mark.parametrize("data", [b"", None], ids=["empty", "closed"])
def test_a_standard_input_that_is_closed_or_empty_is_refused(data, pipe):
    pipe(data)
    with pytest.raises(ValueError, match="^--prompt-file -: standard input is closed or empty") as raised:
        prompt_of(prompt_file="-")
    assert "\n" not in str(raised.value)


def test_a_key_is_hidden_where_it_is_told_to_be_and_asked_for_at_the_end():
    text = "abcdefghij" * 1000
    for key, at in (("71428", 9000), ("12", 3)):
        hidden = hide_key(text, key, at)
        assert (
            hidden == f"{text[:at]} The pass key is {key}. Remember it. {key} is the pass key. {text[at:]} {QUESTION}"
        )
        assert KEY.format(key=key) in hidden and hidden.endswith("The pass key is")
    assert hide_key(text) == hide_key(text, "71428", 9000)


def test_lines_of_json_are_counted_from_1_whatever_ends_them_and_empty_ones_are_skipped(tmp_path, pipe):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\xe2\x80\xa8 \\u2028 \\n"}\r\n'
    (tmp_path / "lines").write_bytes(data)
    right = [{"a": 1}, {"b": "\u2028 \u2028 \n"}]
    for name in (str(tmp_path / "lines"), "-"):
        pipe(data)
        assert list(read_json_lines(name, "--data")) == list(zip((f"--data {name}: line {n}" for n in (1, 4)), right))
    (tmp_path / "lines").write_bytes(data + b"{a")
    with pytest.raises(ValueError, match="^--data .*lines: line 5 is broken JSON: [^:]*$"):
        list(read_json_lines(str(tmp_path / "lines"), "--data"))
