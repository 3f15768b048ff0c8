"""A conversation in the terminal whose past lives in memory: no turn is read twice, however long it gets.

    python examples/chat.py --read tiny/book.txt                     # talk about a book
    python examples/chat.py --model DIR --format template            # as the model's own chat template says
    python examples/chat.py --model DIR --format instruct            # LongLLaMA-Instruct's chat
    python examples/chat.py --model DIR --format question --read FILE --fork        # its questions on a document
    python examples/chat.py --read tiny/book.txt --fork < FILE       # a filter: a question a line, each asked of the book alone

Ctrl-C stops an answer, /help lists the commands, and lines that are pasted together are one question. Of an answer exactly what
was printed is remembered. When the local context has filled the window it moves into memory, but for its newest tokens, a quarter
of the window or --keep-local N. Only answers go to standard output; as a filter an empty line stands between them, and the exit
status is 1 if a line failed.
"""

import argparse
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import UserError, ending_well, say, tell, user_errors, warn

import numpy as np
import torch

from cli.completions import find_stop
from cli.flags import (
    MEMORY_FLAGS,
    SAMPLING_FLAGS,
    add_memory_flags,
    add_model_flags,
    add_sampling_flags,
    check_new_file,
    given,
    number,
    parser_for,
)
from cli.loading import load, overflow_warnings, pick_device
from cli.progress import Progress, room_for
from cli.templates import ChatTemplate
from cli.texts import ASSISTANT, OPENING, USER, read_text
from fast import FastConfig, FastLlama, load_memory, save_memory
from longllama import Cache, require
from tokenizer import StreamDecoder, Tokenizer

HELP = """\
/save FILE   write all that is remembered to a file
/load FILE   go on from such a file, or from one that generate.py --save-memory wrote
/memory      how much is remembered
/reset       start anew: from what --read or --load-memory read, or from nothing
/help        this list
/quit        end; so does Ctrl-D
Text that begins with / needs a space in front."""


@dataclass(frozen=True)
class Format:
    """What is written behind a document, around the user's text, and before a document; and what ends an answer, besides </s>."""

    opening: str = ""
    before: str = ""
    after: str = ""
    stops: tuple[str, ...] = ()
    preface: str = ""


FORMATS = {
    "plain": Format(),
    "instruct": Format(  # the chat that LongLLaMA-Instruct was tuned on
        OPENING,
        USER,
        ASSISTANT,
        ("\nUSER:", "\nASSISTANT:", "USER:", "ASSISTANT:"),  # the line break before belongs to the next turn
    ),
    "question": Format(  # on a document, which stands behind the system prompt of LongLLaMA-Instruct's tuning
        before="\nQuestion: ",
        after="\nAnswer: ",
        stops=("\nQuestion:", "\nAnswer:"),
        preface="You are an AI assistant. User will you give you a task. "
        "Your goal is to complete the task as faithfully as you can.\n",
    ),
}


@dataclass(frozen=True)
class Past:
    """A point that a conversation can go on from. Its cache is never written into: whoever goes on takes a fork."""

    cache: Cache
    unread: tuple[int, ...] = ()  # ids that come next, and are read together with what follows
    texts: tuple[str, ...] = ()  # what was asked and answered by turns, since the start or the saved memory

    @property
    def turns(self) -> int:
        return len(self.texts) // 2


