"""What examples/chat.py promises, checked: python -m pytest examples/test_chat.py

Truth is the same ids fed to the model by hand, segment by segment.
"""

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.loading import TINY, load
from cli.templates import ChatTemplate
from examples import chat as program
from examples.chat import FORMATS, Conversation, Format, converse, lines
from fast import FastLlama, save_memory
from longllama import Cache
from tokenizer import Tokenizer

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
CHAT = str(Path(__file__).resolve().parent / "chat.py")
BOOK = (TINY / "book.txt").read_text(encoding="utf-8")
TEXTS = [BOOK[i : i + 200].replace("\n", " ") for i in range(5000, 9000, 1000)]
NEW = 24  # ids in an answer: four turns overflow the window of 256
PLAIN = FORMATS["plain"]
STOPS = Format(stops=FORMATS["instruct"].stops)


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)  # for so small a model more only wait for each other
    return load(TINY, torch.device("cpu"))


def conversation(tiny, style: Format = PLAIN, **settings) -> Conversation:
    return Conversation(*tiny, style, **{"max_new_tokens": NEW, "temperature": 0} | settings)


def ask(chat: Conversation, *texts: str) -> list[str]:
    return ["".join(chat.answer(text)) for text in texts]


@torch.no_grad()
def by_hand(tiny, segments: list[list[int]]) -> tuple[torch.Tensor, Cache]:
    """The logits of the last id, and the cache, after reading the segments one after another."""
    cache = None
    for segment in segments:
        logits, cache = tiny[0](torch.tensor([segment]), cache, logits_to_keep=1)
    return logits, cache


@torch.no_grad()
def greedy(tiny, segments: list[list[int]], new: int) -> list[int]:
    logits, cache = by_hand(tiny, segments)
    ids = [logits.argmax().item()]
    while len(ids) < new:
        ids.append(tiny[0](torch.tensor([ids[-1:]]), cache)[0].argmax().item())
    return ids


def assert_same_past(chat: Conversation, tiny, segments: list[list[int]], unread: list[int]):
    """The cache holds the segments, and `unread` waits."""
    _, cache = by_hand(tiny, segments)
    assert list(chat.past.unread) == unread
    assert (chat.past.cache.local_length, chat.past.cache.memory_length) == (cache.local_length, cache.memory_length)
    for ours, right in zip(chat.past.cache.layers, cache.layers):
        for x, y in zip(ours.filled(), right.filled()):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        blocks = zip(ours.memory.blocks, right.memory.blocks) if ours.memory and ours.memory.length else []
        for block, right_block in blocks:
            torch.testing.assert_close(block, right_block, rtol=0, atol=1e-2)  # bfloat16


class Scripted(FastLlama):
    """It really reads, but what it writes is given, as long as anything is."""

    script: Iterator[int] | None = None

    def write(self, tokenizer: Tokenizer, *answers: str | list[int]):
        ids = [tokenizer.encode(answer, bos=False) if isinstance(answer, str) else answer for answer in answers]
        self.script = iter(sum(ids, []))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        if self.script is None:
            return super().logits(x)
        return F.one_hot(torch.tensor(next(self.script)), self.config.vocab_size).float().expand(len(x), 1, -1)


@pytest.fixture
def scripted(tiny):
    return Scripted.from_pretrained(TINY), tiny[1]


def test_turns_are_one_text_of_which_nothing_is_read_twice(tiny):
    chat, segments, unread = conversation(tiny), [], [1]
    for turn, text in enumerate(TEXTS, 1):
        [answer] = ask(chat, text)
        segments.append(unread + tiny[1].encode(text, bos=False))
        ids = greedy(tiny, segments, NEW)
        assert answer == tiny[1].decode(ids)
        segments, unread = segments + [[i] for i in ids[:-1]], ids[-1:]
        assert_same_past(chat, tiny, segments, unread)
        assert chat.past.turns == turn
    assert chat.past.cache.memory_length > 0


