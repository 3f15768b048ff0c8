"""Chat templates: how a model's own files write a conversation, for jinja2, where that is installed."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cli.ending import first_line

from fast.files import read_json
from longllama import require
from tokenizer import Tokenizer, content


class ChatTemplate:
    """Turns the turns of a conversation into ids, which go on from those of the turns before.

    Special tokens that the template writes become their ids, and the same text in a turn stays text: a character that stands
    nowhere else, the guard, is put into it before the template sees it, and taken out when ids are made.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        """Raises OSError, or ValueError where there is no template, or one that is broken."""
        self.folder, self.tokenizer = folder, tokenizer
        self.source, names = read_template(folder)
        self.names = {"eos_token": tokenizer.piece(tokenizer.eos_id)} | names
        if tokenizer.bos_id is not None:
            self.names = {"bos_token": tokenizer.piece(tokenizer.bos_id)} | self.names
        made = environment()
        with refusing(f"{folder}: its chat template is broken"):
            self.template = made.from_string(self.source)

    def turn(self, texts: Sequence[str]) -> list[int]:
        """The ids to be read after the model's last text, up to where it answers. texts: of the user and the model by turns, the
        user's last. Raises ValueError where the template cannot go on from there."""
        guard, texts = self.guarded(texts)
        whole, before = self.render(texts), self.render(texts[:-2]) if len(texts) > 1 else ""
        start = len(before)
        if before:
            rest, answer = whole[start:], texts[-2].strip()
            start += len(rest) - len(rest.lstrip()) if answer else 0
            again = f"{self.folder}: its chat template writes earlier turns otherwise when more come, so that a conversation "
            fits = whole.startswith(before) and whole.startswith(answer, start)
            require(
                fits, f"{again}cannot go on from them: ask each question alone, with --fork, or take another --format"
            )
            start += len(answer)
        read, ids = (self.tokenizer.encode_special(text, guard) for text in (whole[:start], whole))
        return ids[len(os.path.commonprefix([read, ids])) :]

    def guarded(self, texts: Sequence[str]) -> tuple[str, list[str]]:
        """The guard, and the texts with it in all names of special tokens."""
        used = {*"".join(texts), *self.source}
        guard = next(letter for letter in map(chr, range(0xFDD0, 0x10FFFF)) if letter not in used)
        names = re.compile("|".join(re.escape(name) for name in self.tokenizer.special if len(name) > 1))
        made = []
        for text in texts:
            while names.search(text):  # names may overlap
                text = names.sub(lambda found: found[0][0] + guard + found[0][1:], text)
            made.append(text)
        return guard, made

    def render(self, texts: Sequence[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        with refusing(f"{self.folder}: its chat template cannot write this conversation"):
            return self.template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.names
            )


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template, and the names of special tokens that it may write. A file of its own comes before tokenizer_config.json."""
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    raw = read_json(config) if config.is_file() else {}
    names = {key: content(token) for key, token in raw.items() if key.endswith("_token") and content(token)}
    template = own.read_text(encoding="utf-8") if own.is_file() else raw.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
        template = named.get("default")
    missing = f"{folder} has no chat template (chat_template.jinja, or in tokenizer_config.json): take another --format"
    require(isinstance(template, str), missing)
    return template, names


@contextmanager
def refusing(told: str) -> Iterator[None]:
    """Whatever a template raises, which may be anything, is a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{told}: {first_line(error)}") from None


def environment():
    """As transformers makes it: sandboxed, and with the same helpers."""
    try:
        from jinja2 import TemplateError, ext, nodes, sandbox
    except ImportError:
        raise ValueError("--format template needs jinja2: pip install jinja2") from None

    class Generation(ext.Extension):
        """{% generation %} marks what the model wrote, for training."""

        tags = {"generation"}

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(
        x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made