class Conversation:
    """past: what the next answer goes on from; start: what /reset goes back to."""

    def __init__(
        self,
        model: FastLlama,
        tokenizer: Tokenizer,
        style: Format = FORMATS["plain"],
        forks: bool = False,
        template: ChatTemplate | None = None,
        **sampling,
    ):
        """forks: every answer goes on from the same past, and none sees another. template: what writes the turns, in the place
        of the style, but for its stops. sampling: for `FastLlama.generate`."""
        self.model, self.tokenizer, self.style, self.forks, self.sampling = model, tokenizer, style, forks, sampling
        self.template = template
        self.begin()

    def encode(self, *texts: str) -> list[int]:
        """Each text by itself, as in the tuning: a text's ids do not depend on what stands beside it."""
        return [i for text in texts for i in self.tokenizer.encode(text, bos=False)]

    def tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.norm.weight.device)

    def begin(self, document: str | None = None, memory: Path | None = None, show_progress: bool = False):
        """Starts from a saved memory and a document, where given. A format's preface stands before the document, and its opening
        behind. Neither follows a saved memory, which may be of a conversation and have them."""
        start = self.tokenizer.encode("") if document or not self.template else []  # a template writes its own
        past, style = Past(self.model.new_cache(), tuple(start)), self.style
        if memory:
            past, style = self.load(memory), FORMATS["plain"]
        if document:
            past = self.read(past, self.encode(style.preface, document), show_progress)
        self.past = self.start = Past(past.cache, (*past.unread, *self.encode(style.opening)))

    @torch.no_grad()
    def read(self, past: Past, ids: list[int], show_progress: bool = False) -> Past:
        """The past with its unread ids, and these, in the cache."""
        ids, cache = [*past.unread, *ids], past.cache.fork()
        progress = Progress(self.model, len(ids), show_progress, room_for(len(ids), self.model, cache))
        try:
            if ids:
                self.model(self.tensor(ids), cache, logits_to_keep=1)
        finally:
            progress.close()
        return Past(cache, (), past.texts)

    def next_ids(self, text: str) -> list[int]:
        """What is read before a text is answered."""
        if not self.template:
            return [*self.past.unread, *self.encode(self.style.before, text, self.style.after)]
        ids, size = self.template.turn([*self.past.texts, text]), self.model.config.vocab_size
        require(max(ids, default=0) < size, f"the chat template writes ids that the model of {size} has not")
        return [*self.past.unread, *ids]

    def warnings(self, text: str) -> Iterator[str]:
        """Of what the answer to a text, if it is as long as it may be, does to the local context."""
        T, new = len(self.next_ids(text)), self.sampling.get("max_new_tokens", 0)
        return overflow_warnings(T, new, self.model, self.past.cache)

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a text, as it comes.

        Tokens are held back that may be the beginning of a stop string, or of a character. The past moves on with every text
        that is yielded, to right behind it, and for the first time when the user's text has been read. So wherever an answer
        ends, by an exception in the midst of a layer too, the past is what was asked and what was yielded, and no more.
        """
        cache, texts, waiting, said = self.past.cache.fork(), (*self.past.texts, text), [], ""
        ids, decoder, new = self.tensor(self.next_ids(text)), StreamDecoder(self.tokenizer), ""
        for n, token in enumerate(self.model.generate(ids, cache=cache, **self.sampling)):
            i = token.item()  # the cache holds all before it
            ended = i in np.atleast_1d(self.model.config.eos_token_id)
            if n == 0:
                self.move_on(Past(cache.fork(), (), (*texts, "")))
            new += decoder.flush() if ended else decoder.feed(i)
            if decoder.pending:
                continue
            # </s> is never read: in the tuning no other token sees it
            said += new
            waiting.append((new, Past(cache.fork(), () if ended else (i,), (*texts, said))))
            held, new = "".join(text for text, _ in waiting), ""
            safe, stopped = find_stop(held, self.style.stops, whole=ended)
            while waiting and len(waiting[0][0]) <= safe:
                ready, past = waiting.pop(0)
                safe -= len(ready)
                self.move_on(past)
                yield ready
            if stopped or ended:
                return

    def move_on(self, past: Past):
        if not self.forks:
            self.past = past

    def save(self, path: Path):
        check_new_file("/save", path)
        self.past = self.read(self.past, [])  # a saved memory has no unread ids; and both go on the same
        save_memory(path, self.past.cache, self.model, self.tokenizer.digest)

    def load(self, path: Path) -> Past:
        cache = load_memory(path, self.model, tokenizer=self.tokenizer.digest)
        if cache.batch_size not in (None, 1):
            raise ValueError(f"{path} is a memory of {cache.batch_size} texts, and a conversation is one")
        return Past(cache)

    def memory(self) -> str:
        cache, window = self.past.cache, self.model.config.max_position_embeddings
        local = cache.local_length + len(self.past.unread)
        return (
            f"memory {cache.memory_length:,} tokens, {cache.memory_bytes / 2**20:,.1f} MiB | "
            f"local context {local:,} tokens, window {window:,} | {self.past.turns:,} turns"
        )

    def command(self, line: str) -> str:
        """Does what a line such as "/save FILE" says, and returns what to tell the user. Raises OSError or ValueError."""
        name, _, argument = line.strip().partition(" ")
        file = Path(os.path.expanduser(argument.strip()))  # unlike Path's own, it leaves an unknown ~name as it is
        if name in ("/save", "/load") and not argument:
            raise ValueError(f"{name} needs the name of a file")
        if name == "/save":
            self.save(file)
            return f"saved to {file}"
        if name == "/load":
            self.past = self.load(file)
        elif name == "/reset":
            self.past = self.start
        elif name == "/help":
            return HELP
        elif name != "/memory":
            raise ValueError(f"{name} is no command: /help lists them; text that begins with / needs a space in front")
        return self.memory()


def lines() -> Iterator[str]:
    """What the user types, with line editing and history on a terminal; or the lines of a file."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # Windows has none, and its terminal edits lines itself
            import readline  # which input() uses

            readline.parse_and_bind("set enable-bracketed-paste on")  # all that is pasted is one line
        sys.stdin.reconfigure(errors="replace")  # a slip of the keyboard ends no conversation
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", newline=None)  # files of Windows too
    prompt = "> " if terminal and sys.stdout.isatty() else ""
    while True:
        try:
            typed_ahead = terminal and waiting(0)
            line = input(prompt)
            yield from [line] if not terminal or typed_ahead else pasted(line)
        except EOFError:
            print(end="\n" if prompt else "")
            return
        except UnicodeDecodeError:
            raise ValueError("standard input is not UTF-8 text: convert it first") from None
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()