@pytest.mark.parametrize("layer, step", [(0, 1), (1, 7), (3, 20)])
def test_what_was_printed_before_ctrl_c_is_what_is_remembered(tiny, layer, step):
    model, tokenizer = tiny
    chat, printed, steps = conversation(tiny), "", 0

    def stop(*_):
        nonlocal steps
        steps += 1
        if steps == step + 1:
            raise KeyboardInterrupt  # in the midst of a forward: some layers have read the id, others not

    hook = model.layers[layer].down_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        for text in chat.answer(TEXTS[0]):
            printed += text
    hook.remove()
    first = [1] + tokenizer.encode(TEXTS[0], bos=False)
    ids = greedy(tiny, [first], step)
    assert printed == tokenizer.decode(ids)
    segments = [first, *([i] for i in ids[:-1])]
    assert_same_past(chat, tiny, segments, ids[-1:])
    second = ids[-1:] + tokenizer.encode(TEXTS[1], bos=False)
    assert ask(chat, TEXTS[1]) == [tokenizer.decode(greedy(tiny, [*segments, second], NEW))]


def test_ctrl_c_while_a_text_is_read_forgets_the_text(tiny):
    chat, other = conversation(tiny), conversation(tiny)
    assert ask(chat, TEXTS[0]) == ask(other, TEXTS[0])
    hook = tiny[0].layers[2].down_proj.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ask(chat, TEXTS[1])
    hook.remove()
    assert chat.past.turns == 1
    assert ask(chat, TEXTS[2]) == ask(other, TEXTS[2])


def test_ctrl_c_ends_the_answer_and_not_the_conversation(tiny, capsys):
    answers = iter([["half an ", KeyboardInterrupt], ["answer"]])

    class Stopped(Conversation):
        def answer(self, text):
            for part in next(answers):
                if part is KeyboardInterrupt:
                    raise KeyboardInterrupt
                yield part

    assert converse(Stopped(*tiny), iter(["one", "two"]))
    assert capsys.readouterr().out == "half an \nanswer\n"


@pytest.mark.parametrize(
    "written, printed",
    [
        ("Fine.\nUSER: and you", "Fine."),
        ("Fine. ASSISTANT: yes", "Fine."),
        ("USER: hello", ""),
        ("Grade: A\nUSER: why", "Grade: A"),
        ("A USA, an ASSIST\n\nASSISTANT:", "A USA, an ASSIST\n"),
    ],
)
def test_stop_strings_are_never_printed_and_not_remembered(tiny, scripted, written, printed):
    model, tokenizer = scripted
    chat = conversation(scripted, STOPS)
    model.write(tokenizer, written + " and more" * 20)
    parts = list(chat.answer("How are you?"))
    model.script = None
    assert "".join(parts).rstrip(" ") == printed
    first, kept = [1] + tokenizer.encode("How are you?", bos=False), tokenizer.encode("".join(parts), bos=False)
    segments = [first, *([i] for i in kept[:-1])]
    assert_same_past(chat, tiny, segments, kept[-1:])
    second = kept[-1:] + tokenizer.encode("Go on", bos=False)
    assert ask(chat, "Go on") == [tokenizer.decode(greedy(tiny, [*segments, second], NEW))]


def test_text_that_only_looked_like_a_stop_is_printed_at_the_end_of_an_answer(scripted):
    model, tokenizer = scripted
    chat = conversation(scripted, STOPS)
    model.write(tokenizer, "the USA\nUSE", [model.config.eos_token_id])
    assert ask(chat, "Where?") == ["the USA\nUSE"]


def test_a_cut_answer_has_no_half_characters_and_no_half_stop(scripted):
    model, tokenizer = scripted
    pieces = [tokenizer.sp.piece_to_id(piece) for piece in ("<0x61>", "<0xC3>", "<0xA9>", "<0xC3>")]
    chat = conversation(scripted, max_new_tokens=4)
    model.write(tokenizer, pieces)
    assert ask(chat, "Write") == ["aé"]
    assert list(chat.past.unread) == pieces[2:3]
    chat = conversation(scripted, STOPS, max_new_tokens=len(tokenizer.encode("Yes.\nUS", bos=False)))
    model.write(tokenizer, "Yes.\nUS")
    assert ask(chat, "Write") == ["Yes."]


def test_instruct_reads_the_opening_once_and_no_end_of_text(tiny, scripted):
    style, encode = FORMATS["instruct"], lambda text: tiny[1].encode(text, bos=False)
    chat = conversation(scripted, style)
    scripted[0].write(tiny[1], "Fine.", [2], "Well.", [2])
    assert ask(chat, "How are you?", "And now?") == ["Fine.", "Well."]
    first = [1, *encode(style.opening), *encode("\nUSER: "), *encode("How are you?"), *encode("\nASSISTANT: ")]
    second = [*encode("\nUSER: "), *encode("And now?"), *encode("\nASSISTANT: ")]
    answers = [[[i] for i in encode(text)] for text in ("Fine.", "Well.")]
    assert_same_past(chat, tiny, [first, *answers[0], second, *answers[1]], [])


