"""generate.py: text on standard output, the rest on standard error, and one line for every mistake."""

import contextlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator

from cli.ending import UserError, user_errors

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import convert
import generate
from cli.loading import TINY, load
from cli.progress import Progress, process_peak, room_for, statistics
from cli.test_completions import naive
from cli.test_ending import ROOT, one_line, run_main, run_program
from cli.test_tokenizer import special_tokenizer
from fast import FastLlama
from tokenizer import StreamDecoder, Tokenizer

CPU = torch.device("cpu")
GREEDY = ("--temperature", 0)

compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(scope="module")
def tiny() -> tuple[FastLlama, Tokenizer]:
    return load(TINY, CPU)


def run_generate(*args) -> int:
    return run_main(generate.main, "--device", "cpu", *args)


@contextlib.contextmanager
def before_each(kind: type[nn.Module], hook: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls hook(module) before any module of a kind computes, whoever made it."""
    handle = register_module_forward_pre_hook(lambda module, _: hook(module) if isinstance(module, kind) else None)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------- What goes where


def test_generate_writes_text_to_stdout_and_the_rest_to_stderr(capsys, tiny):
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 8, *GREEDY) == 0
    out, err = capsys.readouterr()
    model, tokenizer = tiny
    prompt = tokenizer.encode("The sea")
    ids = [i.item() for i in model.generate(torch.tensor([prompt]), 8, temperature=0)]
    assert tokenizer.decode(prompt + ids) == "The sea" + out.removesuffix("\n")
    assert f"prompt {len(prompt)} tokens in 1 windows" in err and "tokens/s" in err and "peak process memory" in err
    run_generate("--prompt", "The sea", "--max-new-tokens", 2, "--quiet")
    out, err = capsys.readouterr()
    assert out and err == ""


def test_without_arguments_it_shows_that_a_pass_key_is_found(capsys):
    status = run_main(generate.main)
    out, err = capsys.readouterr()
    assert (status, out.split()) == (0, ["71428"]), err
    assert "pass key, 71428" in err
    said, *explanation = err.strip().splitlines()
    tokens, windows = re.search("prompt ([0-9,]+) tokens in ([0-9,]+) windows", said).groups()
    assert f"{round(int(tokens.replace(',', '')), -3):,} tokens" in " ".join(explanation) and int(windows) > 160
    named = re.findall(r"python (\S+\.py)", explanation[-1])
    assert len(named) >= 2 and all((ROOT / file).is_file() for file in named)


@pytest.mark.parametrize("program", [generate, convert], ids=lambda program: program.__name__)
def test_help_ends_with_the_commands_of_the_docstring(program, capsys):
    status, doc = run_main(program.main, "--help"), program.__doc__
    out, err = capsys.readouterr()
    commands = re.findall("^    python .*", doc, re.MULTILINE)
    assert (status, err) == (0, "") and len(commands) >= 2
    assert out.startswith(doc.split("\n")[0]) and out.endswith("\n".join(["examples:", *commands, ""]))


def test_generate_counts_windows_and_memory(capsys, tmp_path, tiny):
    (tmp_path / "prompt.txt").write_text("the whale " * 1000)
    assert run_generate("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 2, "--mem-dtype", "float32") == 0
    _, err = capsys.readouterr()
    T, width = 1 + len(tiny[1].encode("the whale " * 1000, bos=False)), tiny[0].config.hidden_size
    assert f"prompt {T:,} tokens in {-(-(T - 128) // 256) + 1} windows" in err
    assert f"memory {T - 128:,} tokens, {(T - 128) * 2 * width * 4 / 2**20:,.1f} MiB" in err


def test_statistics_leave_the_first_step_out_of_the_speed_of_decoding(tiny):
    """The prompt of 3 tokens takes 2 seconds, the first step 10, the two after it a quarter each."""
    model, _ = tiny
    progress, cache = Progress(model, 3, shown=False), model.new_cache()
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), cache)
    progress.close()
    times = [100.0, 102.0, 112.0, 112.25, 112.5]
    said = statistics(cache, progress, 3, times, CPU)
    assert "prompt 3 tokens in 1 windows | memory 0 tokens, 0.0 MiB | " in said
    assert "prefill 2 tokens/s | decode 4.0 tokens/s | peak process memory" in said
    for n in (2, 3):  # no step is left that could be timed
        assert "prefill 2 tokens/s | decode - | " in statistics(cache, progress, 3, times[:n], CPU)
    assert process_peak() > 10**7 or sys.platform == "win32"


def test_progress_counts_until_it_is_closed_and_shows_a_bar_of_long_prompts_only(tiny, capsys):
    model, _ = tiny
    for T, shown, bars in ((600, True, 3), (600, False, 0), (100, True, 0)):
        progress = Progress(model, T, shown)
        with torch.no_grad():
            model(torch.ones(1, T, dtype=torch.long))
        progress.close()
        err = capsys.readouterr().err
        assert err.count("reading [") == bars == err.count(f" of {T:,} tokens") and progress.tokens == T
        assert not bars or ("#" * 40 + f"] {T:,} of" in err and err.endswith("\r\033[K"))
        with torch.no_grad():
            model(torch.ones(1, 9, dtype=torch.long))
        assert progress.tokens == T and capsys.readouterr().err == ""


def test_what_a_prompt_takes_is_told_and_refused_before_it_is_read_where_it_can_never_fit(tiny):
    model, tokenizer = tiny
    cache, weights = model.new_cache(), sum(p.nbytes for p in model.parameters())
    takes = room_for(10_000, model, cache)
    with torch.no_grad():
        model(torch.ones(1, 10_000, dtype=torch.long), cache)
    held = cache.memory_bytes + sum(x[:, :, : layer.length].nbytes for layer in cache.layers for x in layer.tensors)
    assert held <= takes < held * 1.02  # and a little of a file's header
    assert room_for(10_000, model, model.new_cache(), lambda device: takes + weights) == takes
    with pytest.raises(
        ValueError, match="^the keys and values of 10,000 tokens take 0.0 GiB beside weights of 0.0 GiB, and"
    ):
        room_for(10_000, model, model.new_cache(), lambda device: takes + weights - 1)
    assert room_for(10_000, model, cache) < 1.1 * takes  # what is there already takes no more
    forgets, _ = load(TINY, CPU, memory=f"{ROOT / 'examples' / 'own_memory.py'}:Newest")
    assert room_for(10_000, forgets, forgets.new_cache(), lambda device: 0) == 0


def test_standard_input_and_an_empty_prompt_are_prompts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The sea")))
    assert run_generate("--prompt-file", "-", "--max-new-tokens", 5, *GREEDY) == 0
    piped = capsys.readouterr().out
    run_generate("--prompt", "The sea", "--max-new-tokens", 5, *GREEDY)
    assert capsys.readouterr().out == piped != ""
    assert run_generate("--prompt", "", "--max-new-tokens", 5) == 0
    assert run_generate("--prompt", "x", "--max-new-tokens", 0) == 0


@pytest.mark.parametrize("data", [b"", None], ids=["empty", "closed"])
def test_a_standard_input_that_is_empty_or_closed_is_refused_in_one_line(data, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))
    assert run_generate("--prompt-file", "-") == 2
    assert "standard input is closed or empty" in one_line(capsys)


def test_streams_that_are_closed_or_lack_a_character_are_no_mistake(capsys, monkeypatch):
    ids = [Tokenizer(TINY / "tokenizer.model").sp.piece_to_id(name) for name in ("<0xC3>", "<0xA9>")]  # é
    calls = []

    def say_e_acute(module, inputs, output):
        if isinstance(module, FastLlama):
            logits, cache = output
            logits[..., ids[len(calls) % 2]] = 1e4
            calls.append(1)
            return logits, cache
        return None

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    handle = register_module_forward_hook(say_e_acute)
    try:
        assert run_generate("--prompt", "The sea", "--max-new-tokens", 4) == 0
        assert capsys.readouterr().out == "éé\n"
        for streams in ({"stdout": None}, {"stderr": None}, {"stdout": ascii_only}):
            with monkeypatch.context() as patch:
                for name, stream in streams.items():
                    patch.setattr(sys, name, stream)
                assert run_generate("--prompt", "The sea", "--max-new-tokens", 4) == 0
    finally:
        handle.remove()
    assert ascii_only.buffer.getvalue().startswith(b"??") and len(calls) == 16


@pytest.mark.parametrize("terminal", [True, False])
def test_text_that_would_steer_a_terminal_is_cleaned_there_and_nowhere_else(terminal, monkeypatch):
    names = ("<0x1B>", "<0x5B>", "<0x32>", "<0x4A>", "<0x0A>", "<0x07>", "<0x7F>")  # it clears the screen, and rings
    ids = [Tokenizer(TINY / "tokenizer.model").sp.piece_to_id(name) for name in names]
    written, stdout = iter(ids), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")

    def write_them(module, inputs, output):
        if isinstance(module, FastLlama):
            output[0][..., next(written)] = 1e4

    handle = register_module_forward_hook(write_them)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(stdout, "isatty", lambda: terminal, raising=False)
            assert run_generate("--prompt", "The sea", "--max-new-tokens", len(ids), *GREEDY) == 0
    finally:
        handle.remove()
    right = "\ufffd[2J\n\ufffd\ufffd\n" if terminal else "\x1b[2J\n\x07\x7f\n"
    assert stdout.buffer.getvalue().decode() == right


def test_text_after_an_empty_prompt_begins_without_a_space(tiny, capsys):
    for seed in range(2):
        assert run_generate("--prompt", "", "--max-new-tokens", 4, "--seed", seed) == 0
        ids = [i.item() for i in tiny[0].generate(torch.tensor([[1]]), 4, temperature=0.8, seed=seed)]
        assert capsys.readouterr().out == tiny[1].decode(ids) + "\n"


def test_text_ends_before_the_first_stop_string_also_where_it_is_cut_between_tokens(tiny, capsys):
    model, tokenizer = tiny
    prompt = tokenizer.encode("The sea")
    ids = [i.item() for i in model.generate(torch.tensor([prompt]), 30, temperature=0)]
    *texts, whole = [tokenizer.decode(prompt + ids[:n]).removeprefix("The sea") for n in range(31)]
    cut = next(n for n in range(9, 20) if n not in map(len, texts))  # in the midst of a token
    inside = whole[cut : cut + 8]
    for stops in ([inside], [inside, whole[4:6]], ["never", whole[20:22]], [whole[-3:] + "x"]):
        calls = []
        with before_each(FastLlama, lambda model: calls.append(1)):  # noqa: B023
            flags = ("--prompt", "The sea", "--max-new-tokens", 30, *GREEDY)
            assert run_generate(*flags, "--stop", *stops) == 0
        out, err = capsys.readouterr()
        assert out == naive(whole, stops) + "\n" and f"prompt {len(prompt)} tokens in 1 windows" in err
        assert len(calls) == next((n for n, text in enumerate(texts) if naive(text, stops) != text), 30)


# ------------------------------------------------------------------------------------------------------ Saved memory


@pytest.mark.parametrize(
    "flags", [[], ["--mem-dtype", "float8_e4m3fn"], ["--mem-topk", 32], ["--mem-device", "cpu"]], ids=str
)
def test_a_book_is_read_once_and_asked_later(flags, capsys, tmp_path, tiny):
    book = (TINY / "book.txt").read_text()[:20000]
    (tmp_path / "book.txt").write_text(book[:5000] + " The pass key is 71428. Remember it. " + book[5000:])
    reading = ("--prompt-file", tmp_path / "book.txt", "--max-new-tokens", 0, "--save-memory", tmp_path / "memory")
    assert run_generate(*reading, *flags) == 0
    assert capsys.readouterr().out == ""
    question = "What is the pass key? The pass key is"
    asking = ("--prompt", question, "--max-new-tokens", 6, *GREEDY)
    for _ in range(2):
        assert run_generate(*asking, "--load-memory", tmp_path / "memory", *flags) == 0
        out, err = capsys.readouterr()
        assert out.split() == ["71428"]
        assert f"prompt {len(tiny[1].encode(question, bos=False))} tokens in 1 windows" in err


def test_a_memory_is_saved_also_where_text_is_written_and_without_its_first_token(tmp_path, capsys):
    path = tmp_path / "memory"
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 3, *GREEDY, "--save-memory", path) == 0
    text = capsys.readouterr().out
    assert text.strip()
    run_generate("--prompt", "The sea was the sea", "--max-new-tokens", 5, *GREEDY)
    right = capsys.readouterr().out
    assert run_generate("--prompt", "was the sea", "--max-new-tokens", 5, *GREEDY, "--load-memory", path) == 0
    assert capsys.readouterr().out == right


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_memory_is_not_saved_over_a_pipe_or_a_folder(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        assert run_generate("--prompt", "The sea", "--save-memory", path) == 2
        assert "name a file" in one_line(capsys)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits")
def test_a_memory_that_cannot_be_written_after_all_does_not_take_the_text_with_it(tmp_path, capsys):
    def limit():  # of a file's size: what is tried before the text is read fits, and a memory does not
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    flags = ("--prompt", "The sea", "--max-new-tokens", 9, *GREEDY, "--quiet")
    done = run_program("generate.py", *flags, "--save-memory", tmp_path / "memory", preexec_fn=limit)
    assert run_main(generate.main, *flags) == 0
    assert done.stdout == capsys.readouterr().out != ""
    assert re.fullmatch(rf"generate.py: error: {tmp_path / 'memory'} cannot be written: File too large\n", done.stderr)
    assert done.returncode == 2 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["n" * 250 + "/x", "n" * 256, "loop", "loop/x", "file/x", "/dev/full", "/proc/x"])
def test_where_a_memory_cannot_be_written_is_found_before_the_model_is_read(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    assert run_generate("--prompt", "a", "--model", "missing", "--save-memory", path) == 2
    assert f"--save-memory {path}" in one_line(capsys)


OWN = """
import torch
from fast import FastMemory

class Newest(FastMemory):
    def choose(self, k, real):
        return torch.arange(max(k.shape[2] - 9, 0), k.shape[2]).expand(*k.shape[:2], -1)
"""


def test_a_memory_of_ones_own_generates_and_is_refused_where_it_is_to_be_saved(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    own = ("--memory", f"{tmp_path / 'own.py'}:Newest", "--max-new-tokens", 2, "--prompt", "the whale " * 300)
    for flags in ((), ("--mem-dtype", "float8_e4m3fn"), ("--mem-topk", 4, "--mem-device", "cpu")):
        assert run_generate(*own, *flags) == 0
        tokens, size = re.search("memory ([0-9,]+) tokens, ([0-9.]+) MiB", capsys.readouterr().err).groups()
        assert int(tokens.replace(",", "")) > 400 and float(size) < 0.1
    assert run_generate(*own, "--save-memory", tmp_path / "memory", "--quiet") == 2
    assert "Newest is not saved" in one_line(capsys) and not (tmp_path / "memory").exists()


def test_a_saved_memory_is_not_gone_on_from_in_one_that_keeps_other_tokens(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    own = ("--memory", f"{tmp_path / 'own.py'}:Newest")
    reading = ("--prompt", "the whale " * 100, "--max-new-tokens", 0, "--quiet", "--save-memory", tmp_path / "memory")
    assert run_generate(*reading) == 0
    assert run_generate("--prompt", " sea", "--load-memory", tmp_path / "memory", *own) == 2
    assert "Newest" in one_line(capsys)


# -------------------------------------------------------------------------------------------------- Warnings, mistakes


def test_settings_that_will_overflow_are_warned_of_with_the_value_that_avoids_it(capsys, tmp_path, tiny):
    memory = ("--save-memory", tmp_path / "memory", "--last-context-length", 200)
    assert run_generate("--prompt", "sea " * 300, "--max-new-tokens", 0, *memory) == 0
    capsys.readouterr()

    def stop(module: nn.Module):  # warnings come before anything is read
        raise KeyboardInterrupt

    def warned(prompt: str, new: int, *flags) -> str:
        with before_each(FastLlama, stop):
            assert run_generate("--prompt", prompt, "--max-new-tokens", new, *flags) == 130
        return capsys.readouterr().err

    err = warned("sea " * 300, 1, "--last-context-length", 256)
    assert err.startswith("generate.py: warning: ") and "--last-context-length 255 avoids it" in err
    assert "warning" not in warned("sea " * 300, 1, "--last-context-length", 255)
    fits = 256 - 200 - len(tiny[1].encode("sea", bos=False))
    assert f"at most {fits} new tokens avoid it" in warned("sea", 70, "--load-memory", tmp_path / "memory")
    assert "warning" not in warned("sea", fits, "--load-memory", tmp_path / "memory")
    assert "bos" in warned("<s> sea", 1)
    assert warned("<s> sea", 1, "--quiet") == ""


def test_a_text_that_a_model_without_memory_ends_is_warned_of_and_stays(capsys, tmp_path):
    for name in ("model.safetensors", "tokenizer.model"):
        (tmp_path / name).symlink_to(TINY / name)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((TINY / "config.json").read_text()) | {"mem_layers": []})
    )
    prompt = ("--model", tmp_path, "--prompt", (TINY / "book.txt").read_text()[:400], *GREEDY)
    assert run_generate(*prompt, "--max-new-tokens", 200) == 2
    text, err = capsys.readouterr()
    first, *_, last = err.splitlines()
    fits = re.fullmatch(
        r"generate.py: warning: .* exceed the window of 256, .* --max-new-tokens (\d+) avoids it", first
    )[1]
    assert "exceed" in last and last.startswith("generate.py: error: ")
    assert run_generate(*prompt, "--max-new-tokens", fits) == 0
    out, err = capsys.readouterr()
    assert out == text and "warning" not in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "a", "--top-p", "1e-46"], ["--prompt", "a", "--max-new-tokens", "9" * 30], ["--device=--"],
        ["--prompt", "a", "--no\nsuch\x1b[2J"], ["--prompt", "a", "--model", "a\nb\x1b"], ["--model=--"],
        ["--quiet"], ["--prompt", "a", "--prompt-file", "b"], ["--prompt-file", "missing.txt"], ["--prompt-file", "latin1.txt"],
        ["--prompt-file", "."], ["--prompt", "a", "--top-p", "1.7"], ["--prompt", "a", "--top-p", "0"],
        ["--prompt", "a", "--top-k", "0"], ["--prompt", "a", "--temperature", "-1"], ["--prompt", "a", "--temperature", "nan"],
        ["--prompt", "a", "--temperature", "1e-7"], ["--prompt", "a", "--min-p", "1.1"], ["--prompt", "a", "--stop", ""],
        ["--prompt", "a", "--repetition-penalty", "0"], ["--prompt", "a", "--stop"],
        ["--prompt", "a", "--max-new-tokens", "-3"], ["--prompt", "a", "--max-new-tokens", "many"],
        ["--prompt", "a", "--seed", "-1"], ["--prompt", "a", "--seed", str(2**63)], ["--prompt", "caf\udce9"],
        *(["--prompt", "a", "--device", name] for name in ("meta", "xla", "hpu", "vulkan", "cuda:99", "privateuseone")),
        ["--prompt", "a", "--dtype", "int8"], ["--prompt", "a", "--mem-dtype", "int8"], ["--prompt", "a", "--device", "abacus"],
        ["--prompt", "a", "--last-context-length", "0"], ["--prompt", "a", "--mem-attention-grouping", "0", "4"],
        ["--prompt", "a", "--model", "missing"], ["--prompt", "a", "--model", "empty"],
        ["--prompt", "a", "--mem-topk", "0"], ["--prompt", "a", "--mem-device", "tape"], ["--prompt", "a", "--keep-local", "-1"],
        ["--prompt", "a", "--keep-local", "256"], ["--prompt", "a", "--save-memory", "missing/file"],
        ["--prompt", "a", "--save-memory", "."], ["--prompt", "a", "--load-memory", "missing"],
        ["--prompt", "a", "--load-memory", "latin1.txt"], ["--prompt", "", "--load-memory", "latin1.txt"],
        ["--prompt", "a", "--memory", "missing.py:Own"], ["--prompt", "a", "--memory", "latin1.txt"],
        ["--prompt", "a", "--no-such-flag"], ["prompt"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_in_flags_get_one_line_and_status_2(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    assert run_generate(*flags) == 2
    assert one_line(capsys).startswith("generate.py: error: ")


@pytest.mark.parametrize(
    "damage, named",
    [
        ("config_broken", "config.json"), ("config_list", "config.json"), ("mem_layer_99", "mem_layers"),
        ("weights_cut", "cut short"),
        ("weights_missing", "model.safetensors"), ("weights_misshapen", "differ"), ("weights_nan", "finite"),
        ("weights_int8", "weight is I8"),
        ("many_layers", "100000000 layers"), ("rope_no_object", "rope_parameters"),
        ("tokenizer_missing", "tokenizer.model"),
        ("tokenizer_broken", "tokenizer.model"), ("tokenizer_no_bos", "no <s>"),
        ("tokenizer_too_large", "tokenizer has"), ("shard_outside", "outside"),
    ],
)  # fmt: skip
def test_broken_models_get_one_line_and_status_2(damage, named, capsys, tmp_path):
    for path in TINY.glob("*"):
        if path.suffix in (".json", ".safetensors", ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    raw = json.loads(config.read_text())
    if damage == "config_broken":
        config.write_text("{")
    elif damage == "config_list":
        config.write_text("[]")
    elif damage == "mem_layer_99":
        config.write_text(json.dumps(raw | {"mem_layers": [99]}))
    elif damage == "weights_cut":
        weights.write_bytes(weights.read_bytes()[:100000])
    elif damage == "weights_missing":
        weights.unlink()
    elif damage == "weights_misshapen":
        config.write_text(json.dumps(raw | {"intermediate_size": 360}))
    elif damage == "weights_nan":
        save_file({name: x * math.nan for name, x in load_file(weights).items()}, weights)
    elif damage == "weights_int8":
        save_file({name: x.to(torch.int8) for name, x in load_file(weights).items()}, weights)
    elif damage == "many_layers":
        config.write_text(json.dumps(raw | {"num_hidden_layers": 10**8}))
    elif damage == "rope_no_object":
        config.write_text(json.dumps(raw | {"rope_scaling": "linear"}))
    elif damage == "tokenizer_missing":
        (tmp_path / "tokenizer.model").unlink()
    elif damage == "tokenizer_broken":
        (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer")
    elif damage == "tokenizer_no_bos":
        special_tokenizer(tmp_path / "tokenizer.model", bos_id=-1)
    elif damage == "tokenizer_too_large":
        config.write_text(json.dumps(raw | {"vocab_size": 1000}))
        tensors = load_file(weights)
        save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:1000].clone()}, weights)
    elif damage == "shard_outside":
        weights.rename(tmp_path.parent / "stolen.safetensors")
        index = {"weight_map": dict.fromkeys(("a", "b"), "../stolen.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run_generate("--prompt", "a", "--model", tmp_path) == 2
    assert re.search(named, one_line(capsys))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 10 TB"),
        MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_running_out_of_memory_gets_one_line_and_status_2(error, capsys):
    def no_memory(module: nn.Module):
        raise error

    with before_each(FastLlama, no_memory):
        assert run_generate("--prompt", "a") == 2
    assert "out of memory" in one_line(capsys)


def test_a_bug_is_a_traceback():
    def bug(module: nn.Module):
        raise RuntimeError("a bug")

    with before_each(FastLlama, bug), pytest.raises(RuntimeError, match="a bug"):
        run_generate("--prompt", "a")


@pytest.mark.parametrize("after, kept", [(4, True), (0, False)], ids=["while it writes", "while it reads"])
def test_ctrl_c_keeps_what_there_is(after, kept, capsys, tiny):
    calls = []

    def interrupted(module: nn.Module):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt

    with before_each(FastLlama, interrupted):
        assert run_generate("--prompt", "The sea", *GREEDY) == 130
    out, err = capsys.readouterr()
    model, tokenizer = tiny
    prompt = tokenizer.encode("The sea")
    ids = [i.item() for i in model.generate(torch.tensor([prompt]), 4, temperature=0)]
    assert out == (tokenizer.decode(prompt + ids).removeprefix("The sea") + "\n") * kept
    assert "Traceback" not in err and (f"prompt {len(prompt)} tokens" in err) == kept


# ------------------------------------------------------------------------------------------------- Flags, --compile


def test_every_flag_that_changes_the_model_is_used():
    flags = {
        "last_context_length": 9, "mem_dtype": "float16", "mem_attention_grouping": (2, 4), "mem_device": "cpu", "mem_topk": 5,
        "keep_local": 3,
    }  # fmt: skip
    words, seen = ["--prompt", "The sea", "--max-new-tokens", 1, "--dtype", "bfloat16"], {}
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [value])]

    def look(model: FastLlama):
        seen.update(vars(model.config) | {"dtype": model.norm.weight.dtype})

    with before_each(FastLlama, look):
        assert run_generate(*words) == 0
    assert {name: seen[name] for name in (*flags, "dtype")} == flags | {"dtype": torch.bfloat16}
    unlike = vars(load(TINY, CPU)[0].config)
    assert all(unlike[name] != value for name, value in flags.items())


def test_every_flag_that_changes_sampling_is_used(tiny, capsys):
    """Each of them by itself changes what is drawn, and the program draws what all of them give."""
    sampling = {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 13}
    model, tokenizer = tiny

    def drawn(**options) -> str:
        ids = [i.item() for i in model.generate(torch.tensor([tokenizer.encode("The sea")]), 16, **options)]
        return "".join(map(StreamDecoder(tokenizer, continues=True).feed, ids))

    right = drawn(**sampling)
    unlike = [drawn(**sampling | {name: other}) for name, other in zip(sampling, (0.8, None, None, None, None, 14))]
    assert len({right, *unlike}) == 7
    words = [word for name, value in sampling.items() for word in ("--" + name.replace("_", "-"), value)]
    assert run_generate("--prompt", "The sea", "--max-new-tokens", 16, *words, "--quiet") == 0
    assert capsys.readouterr().out == right + "\n"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_rounded_where_they_are_asked_for(kind, capsys):
    with before_each(FastLlama, lambda model: kinds.append(model.config.weight_dtype)):
        kinds = []
        assert run_generate("--prompt", "The sea", "--max-new-tokens", 4, *GREEDY, "--quiet", "--weights", kind) == 0
    assert kinds == [kind] * 4 and len(capsys.readouterr().out) > 2


def test_without_a_compiler_compile_is_refused(tmp_path):
    nothing_cached = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run_program("generate.py", "--prompt", "The sea", "--device", "cpu", "--compile", env=nothing_cached)
    assert (done.returncode, done.stdout) == (2, "")
    told, error = done.stderr.splitlines()
    assert "compiling" in told and re.fullmatch("generate.py: error: --compile fails here: .*no-such-compiler.*", error)


@compiles
def test_compiled_layers_give_the_same_text(capsys):
    prompt = ["--prompt", "The sea " * 200, "--max-new-tokens", 10, *GREEDY]
    run_generate(*prompt)
    eager = capsys.readouterr()
    torch.compiler.reset()  # as in a process of its own
    with before_each(FastLlama, lambda model: calls.append(model.compiled_logits is not None)):
        calls = []
        assert run_generate(*prompt, "--compile") == 0
    out, err = capsys.readouterr()
    assert out == eager.out != "" and all(calls) and len(calls) == 10
    told, counted = err.splitlines()
    assert "compiling the layers" in told and "compiling" not in eager.err
    assert float(re.search(r"MiB \| compiling ([\d.]+) s$", counted)[1]) > 0
    assert run_generate(*prompt, "--compile", "--quiet") == 0
    assert capsys.readouterr() == (out, "")


def test_a_vocabulary_that_the_model_lacks_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="has no config.json"), user_errors():
        load(ROOT, CPU)