def waiting(seconds: float) -> bool:
    """Whether the terminal has more for us, or will so soon."""
    try:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    except (OSError, ValueError):  # Windows asks so of sockets alone
        return False


def pasted(line: str) -> list[str]:
    """What was pasted, as one line where the terminal tells, or as those that came with it: one text, but for commands."""
    pieces = line.split("\n")
    with suppress(EOFError):
        while waiting(0.05):
            pieces += input().split("\n")
    texts = pieces[:1]
    for piece in pieces[1:]:
        if piece.startswith("/") or texts[-1].startswith("/"):
            texts.append(piece)
        else:
            texts[-1] += "\n" + piece
    return texts


def say_all(answer: Iterator[str]):
    """Prints an answer as it comes, on lines of its own."""
    try:
        for text in answer:
            say(text)
    finally:
        say("\n")


def converse(chat: Conversation, lines: Iterator[str], stoppable: bool = True) -> bool:
    """Answers line after line, up to /quit. Returns whether all went well. stoppable: by Ctrl-C an answer, and not all of them;
    else an empty line stands between answers, so that a program can tell them apart."""
    well, before_answer, warnings = True, "", []
    for line in lines:
        if line.strip() == "/quit":
            break
        try:
            with user_errors():
                if line.startswith("/"):
                    tell(*chat.command(line).splitlines())
                elif line.strip():
                    if not warnings:  # one is enough
                        warnings = [*chat.warnings(line)]
                        for warning in warnings:
                            warn(warning)
                    say(before_answer)
                    before_answer = "" if stoppable else "\n"
                    say_all(chat.answer(line))
        except KeyboardInterrupt:
            if not stoppable:
                raise
        except UserError as error:
            well = False
            full = not line.startswith("/") and not chat.model.config.mem_layers
            tell(f"chat.py: {error}" + "; /reset starts anew" * full)
    return well


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    formats = "plain: all texts in a row, nothing between (default); instruct: a chat; question: on a document; "
    formats += "template: a chat, as the chat template in the model's folder writes it"
    add("--format", choices=[*FORMATS, "template"], default="plain", help=formats)
    add("--read", type=Path, metavar="FILE", help="read a document first")
    add("--load-memory", type=Path, metavar="FILE", help="start from what /save or generate.py --save-memory wrote")
    add("--fork", action="store_true", help="every question starts from what was read first, and sees no other")
    add("--max-new-tokens", type=number(int, 1), default=200, metavar="N", help="of an answer (default 200)")
    add_sampling_flags(parser)
    add_memory_flags(parser)
    return parser, parser.parse_args()


def memory_settings(args: argparse.Namespace) -> dict:
    """A conversation overflows often: a quarter of the window stays local then, if neither flag nor config.json says how much."""
    settings, file = given(args, MEMORY_FLAGS), args.model / "config.json"
    if args.keep_local is None and file.is_file():
        config = FastConfig.from_json(file)
        settings["keep_local"] = (
            config.keep_local or (args.max_position_embeddings or config.max_position_embeddings) // 4
        )
    return settings


def run(args: argparse.Namespace) -> bool:
    if sys.stdin is None:
        raise ValueError("standard input is closed, and there the questions come from")
    document = args.read and read_text(args.read, "--read")
    if args.format == "question" and not (document or args.load_memory):
        raise ValueError("--format question asks about a document: give it by --read FILE or --load-memory FILE")
    terminal = sys.stdin.isatty()
    model, tokenizer = load(
        args.model, pick_device(args.device), args.dtype, args.memory, args.weights, **memory_settings(args)
    )
    sampling = given(args, ("max_new_tokens", *SAMPLING_FLAGS))
    template = ChatTemplate(args.model, tokenizer) if args.format == "template" else None
    style = FORMATS["plain" if template else args.format]
    style = replace(style, stops=(*style.stops, *args.stop))
    chat = Conversation(model, tokenizer, style, args.fork, template, **sampling)
    chat.begin(document, args.load_memory, show_progress=sys.stderr.isatty())
    if terminal:
        tell(chat.memory(), "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    return converse(chat, lines(), stoppable=terminal)


def main():
    parser, args = arguments()
    with ending_well(parser):
        well = run(args)
    sys.exit(0 if well or sys.stdin.isatty() else 1)


if __name__ == "__main__":
    main()