def test_a_question_stands_behind_the_document_and_the_document_behind_the_preface(tiny, scripted):
    style, encode = FORMATS["question"], lambda text: tiny[1].encode(text, bos=False)
    chat = conversation(scripted, style)
    first = [1, *encode(style.preface), *encode(BOOK[:100])]
    second = [*encode("\nQuestion: "), *encode("Who?"), *encode("\nAnswer: ")]
    for _ in range(2):
        scripted[0].write(tiny[1], [5], "Ahab.\nQuestion: Who")
        chat.begin(BOOK[:100])
        assert ask(chat, "Who?") == ["Ahab."]
        answer = encode("Ahab.")
        assert_same_past(chat, tiny, [first, second, *([i] for i in answer[:-1])], answer[-1:])


def test_a_longer_stop_string_that_began_before_a_shorter_one_is_waited_for(tiny, scripted):
    model, tokenizer = scripted
    for written, printed in (("a b c d e f", "a"), ("a b c x e f", "a b"), ("a b c d", "a b")):
        chat = conversation(scripted, Format(stops=(" b c d e", " c")))
        model.write(tokenizer, written, [2])
        assert ask(chat, "Go") == [printed]
        model.script = None
        kept = tokenizer.encode(printed, bos=False)
        first = [1, *tokenizer.encode("Go", bos=False)]
        assert_same_past(chat, tiny, [first, *([i] for i in kept[:-1])], kept[-1:])


def test_forks_do_not_see_each_other(tiny):
    chat = conversation(tiny, forks=True)
    chat.begin(BOOK[:3000], None)
    answers = ask(chat, *TEXTS[:3])
    assert answers == [ask(chat, text)[0] for text in TEXTS[:3]]
    assert len(set(answers)) == 3
    alone = conversation(tiny)
    alone.begin(BOOK[:3000], None)
    assert ask(alone, TEXTS[1]) == answers[1:2]


def test_reset_goes_back_to_the_document(tiny):
    chat = conversation(tiny)
    fresh = ask(chat, TEXTS[0])
    chat.command("/reset")
    assert ask(chat, TEXTS[0]) == fresh
    chat.begin(BOOK[:3000], None)
    before, first = chat.memory(), ask(chat, TEXTS[0])
    assert first != fresh
    assert chat.command("/reset") == before
    assert ask(chat, TEXTS[0]) == first


@pytest.mark.parametrize("settings", [{}, {"style": FORMATS["instruct"]}, {"temperature": 1.0, "seed": 3}])
def test_a_saved_conversation_goes_on_elsewhere(tiny, tmp_path, settings):
    chat, file = conversation(tiny, **settings), tmp_path / "a conversation"
    ask(chat, *TEXTS[:2])
    told = chat.memory()
    chat.command(f"/save {file}")
    assert chat.memory() == told  # what was waiting to be read had been counted
    other = conversation(tiny, **settings)
    other.command(f"/load {file}")
    assert ask(chat, *TEXTS[2:]) == ask(other, *TEXTS[2:])


def test_failing_commands_take_a_line_each_and_change_nothing(tiny, capsys, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("no memory")
    two = tmp_path / "two"
    save_memory(two, tiny[0](torch.ones(2, 9, dtype=torch.long))[1], tiny[0])
    bad = [
        "/nosuch",
        "/",
        "/save",
        "/load",
        f"/save {tmp_path}",
        f"/save {tmp_path}/no/file",
        f"/load {wrong}",
        "/load nosuch",
        "/save ~nosuchuser/file",
        f"/load {two}",
    ]
    chat = conversation(tiny)
    past = chat.past
    assert not converse(chat, iter(bad))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == len(bad) and "Traceback" not in err
    assert chat.past is past
    assert converse(chat, iter(["/help", "/memory", "", "  ", "Hello", "/quit", "never asked"]))
    out, err = capsys.readouterr()
    assert chat.past.turns == 1 and "/save FILE" in err and "0 turns" in err and "/save FILE" not in out


def test_a_full_window_without_memory_is_one_line(tiny, capsys):
    model, tokenizer = FastLlama.from_pretrained(TINY, mem_layers=[]), tiny[1]
    chat = conversation((model, tokenizer), max_new_tokens=1000)
    assert not converse(chat, iter([TEXTS[0], TEXTS[1]]))
    out, err = capsys.readouterr()
    assert err.count("\n") == 3 and err.count("/reset") == 2 and "exceed the window of 256" in err
    assert "warning: " in err.partition("\n")[0]
    assert len(out) > 100 and chat.past.cache.local_length == 256
    assert converse(chat, iter(["/reset"]))


@pytest.mark.parametrize("settings, warned", [({}, 1), ({"keep_local": 64}, 0), ({"mem_layers": []}, 1)])
def test_an_overflow_is_warned_of_once(settings, warned, tiny, capsys):
    chat = conversation((FastLlama.from_pretrained(TINY, **settings), tiny[1]), max_new_tokens=2)
    assert converse(chat, iter(["Hello", "the sea " * 30]))
    assert capsys.readouterr().err == ""  # as long as all fits
    chat.sampling["max_new_tokens"] = 250
    chat.answer = lambda text: iter(["as it may be"])
    assert converse(chat, iter(["Hello"] * 3), stoppable=False)
    out, err = capsys.readouterr()
    assert err.count("warning: ") == err.count("exceed the window of 256") == warned
    assert out == "as it may be\n\nas it may be\n\nas it may be\n"


@pytest.mark.parametrize(
    "flags, written, kept", [([], 0, 64), (["--keep-local", "0"], 9, 0), ([], 9, 9), (["--keep-local", "8"], 0, 8)]
)
def test_a_quarter_of_the_window_stays_local_if_nothing_says_otherwise(flags, written, kept, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((TINY / "config.json").read_text()) | {"keep_local": written})
    )
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path), *flags])
    assert program.memory_settings(program.arguments()[1])["keep_local"] == kept


def test_as_a_filter_it_prints_answers_alone(tmp_path, monkeypatch, capsys):
    def answer(lines: bytes, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags), "--temperature", "0", "--max-new-tokens", "6"])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        with pytest.raises(SystemExit) as exit:
            program.main()
        return exit.value.code, *capsys.readouterr()

    book = tmp_path / "book.txt"
    book.write_text(BOOK[:2000] + " The pass key is 71428. Remember it. 71428 is the pass key. " + BOOK[2000:4000])
    question, saved = b"What is the pass key? The pass key is", tmp_path / "saved"
    lines = b"/save %b\n%b\n/memory\n\n/nosuch\r\n%b" % (str(saved).encode(), question, question)
    status, out, err = answer(lines, "--read", book, "--fork")
    assert out == "71428\n\n71428\n", err
    assert status == 1 and err.count("\n") == 3  # two lines of sizes, and a command that is none
    assert answer(question, "--load-memory", saved) == (0, "71428\n", "")
    assert answer(question, "--load-memory", saved, "--stop", "no", "28") == (0, "714\n", "")
    of_windows = b"\xef\xbb\xbf/memory\r\n" + question + b"\r\n"
    command = [
        sys.executable,
        CHAT,
        "--load-memory",
        saved,
        "--temperature",
        "0",
        "--max-new-tokens",
        "6",
    ]  # a real pipe
    done = subprocess.run(command, input=of_windows, capture_output=True, timeout=120, env=ONE_THREAD)
    assert (done.returncode, done.stdout) == (0, b"71428\n") and done.stderr.startswith(b"memory ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "nosuch"],
        ["--read", "nosuch"],
        ["--read", str(TINY / "model.safetensors")],
        ["--load-memory", "nosuch"],
        ["--temperature", "-1"],
        ["--max-new-tokens", "0"],
        ["--format", "nosuch"],
        ["--format", "question"],
        ["--stop", ""],
        ["--device", "nosuch"],
        ["--keep-local", "256"],
        ["question"],
    ],
)
def test_mistakes_in_flags_are_one_line_and_exit_status_2(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags])
    with pytest.raises(SystemExit) as exit:
        program.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("chat.py: error: ")


def test_a_byte_that_is_no_text_ends_no_conversation_on_a_terminal(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"caf\xe9\nsea\n"), encoding="utf-8"))
    assert list(lines()) == ["caf\ufffd", "sea"]


class Screen:
    """A program on a terminal of its own."""

    def __init__(self, *command: str):
        pty = pytest.importorskip("pty")
        self.outer, inner = pty.openpty()
        ends = {
            "stdin": inner,
            "stdout": inner,
            "stderr": inner,
            "start_new_session": True,
            "preexec_fn": take_terminal,
        }
        self.process = subprocess.Popen([sys.executable, *command], env=ONE_THREAD, **ends)
        os.close(inner)
        self.text = b""

    def wait_for(self, text: bytes, send: bytes = b"") -> bytes:
        """What is shown up to a text; then something is typed."""
        while text not in self.text:
            assert select.select([self.outer], [], [], 60)[0], self.text
            self.text += os.read(self.outer, 4096)
        before, _, self.text = self.text.partition(text)
        os.write(self.outer, send)
        return before

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.outer)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends():
    with Screen(CHAT, "--max-new-tokens", "1000000", "--seed", "0") as screen:
        screen.wait_for(b"> ", b"half a line")
        screen.wait_for(b"half a line", b"\x03")
        for _ in range(60):  # readline misses what comes between its echo and its next wait
            if select.select([screen.outer], [], [], 1)[0]:
                break
            os.write(screen.outer, b"\x03")
        screen.wait_for(b"> ", b"Call me Ishmael.\x02\x02\x02\x02!\n")  # Ctrl-B moves back
        screen.wait_for(b"!ael.")
        screen.wait_for(b" ", b"\x03")
        screen.wait_for(b"> ", b"\x10\x01/nosuch \n")  # Ctrl-P, Ctrl-A: the line before, from its start
        screen.wait_for(b"/nosuch is no command")
        screen.wait_for(b"> ", b"/memory\n")
        screen.wait_for(b"1 turns")
        screen.wait_for(b"> ", b"\x04")
        assert screen.process.wait(30) == 0


TOLD, LINES, COMMAND = b"\x1b[200~one\rtwo\rthree\r\x1b[201~\r", b"one\rtwo\rthree\r", b"one\rtwo\r/memory\r"
TOLD_COMMAND = b"\x1b[200~one\rtwo\r/memory\x1b[201~\r"


@pytest.mark.parametrize("editor, pastes", [(True, [TOLD, TOLD_COMMAND, LINES, COMMAND]), (False, [LINES, COMMAND])])
def test_lines_that_are_pasted_together_are_one_question(editor, pastes):
    """Whether there is a line editor or not, and whether the terminal tells what was pasted or not."""
    without = "sys.modules['readline'] = None; " * (not editor)
    run = f"import runpy; sys.argv[1:] = ['--max-new-tokens', '2']; runpy.run_path({CHAT!r}, run_name='__main__')"
    with Screen("-c", "import sys; " + without + run) as screen:
        screen.wait_for(b"Ctrl-D ends.")
        for turns, paste in enumerate(pastes, 1):
            screen.wait_for(b"> ", paste)
            if b"/memory" not in paste:
                screen.wait_for(b"> ", b"/memory\r")
            screen.wait_for(b" %d turns" % turns)
        screen.wait_for(b"> ", b"\x04")
        assert screen.process.wait(30) == 0


def take_terminal():
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests in the background may have it ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_template_writes_the_turns_and_only_what_comes_behind_an_answer_is_read(tiny, tmp_path):
    written = "{% for x in messages %}<s>{{ x.role }}: {{ x.content }}</s>{% endfor %}<s>assistant:"
    (tmp_path / "chat_template.jinja").write_text(written)
    model, tokenizer = tiny
    text = tokenizer.sp.encode
    chat = conversation(tiny, template=ChatTemplate(tmp_path, tokenizer))
    segments, unread, before = [], [], []
    for turn, asked in enumerate(["Where is </s> the whale?", "And the ship?"], 1):
        [answer] = ask(chat, asked)
        segments.append([*unread, *before, 1, *text(f"user: {asked}"), 2, 1, *text("assistant:")])
        ids = greedy(tiny, segments, NEW)
        assert answer == tokenizer.decode(ids) and 2 not in ids
        segments, unread, before = segments + [[i] for i in ids[:-1]], ids[-1:], [2]
        assert_same_past(chat, tiny, segments, unread)
        assert chat.past.turns == turn
