"""The training loop and its data, checked: python -m pytest training"""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import convert
import generate
from cli.test_convert import llama_3_2
from cli.test_ending import run_main
from cli.test_json_tokenizer import write_tokenizer
from fast import FastConfig, FastLlama
from fast.files import as_weights, is_finite
from fast.tuned import laid_over
from longllama import cross_batch_extra
from tokenizer import SentencePieceTokenizer, Tokenizer
from training import fetch_data
from training import train_tokenizer as tokenizer_program
from training.data import Source, held_out, is_held_out, read_corpora, text_files
from training.recipe import PackedPhase, Recipe
from training.stopping import Stop
from training.tasks import KEY, answers, question_and_answer
from training.train import contexts, main
from training.train_tokenizer import train as train_tokenizer
from training.trainer import parameter_count

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "testdata" / "prose.model"
LONG_TEXT = (HERE.parent / "tiny" / "book.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty documents; every fourth one shorter than a slot."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(20):
        text = LONG_TEXT[3000 * i : 3000 * i + (150 if i % 4 == 0 else 3000)]
        (folder / f"document_{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return read_corpora([Source(folder)], Tokenizer(TOKENIZER))[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two short phases over a small model, with two groups a step."""
    raw = json.loads((HERE / "tiny.json").read_text())
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    raw["model"] |= sizes | {"mem_layers": [1]}
    mix = {"text": [0.4, 0.6], "dense": [0.3, 0.2], "passkey": [0.3, 0.2]}
    phase = {"learning_rate": 3e-2, "window": 64, "documents": 2, "packing": 4, "mix": mix, "groups": 2}
    raw["phases"] = [phase | {"steps": 4, "ranges": None}, phase | {"steps": 5, "ranges": [3, 7]}]
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(raw))
    return path


def command(recipe, folder, output, *flags, processes: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    parts = [
        sys.executable,
        *launch,
        str(HERE / "train.py"),
        "--recipe",
        recipe,
        "--data",
        folder,
        "--output",
        output,
        "--device",
        "cpu",
        *flags,
    ]
    return list(map(str, parts))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started here: sums come out alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(recipe, folder, output, *flags, processes: int = 1):
    """Runs train.py; returns what it printed, and the finished model's tensors if there is one."""
    call = command(recipe, folder, output, *flags, processes=processes)
    if processes == 1:
        done = run_here(call)
    else:
        done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    model = Path(output) / "model.safetensors"
    return done, load_file(model) if model.exists() else None


def run_here(call: list[str], out: io.StringIO | None = None) -> subprocess.CompletedProcess:
    """What subprocess.run gives, from this process: it has imported torch already."""
    out, err, code = out or io.StringIO(), io.StringIO(), 0
    out.reconfigure = lambda **_: None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", call[1:])
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(call, code, out.getvalue(), err.getvalue())


def losses(output) -> list:
    return [json.loads(line) for line in (Path(output) / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(recipe, folder, tmp_path_factory):
    """The output folder of an uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("whole")
    done, model = train(recipe, folder, output)
    assert done.returncode == 0 and model is not None, done.stderr
    return output


def test_interrupted_and_resumed_is_the_same_as_uninterrupted(whole, recipe, folder, tmp_path):
    for stop in ("3", "6"):
        done, so_far = train(
            recipe, folder, tmp_path / "parts", "--stop-after", stop, *(["--resume"] if stop != "3" else [])
        )
        assert done.returncode == 0 and so_far is not None
    _, parts = train(recipe, folder, tmp_path / "parts", "--resume")
    assert losses(tmp_path / "parts") == losses(whole)
    assert all(torch.equal(x, parts[name]) for name, x in load_file(whole / "model.safetensors").items())


def test_what_is_computed_in_float32_is_within_bfloat16s_error_and_is_gone_on_with_alike(
    whole, recipe, folder, tmp_path
):
    flags = ("--dtype", "float32")
    train(recipe, folder, tmp_path, *flags, "--stop-after", 1)
    done, _ = train(recipe, folder, tmp_path, "--resume", "--stop-after", 2)
    assert done.returncode == 2 and "made with another --dtype" in done.stderr
    done, _ = train(recipe, folder, tmp_path, *flags, "--resume", "--stop-after", 2)
    first, second = losses(tmp_path), losses(whole)[:2]
    assert done.returncode == 0 and first[1]["step"] == 2
    for one, other in zip(first, second):
        assert one["loss"] == pytest.approx(other["loss"], rel=2**-8) and one["loss"] != other["loss"]
    raw = json.loads(recipe.read_text())
    model = FastLlama.from_pretrained(tmp_path)  # by hand: the loss of a step that changes nothing is that in float32
    raw |= {"model": {}, "phases": [raw["phases"][0] | {"steps": 1, "learning_rate": 0, "groups": 1}]}
    (tmp_path / "still.json").write_text(json.dumps(raw))
    done, _ = train(tmp_path / "still.json", folder, tmp_path / "still", "--init", tmp_path, *flags)
    (phase,) = Recipe(tmp_path / "still.json").phases
    corpus, _ = read_corpora([Source(folder)], Tokenizer(tmp_path / "tokenizer.model"))
    batch = corpus.batch((0, 0, 0), 2, 64, phase.mix_at(0), phase.extra(0))
    logits = model.forward_cross_batch(torch.from_numpy(batch.inputs), phase.extra(0))
    right = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    assert losses(tmp_path / "still")[0]["loss"] == pytest.approx(right.item(), rel=1e-6)


def test_two_processes_train_as_one_which_resumes_from_their_checkpoint(whole, recipe, folder, tmp_path):
    done, so_far = train(recipe, folder, tmp_path, "--stop-after", 7, processes=2)  # in the second phase
    assert done.returncode == 0 and so_far is not None, done.stderr
    one, two = losses(whole), losses(tmp_path)
    assert (len(one), len(two)) == (9, 7)
    assert np.allclose([x["loss"] for x in one[:7]], [x["loss"] for x in two], atol=2e-3)
    assert min(x["loss"] for x in one) < one[0]["loss"] - 0.1  # batches differ: the last is not the easiest
    done, model = train(recipe, folder, tmp_path, "--resume")
    assert done.returncode == 0 and model is not None
    assert [x["step"] for x in losses(tmp_path)] == list(range(1, 10))


def test_a_converted_checkpoint_is_tuned_from_its_own_weights(whole, recipe, folder, tmp_path):
    raw = json.loads(recipe.read_text())
    raw["model"] = {"mem_layers": [0]}
    raw["phases"] = [raw["phases"][1] | {"steps": 1, "learning_rate": 1e-9}]
    (tmp_path / "tune.json").write_text(json.dumps(raw))
    done, tuned = train(tmp_path / "tune.json", folder, tmp_path / "tuned", "--init", whole)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["mem_layers"] == [0]
    assert all(torch.allclose(x, tuned[name], atol=1e-6) for name, x in load_file(whole / "model.safetensors").items())


def test_memory_layers_alone_are_tuned_and_are_a_small_file_to_lay_over_their_base(
    whole, recipe, folder, tmp_path, capsys, monkeypatch
):
    raw, tune = json.loads(recipe.read_text()), tmp_path / "tune.json"
    tuning = raw | {
        "model": {"mem_layers": [0], "last_context_length": 100},
        "phases": [raw["phases"][1] | {"steps": 2}],
    }
    tune.write_text(json.dumps(tuning))
    done, tuned = train(tune, folder, tmp_path / "tuned", "--init", whole, "--tune", "memory", "--stop-after", 1)
    assert done.returncode == 0, done.stderr
    done, tuned = train(tune, folder, tmp_path / "tuned", "--init", whole, "--tune", "memory", "--resume")
    assert done.returncode == 0, done.stderr
    before, trained = load_file(whole / "model.safetensors"), ".layers.0.self_attn."
    names = {name for name in before if trained in name}
    assert {name for name, x in tuned.items() if not torch.equal(x, before[name])} == names and len(names) == 4
    small = load_file(tmp_path / "tuned" / "memory_layers.safetensors")
    assert small.keys() == names and {x.dtype for x in small.values()} == {torch.bfloat16}
    checkpoint = torch.load(tmp_path / "tuned" / "checkpoint.pt", weights_only=True)
    assert {x.dtype for x in checkpoint["model"].values()} == {torch.float32} and len(checkpoint["model"]) == 2

    def lay_over(base, *flags) -> int:
        small = tmp_path / "tuned" / "memory_layers.safetensors"
        call = ["--input", base, "--over", small, "--output", tmp_path / "laid", "--force", *flags]
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, call)])
        try:
            convert.main()
        except SystemExit as stop:
            return stop.code
        return 0

    wide = tmp_path / "wide"  # the same base, stored in float32
    shutil.copytree(whole, wide)
    save_file({name: x.float() for name, x in before.items()}, wide / "model.safetensors")
    for base, *flags in ([whole], [wide, "--dtype", "bfloat16"]):
        assert lay_over(base, *flags) == 0
        laid = load_file(tmp_path / "laid" / "model.safetensors")
        assert all(torch.equal(x, laid[name]) for name, x in tuned.items()) and laid.keys() == tuned.keys()
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("laid", "tuned")]
        assert configs[0] == configs[1] and configs[0]["mem_layers"] == [0]
    capsys.readouterr()
    assert lay_over(tmp_path / "tuned") == 2  # a model of the same shape, and not the one that was tuned
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "was tuned from other weights than those in" in err
    tune.write_text(json.dumps(tuning | {"phases": [tuning["phases"][0] | {"learning_rate": 0}]}))
    done, still = train(tune, folder, tmp_path / "still", "--init", whole, "--tune", "memory")
    assert done.returncode == 0 and all(torch.equal(x, still[name]) for name, x in before.items())


def test_a_checkpoint_in_the_form_of_llama_3_2_gets_a_memory_writes_is_tuned_and_goes_back(
    recipe, folder, tmp_path, capsys
):
    """All of it in one run, with a tokenizer.json of the same form: at both ends transformers writes what generate.py writes."""
    theirs, ours, tuned, mine, back = (tmp_path / name for name in ("theirs", "ours", "tuned", "mine", "back"))
    tokenizer = Tokenizer(write_tokenizer(theirs, "bytes"))
    bos, *ends = (tokenizer.special[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "eot_id"))
    llama_3_2(theirs, bos=bos, ends=ends, vocab_size=tokenizer.vocab_size)

    def run(program, *args) -> str:
        assert run_main(program.main, *args) == 0
        return capsys.readouterr().out

    def written(model: Path, prompt: str) -> str:
        return run(generate, "--model", model, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 20)

    def written_by_transformers(model: Path, prompt: str) -> str:
        tokenizer, reference = AutoTokenizer.from_pretrained(model), LlamaForCausalLM.from_pretrained(model).float()
        ids = tokenizer(prompt, return_tensors="pt")
        out = reference.generate(**ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"

    run(convert, "--input", theirs, "--output", ours, "--mem-layers", 1, "--window", 64)
    raw = json.loads(recipe.read_text())
    raw |= {"model": {}, "phases": [raw["phases"][1] | {"steps": 2}]}
    (tmp_path / "tune.json").write_text(json.dumps(raw))
    done, _ = train(tmp_path / "tune.json", folder, tuned, "--init", ours, "--tune", "memory")
    assert done.returncode == 0, done.stderr
    run(
        convert, "--input", ours, "--over", tuned / "memory_layers.safetensors", "--output", mine, "--dtype", "bfloat16"
    )
    run(convert, "--input", mine, "--output", back, "--to-hf")
    short, long = "The sea was", LONG_TEXT[:2000]  # nothing in memory, and much
    before, after = written(ours, short), written(mine, short)
    assert before == written_by_transformers(theirs, short) != after == written_by_transformers(back, short)
    assert written(mine, long) == written(tuned, long) != written_by_transformers(back, long)
    assert (back / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    assert FastConfig.from_json(mine / "config.json").eos_token_id == tuple(ends)


@pytest.mark.parametrize("ids, right", [([2, 900], [2, 900]), ([700, 900, 1], 900), (5, 2)], ids=str)
def test_what_goes_with_the_weights_that_are_tuned_comes_along_and_says_what_ends_a_text(
    ids, right, whole, recipe, folder, tmp_path
):
    init, tuned = tmp_path / "init", tmp_path / "tuned"
    shutil.copytree(whole, init)
    beside = {
        "added_tokens.json": {"<|im_end|>": 900},
        "generation_config.json": {"eos_token_id": ids, "temperature": 0.6},
    }
    for name, raw in beside.items():
        (init / name).write_text(json.dumps(raw))
    raw = json.loads(recipe.read_text())
    raw |= {"model": {}, "phases": [raw["phases"][1] | {"steps": 1}]}
    (tmp_path / "tune.json").write_text(json.dumps(raw))
    done, _ = train(tmp_path / "tune.json", folder, tuned, "--init", init)
    assert done.returncode == 0 and ("ends no text" in done.stderr) == (right != ids)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tuned / name).read_text())["eos_token_id"] == right
    assert json.loads((tuned / "added_tokens.json").read_text()) == beside["added_tokens.json"]


def test_tuning_takes_the_tokenizer_beside_the_weights_and_goes_on_with_the_same(whole, recipe, folder, tmp_path):
    init, tuned, tune = tmp_path / "init", tmp_path / "tuned", tmp_path / "tune.json"
    shutil.copytree(whole, init)
    train_tokenizer(folder, init / "tokenizer.model", 600)
    raw = json.loads(recipe.read_text())
    tune.write_text(json.dumps(raw | {"model": {"mem_layers": [0]}, "phases": [raw["phases"][1] | {"steps": 2}]}))
    done, _ = train(tune, folder, tuned, "--init", init, "--stop-after", 1)
    assert done.returncode == 0, done.stderr
    own = init / "tokenizer.model"
    assert (tuned / "tokenizer.model").read_bytes() == own.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    next(other.glob("*3.txt")).write_text("Another text.")
    contrast, data = ("--tokenizer", own, "--contrast", "none"), ("--tokenizer", own, "--data", other)
    for flags, named in ((), "--tokenizer"), (contrast, "--contrast"), (data, "--data"):
        done, _ = train(tune, folder, tuned, "--resume", *flags)
        assert done.returncode == 2 and f"made with another {named}" in done.stderr
    done, _ = train(tune, folder, tuned, "--resume", "--tokenizer", own)  # the weights are in the checkpoint
    assert done.returncode == 0 and [x["step"] for x in losses(tuned)] == [1, 2]
    tune.write_text(json.dumps(raw | {"model": {"mem_layers": [0]}, "phases": [raw["phases"][1] | {"steps": 1}]}))
    done, _ = train(tune, folder, tuned, "--resume", "--tokenizer", own)
    assert done.returncode == 2 and "another recipe" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resume"], "checkpoint"),
        (["--data", "nowhere"], "documents|.txt"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
        (["--init", "nowhere"], "nowhere"),
        (["--tune", "memory"], "--init"),
        (["--stop-after", "-3"], "-3"),
        (["--output", __file__], "no folder"),
    ],
)
def test_mistakes_get_one_line_and_status_2(flags, message, recipe, folder, tmp_path, capsys, monkeypatch):
    base = ["--recipe", recipe, "--data", folder, "--output", tmp_path, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, base), *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    began = "is not finite" in err  # which shows in a step
    assert (out != "") == began and err.count("\n") == 1 and any(part in err for part in message.split("|"))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": "x"}, "steps"), ({"packing": 0}, "packing"), ({"learning_rate": -1}, "learning_rate"), ({"cut": 2}, "cut"),
        ({"ranges": []}, "ranges"), ({"mix": {"text": 1}}, "mix"), ({"mix": {"prose": [1, 1]}}, "mix"),
        ({"mix": {"text": [0, 1]}}, "mix"), ({"ranges": [3], "mix": {"dense": [1, 0], "text": [0, 1]}}, "mix"),
        ({"stepz": 1}, "stepz"), ({"window": 512}, "max_position_embeddings is 256"),
        ({"phases": []}, "phases"), ({"seed": "a"}, "seed"), ({"weight_decay": None}, "weight_decay"), ({"model": []}, "model"),
        ({"model": {"vocab_sizee": 1}}, "vocab_sizee"), ({"phases": {"a": 1}}, "phases"), ({"phases": [1]}, "phases"),
        ({"steps": 2**70}, "steps"), ({"documents": 2**70}, "documents"), ({"groups": True}, "groups"), ({"seed": 2**70}, "seed"),
        ({"seed": 0.0}, "seed"), ({"seed": False}, "seed"), ({"ranges": [0.0]}, "ranges"), ({"ranges": [False]}, "ranges"),
        ({"weight_decay": float("nan")}, "weight_decay"), ({"learning_rate": float("inf")}, "learning_rate"),
        ({"ranges": [10**400]}, "ranges"), ({"mix": {"text": [1e308, 1e308]}}, "mix"), ({"mix": {"text": [5e-324, 1]}}, "mix"),
        ({"documents": 2**28}, "training takes"), ({"packing": 2**28}, "training takes"), ({"window": 16}, "pass key takes"),
        ({"model": {"vocab_size": 2**28, "hidden_size": 2**26}}, "training takes"),
        ({"model": {"num_hidden_layers": 2**28}}, "training takes"), ({"model": {"eos_token_id": 5}}, "eos_token_id is 5, but 2"),
        ({"model": {"vocab_size": 100}}, "the tokenizer has 2048 ids"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_a_recipe_are_named(changes, named, recipe, folder, tmp_path, capsys, monkeypatch):
    raw = json.loads(recipe.read_text())
    of_recipe = next(iter(changes)) in raw
    if isinstance(changes.get("model"), dict):
        changes = {"model": raw["model"] | changes["model"]}
    changed = raw | changes if of_recipe else raw | {"phases": [raw["phases"][0] | changes]}
    (tmp_path / "recipe.json").write_text(json.dumps(changed))
    test_mistakes_get_one_line_and_status_2([], named, tmp_path / "recipe.json", folder, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"seed": ' + "[" * 100_000, "nested too deep"), ("5", "no JSON object"), ('{"seed": 0, "seed": 0}', "stands twice"),
        ('{"seed": ' + "9" * 5000 + "}", "no recipe"), ("{", "no recipe"), ("", "no recipe"), (b"\xff", "not UTF-8"),
    ],
    ids=["deep", "number", "twice", "digits", "unfinished", "empty", "bytes"],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(text, named, folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    test_mistakes_get_one_line_and_status_2([], named, path, folder, tmp_path, capsys, monkeypatch)


def test_the_tokens_that_are_left_are_counted_without_going_through_the_steps(recipe, tmp_path):
    raw = json.loads(recipe.read_text())
    first, second = raw["phases"]  # of 4 and 5 steps
    (tmp_path / "recipe.json").write_text(json.dumps(raw | {"phases": [first, second | {"documents": 6}, first]}))
    recipe = Recipe(tmp_path / "recipe.json")
    for step in range(recipe.steps + 1):
        assert recipe.tokens_after(step) == sum(recipe.at(s)[0].step_tokens for s in range(step, recipe.steps))
    at = [(phase.documents, i) for phase, i in map(recipe.at, range(recipe.steps))]
    assert at == [*((2, i) for i in range(4)), *((6, i) for i in range(5)), *((2, i) for i in range(4))]


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2, "num_hidden_layers": 1}]
)
def test_weights_are_counted_before_they_are_there(changes):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
    }
    config = FastConfig(**sizes | changes)
    assert parameter_count(config) == sum(p.numel() for p in FastLlama(config).parameters())


def test_training_does_not_overwrite_a_run_without_being_told(whole, recipe, folder):
    done, _ = train(recipe, folder, whole)
    assert done.returncode == 2 and "--resume" in done.stderr
    done, _ = train(recipe, folder, whole, "--resume", "--stop-after", 2)
    assert done.returncode == 2 and "--stop-after 2: the run is at step 9 already" in done.stderr


def test_training_does_not_overwrite_another_model(whole, recipe, folder, tmp_path):
    shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint.pt"))
    done, _ = train(recipe, folder, tmp_path / "model")
    assert done.returncode == 2 and "has a model in it" in done.stderr


def test_a_full_disk_leaves_nothing_half_written(recipe, folder, tmp_path):
    resource, output = pytest.importorskip("resource"), tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes of a file: the log has room, and no more
    try:
        done, _ = train(recipe, folder, output, "--stop-after", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and "cannot be written: is the disk full?" in done.stderr
    assert [path.name for path in output.iterdir()] == ["losses.jsonl"]


def test_a_checkpoint_without_all_weights_is_not_gone_on_from(whole, recipe, folder, tmp_path):
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    del state["model"]["norm.weight"]
    torch.save(state, tmp_path / "checkpoint.pt")
    shutil.copyfile(whole / "losses.jsonl", tmp_path / "losses.jsonl")
    done, _ = train(recipe, folder, tmp_path, "--resume")
    assert done.returncode == 2 and "model: norm.weight is missing" in done.stderr


def damaged(state: dict, at: tuple, value) -> dict:
    """A copy of nested dictionaries with another value at one place; "gone": with none."""
    if not at:
        return value
    inner = damaged(state.get(at[0]), at[1:], value)
    rest = {name: x for name, x in state.items() if name != at[0]}
    return rest if isinstance(inner, str) and inner == "gone" else rest | {at[0]: inner}


NORM, STATE = ("model", "norm.weight"), ("optimizer", "state", "norm.weight")
ODD = ["gone", None, -1, "x", {}, True, torch.zeros(3, 5)]
PLACES = [
    (), ("step",), ("recipe",), ("made_with",), ("made_with", "--data"), ("config",), ("config", "hidden_size"),
    ("config", "mem_layers"), ("model",), NORM, ("optimizer",), ("optimizer", "state"), STATE, (*STATE, "step"),
    (*STATE, "exp_avg"), (*STATE, "exp_avg_sq"),
]  # fmt: skip
WRONG = [
    (NORM, torch.ones(32, device="meta")), ((*STATE, "step"), float("nan")),
    (NORM, torch.full((32,), torch.inf)), (NORM, torch.ones(32).half()), (NORM, lambda: torch.ones(32).to_sparse()),
    (("model", "lm_head.weight"), torch.ones(2048, 32)), (("model", "other"), torch.ones(3)), (("model", 1), torch.ones(3)),
    (("config", "pad_token_id"), torch.zeros(3)), (("config", "num_hidden_layers"), 2**28), (("config", "hidden_sizee"), 1),
    (("config", "rope_theta"), 5.0), (("config", "eos_token_id"), 7), (("config", "rms_norm_eps"), 0.5),
    (("config", "mem_layers"), (0,)), (("step",), 2**70), (("recipe",), "[" * 100_000), (("recipe",), '{"phases": 1}'),
    ((*STATE, "step"), torch.tensor(8.0)), ((*STATE, "exp_avg"), torch.full((32,), torch.nan)),
    ((*STATE, "exp_avg_sq"), torch.full((32,), -1.0)), (("optimizer", "state", "other"), {}),
]  # fmt: skip


def test_each_part_of_a_checkpoint_is_checked_before_it_is_used(whole, recipe, folder, tmp_path, capsys, monkeypatch):
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    shutil.copyfile(whole / "losses.jsonl", tmp_path / "losses.jsonl")
    for place, value in [*((place, value) for place in PLACES for value in ODD if place or value != "gone"), *WRONG]:
        value = value() if callable(value) else value
        torch.save(damaged(state, place, value), tmp_path / "checkpoint.pt")
        test_mistakes_get_one_line_and_status_2(
            ["--resume"], "checkpoint.pt", recipe, folder, tmp_path, capsys, monkeypatch
        )
    data, middle = (whole / "checkpoint.pt").read_bytes(), (whole / "checkpoint.pt").stat().st_size // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]  # one bit of a weight
    for damage in (flipped, *(data[:n] for n in (0, 1, 100, middle, len(data) - 1))):
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        test_mistakes_get_one_line_and_status_2(
            ["--resume"], "checkpoint.pt", recipe, folder, tmp_path, capsys, monkeypatch
        )


def resume(recipe, folder, output, monkeypatch, *flags):
    flags = ["--recipe", recipe, "--data", folder, "--output", output, "--device", "cpu", "--resume", *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    main()


@pytest.mark.parametrize("groups", ["gone", None, [], [{"lr": 1.0, "betas": (5, 5), "params": ["x"]}]])
def test_what_a_recipe_says_of_the_optimizer_is_not_taken_from_a_checkpoint(
    groups, whole, recipe, folder, tmp_path, monkeypatch
):
    train_to = tmp_path / "run"
    shutil.copytree(whole, train_to)
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    torch.save(damaged(state, ("optimizer", "param_groups"), groups), train_to / "checkpoint.pt")
    resume(recipe, folder, train_to, monkeypatch)
    assert (train_to / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "damage, left",
    [
        (lambda log: None, 0), (lambda log: b"", 0), (lambda log: log[:-20], 8), (lambda log: b"\xff" + log, 8),
        (lambda log: log.replace(b'"loss"', b'"los"', 1), 8), (lambda log: b"[" * 100_000 + b"\n" + log, 9),
        (lambda log: log + b'{"step": 10, "loss": 1.0, "answer_loss": 1.0}\n', 9),
        (lambda log: log.replace(b'"step": 2', b'"step": true'), 8),
    ],
    ids=["missing", "empty", "cut", "bytes", "name", "deep", "longer", "kind"],
)  # fmt: skip
def test_a_damaged_log_costs_its_lines_alone_and_is_told(
    damage, left, whole, recipe, folder, tmp_path, capsys, monkeypatch
):
    run, log = tmp_path / "run", damage((whole / "losses.jsonl").read_bytes())
    shutil.copytree(whole, run)
    raw = json.loads(recipe.read_text())
    raw["phases"].append(raw["phases"][1] | {"steps": 1})
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    (run / "losses.jsonl").unlink()
    if log is not None:
        (run / "losses.jsonl").write_bytes(log)
    resume(tmp_path / "recipe.json", folder, run, monkeypatch)
    err = capsys.readouterr().err
    assert (err == "") if left == 9 else (err.count("\n") == 1 and f"lacks {9 - left} of 9 steps" in err)
    assert [x["step"] for x in losses(run)][-1] == 10 and len(losses(run)) == left + 1


# ------------------------------------------------------------------------------------- What is not finite, and stopping


@pytest.mark.parametrize(
    "changes",
    [{"weight_decay": 1e12}, {"answer_weight": 1e300}, {"answer_weight": 10**300}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_step_that_is_not_finite_is_not_taken_in(changes, recipe, folder, tmp_path, capsys, monkeypatch):
    raw = json.loads(recipe.read_text()) | changes
    raw["phases"] = [raw["phases"][0] | {"steps": 60, "mix": {"dense": [1, 1]}}]
    tune, run = tmp_path / "recipe.json", tmp_path / "run"
    tune.write_text(json.dumps(raw))
    test_mistakes_get_one_line_and_status_2([], "is not finite", tune, folder, run, capsys, monkeypatch)
    assert not run.exists()


def test_what_was_saved_before_a_step_that_is_not_finite_is_kept(recipe, folder, tmp_path, capsys, monkeypatch):
    raw = json.loads(recipe.read_text()) | {"weight_decay": 1e12}
    tune, run = tmp_path / "recipe.json", tmp_path / "run"
    tune.write_text(json.dumps(raw))
    flags = ["--recipe", tune, "--data", folder, "--output", run, "--device", "cpu", "--stop-after", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    main()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    named = "step 1 is kept"
    test_mistakes_get_one_line_and_status_2(["--resume"], named, tune, folder, run, capsys, monkeypatch)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_to_start_from_must_be_finite(value, whole, recipe, folder, tmp_path, capsys, monkeypatch):
    init, name = tmp_path / "init", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(whole, init)
    weights = load_file(init / "model.safetensors")
    weights[name][3, 3] = value
    save_file(weights, init / "model.safetensors")
    flags, run = ["--init", str(init)], tmp_path / "run"
    test_mistakes_get_one_line_and_status_2(flags, name, recipe, folder, run, capsys, monkeypatch)
    assert not run.exists()


def test_rounded_weights_are_not_trained(whole, recipe, folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "init")
    config = json.loads((whole / "config.json").read_text())
    (tmp_path / "init" / "config.json").write_text(json.dumps(config | {"weight_dtype": "int8"}))
    flags, named = ["--init", str(tmp_path / "init")], "weights of 8 or 4 bits are not trained"
    test_mistakes_get_one_line_and_status_2(flags, named, recipe, folder, tmp_path / "run", capsys, monkeypatch)


def long(recipe, path: Path) -> Path:
    """A recipe that nobody waits for."""
    raw = json.loads(recipe.read_text())
    path.write_text(json.dumps(raw | {"phases": [raw["phases"][0] | {"steps": 10**9}]}))
    return path


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_run_that_is_told_to_stop_ends_after_a_step_with_a_checkpoint(number, processes, recipe, folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "err"
    with log.open("w") as err:
        process = subprocess.Popen(
            command(long(recipe, tmp_path / "recipe.json"), folder, run, processes=processes),
            stdout=subprocess.PIPE, stderr=err, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        next(line for line in process.stdout if line.startswith("step 20/"))
        process.send_signal(number)
        process.communicate(timeout=100)
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert [x["step"] for x in losses(run)] == list(range(1, step + 1)) and 20 <= step < 100
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt", "losses.jsonl"]
    if processes == 1:  # torchrun ends in its own way, and does not pass on what is printed meanwhile
        told = log.read_text().splitlines()
        assert process.returncode == 128 + number and len(told) == 2
        assert f"after step {step}, go on with: python {HERE / 'train.py'}" in told[1] and told[1].endswith("--resume")


class Signalling(io.StringIO):
    """Standard output that sends this process a signal with the first line of a step."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        if text.startswith("step 20/"):
            signal.raise_signal(self.number)
        return super().write(text)


def test_a_run_that_is_stopped_ends_with_the_status_of_its_signal(recipe, folder, tmp_path):
    call = command(long(recipe, tmp_path / "recipe.json"), folder, tmp_path / "run")
    done = run_here(call, Signalling(signal.SIGTERM))
    assert done.returncode == 143 and "after step 21, go on with" in done.stderr
    assert [x["step"] for x in losses(tmp_path / "run")] == list(range(1, 22))


def test_signals_are_noted_between_steps_and_end_at_once_before_and_the_second_time(capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as ended, Stop():
            signal.raise_signal(number)
        assert ended.value.code == 128 + number and "nothing to save" in capfd.readouterr().err
        with pytest.raises(SystemExit) as ended, Stop() as stop:
            stop.waits = True
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # from a scheduler, and from torchrun
            assert stop.number == number
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# ------------------------------------------------------------------------------------------------------------------ Data


def test_batches_are_those_of_earlier_versions(corpus):
    """So that runs of theirs go on: hashes of what they drew."""
    mix, hard = {"text": 0.4, "dense": 0.3, "passkey": 0.3}, {"cut": 0.5, "repeated": 0.3, "single": 0.5}
    hashed = sha256()
    for step in range(8):
        batch = corpus.batch((0, step, 0), 4, 128, mix, [0, 1, 2, 3] * 4, **hard)
        for x in (batch.inputs, batch.targets, batch.answers):
            hashed.update(x.tobytes())
    assert hashed.hexdigest() == "2959f1152de77f3defb51618efc4d82c36ad45141633da205f259f68195ea749"


def own_tokenizer(path: Path, *pieces: str, **options) -> Tokenizer:
    """One that has these pieces whole, and otherwise those that it finds: ▁71428 is one of them unless digits are split."""
    text = ["What is the pass key? The pass key is 71428 .", "the sea is 71428 fathoms", "0 1 2 3 4 5 6 7 8 9"] * 20
    settings = {
        "vocab_size": 500,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
        "model_type": "bpe",
    } | options
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, user_defined_symbols=list(pieces), **settings
        )
    return Tokenizer(path)


@pytest.mark.parametrize(
    "pieces, digits, split",
    [
        (("7", "1", "4", "2", "8"), 5, True), (("\u258171428",), 1, False), (("71428",), 1, True), (("714", "28"), 2, True),
        (("28.",), 4, True), (("\u25817", "1428."), 2, True), (("is\u258171", "4"), 4, True),
    ],
    ids=str,
)  # fmt: skip
def test_the_tokens_of_an_answer_are_those_with_digits_of_the_key(pieces, digits, split, tmp_path):
    tokenizer = own_tokenizer(tmp_path / "m", *(pieces if split else ()), split_digits=split)
    ids, marked = question_and_answer(tokenizer, "71428")
    assert tokenizer.decode(ids) == "What is the pass key? The pass key is 71428."
    written = [tokenizer.sp.id_to_piece(i) for i in ids]
    assert marked == [any(letter.isdecimal() for letter in piece) for piece in written]
    assert sum(marked) == digits and all(piece in written for piece in pieces)


@pytest.mark.parametrize(
    "pieces", [("71428", *map(str, range(10, 100))), ("0.", "1.", "2.", "3.")], ids=["pairs", "stops"]
)
def test_documents_with_pass_keys_mark_answers_by_any_tokenizer(pieces, folder, tmp_path):
    tokenizer = own_tokenizer(tmp_path / "m", *pieces)
    corpus, _ = read_corpora([Source(folder)], tokenizer)
    for seed in range(30):
        ids, answered = corpus.passkey(np.random.default_rng(seed), 1500, 300, dense=bool(seed % 2))
        key = tokenizer.decode(ids.tolist()).split("The pass key is ")[1][:5]
        digits = "".join(c for c in tokenizer.decode(ids[answered].tolist()) if c.isdecimal())
        assert len(ids) == 1500 and digits and (digits + key).startswith(key) and digits in key * 90


@pytest.mark.parametrize("start", [[0], []], ids=["start", "no start"])
def test_documents_of_a_tokenizer_json_are_joined_by_what_ends_a_text_and_what_begins_one_if_anything_does(
    start, recipe, folder, tmp_path
):
    path = write_tokenizer(tmp_path / "from", "bytes", start=bool(start), chat_template="x")
    tokenizer = Tokenizer(path)
    corpus, _ = read_corpora([Source(folder)], tokenizer)
    start = [tokenizer.bos_id][: len(start)]
    for document in corpus.documents:
        ids = document.tolist()
        assert ids[: len(start)] == start and ids[-1] == tokenizer.eos_id
        assert not {*ids[len(start) : -1]} & {*tokenizer.special.values()}
    ids, _ = corpus.passkey(np.random.default_rng(0), 500, 300, dense=True)
    assert (
        ids.dtype == np.int64 and ids.tolist()[: len(start)] == start and "pass key" in tokenizer.decode(ids.tolist())
    )
    raw = json.loads(recipe.read_text())
    raw |= {"phases": [raw["phases"][1] | {"steps": 1, "window": 128}]}
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    done, _ = train(tmp_path / "recipe.json", folder, tmp_path / "run", "--tokenizer", path)
    assert done.returncode == 0, done.stderr
    made, config = tmp_path / "run", json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (path.parent / name).read_bytes()
    assert config["eos_token_id"] == tokenizer.eos_id and config["bos_token_id"] == (start or [tokenizer.eos_id])[0]


def test_a_tokenizer_without_digits_is_told():
    class Wordy(SentencePieceTokenizer):
        def decode(self, ids):
            return "".join(c for c in super().decode(ids) if not c.isdecimal())

    with pytest.raises(ValueError, match="cannot write digits"):
        question_and_answer(Wordy(TOKENIZER), "71428")


@pytest.mark.parametrize(
    "text, right", [(" 71428.", 1), ("71428", 1), (" 714285", 0), ("7142", 0), ("", 0), ("it is 71428", 0)]
)
def test_an_answer_is_the_number_that_a_text_begins_with(text, right):
    assert answers(text, "71428") == bool(right)


def test_side_files_hidden_files_and_folders_are_no_documents(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "._document_01.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "folder.txt").mkdir()
    assert [path.name for path in text_files(tmp_path)] == [path.name for path in text_files(folder)]


@pytest.mark.parametrize("pad", [-1, 3])
def test_special_ids_are_those_of_the_tokenizer(pad, whole, recipe, folder, tmp_path, monkeypatch):
    ids = {"unk_id": 0, "bos_id": 2, "eos_id": 1, "pad_id": pad}
    own_tokenizer(tmp_path / "m", **ids)
    tune, init = tmp_path / "tune.json", tmp_path / "init"
    tune.write_text(json.dumps(json.loads(recipe.read_text()) | {"model": {"mem_layers": [0]}}))
    shutil.copytree(whole, init)
    for name, flags in ("new", ["--recipe", recipe]), ("tuned", ["--recipe", tune, "--init", init]):
        flags += ["--tokenizer", tmp_path / "m", "--data", folder, "--output", tmp_path / name, "--stop-after", 1]
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, flags)])
        main()
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert [config[f"{x}_token_id"] for x in ("bos", "eos", "pad")] == [2, 1, max(pad, 0)]


def test_batches_depend_on_seed_and_step_alone(corpus):
    mix = {"text": 0.4, "dense": 0.3, "passkey": 0.3}
    a, b, c = (corpus.batch(seed, 4, 64, mix, [0, 1] * 4) for seed in ((0, 1, 0), (0, 1, 0), (0, 2, 0)))
    assert np.array_equal(a.inputs, b.inputs) and not np.array_equal(a.inputs, c.inputs)


def test_consecutive_entries_are_consecutive_chunks_of_a_document(corpus):
    batch = corpus.batch((0, 0, 0), 3, 64, {"text": 1.0}, [0] * 12)
    assert batch.inputs.shape == batch.targets.shape == (12, 64)
    for document_in, document_out in zip(batch.inputs.reshape(3, -1), batch.targets.reshape(3, -1)):
        assert np.array_equal(document_in[1:], document_out[:-1])


def test_short_documents_are_joined_and_never_padded(corpus):
    tokenizer = corpus.tokenizer
    batch = corpus.batch((0, 0, 0), 8, 256, {"text": 1.0}, [0] * 64)  # slots of 2048 tokens, documents of about 1000
    for ids in batch.inputs.reshape(8, -1).tolist():
        assert tokenizer.eos_id in ids and 0 not in ids
        ends = [i for i, x in enumerate(ids[:-2]) if x == tokenizer.eos_id]
        assert all(ids[i + 1] == tokenizer.bos_id != ids[i + 2] for i in ends)


def test_a_slot_may_end_where_a_long_document_does(corpus):
    n = min(len(document) for document in corpus.documents if len(document) > 500) - 3
    lasts = [corpus.text(np.random.default_rng(seed), n)[-1] for seed in range(2000)]
    assert corpus.tokenizer.eos_id in lasts


@pytest.mark.parametrize("dense", [True, False])
def test_answers_mark_the_digits_of_the_key_stated_before(dense, corpus):
    for seed in range(30):
        ids, answers = corpus.passkey(np.random.default_rng(seed), 513, 128, dense, cut=0.5, repeated=0.5)
        text = corpus.tokenizer.decode(ids.tolist())
        key = text.split("The pass key is ")[1][:5]
        digits = corpus.tokenizer.decode(ids[answers].tolist()).replace(" ", "")
        assert len(ids) == 513 and digits and (digits + key).startswith(key) and digits in key * 40


@pytest.mark.parametrize("cut", [0.0, 1.0])
def test_a_cut_statement_lies_across_the_border_of_the_first_two_windows(cut, corpus):
    stated, window = corpus.tokenizer.encode("The pass key is", bos=False), 128
    length = len(corpus.tokenizer.encode(KEY.format(key="12345"), bos=False))
    for seed in range(20):
        ids = corpus.passkey(np.random.default_rng(seed), 513, window, dense=False, cut=cut)[0].tolist()
        starts = [i for i in range(len(ids)) if ids[i : i + len(stated)] == stated]
        assert (starts[0] < window < starts[0] + length) == bool(cut)


@pytest.mark.parametrize("name", ["answer_weight", "cut", "repeated", "single"])
def test_what_a_recipe_says_of_answers_and_hard_keys_reaches_training(name, recipe, folder, tmp_path):
    found = []
    for value in (0.0, 1.0):
        raw = json.loads(recipe.read_text())
        changes = {} if name == "answer_weight" else {name: value}
        mix = {"ranges": None, "mix": {"passkey": [1.0, 1.0]}}
        raw |= {
            "phases": [phase | mix | changes for phase in raw["phases"]],
            "answer_weight": value if not changes else 1.0,
        }
        (tmp_path / "recipe.json").write_text(json.dumps(raw))
        found.append(train(tmp_path / "recipe.json", folder, tmp_path / str(value), "--stop-after", 1)[1])
    assert any((found[0][tensor] != found[1][tensor]).any() for tensor in found[0])


@pytest.mark.parametrize("dense", [True, False])
def test_a_window_too_small_for_a_pass_key_is_refused(dense, corpus):
    with pytest.raises(ValueError, match="at least .* tokens, not 16"):
        corpus.passkey(np.random.default_rng(0), 65, 16, dense)


@pytest.mark.parametrize("reach", [3, 7, 15])
def test_no_entry_sees_the_pass_keys_of_two_documents(reach, corpus):
    packing, seen_keys = 4, []
    extra = cross_batch_extra(8 * packing, reach, packing)
    for seed in range(4):
        batch = corpus.batch((0, seed, 0), 8, 128, {"passkey": 1.0, "dense": 1.0, "filler": 1.0}, extra)
        keyed = [i // packing for i, answers in enumerate(batch.answers) if answers.any()]
        for i, n in enumerate(extra):
            seen_keys.append(len({j // packing for j in range(i - n, i + 1)} & set(keyed)))
    assert set(seen_keys) == {0, 1}


def test_each_window_after_the_first_asks_for_the_key(corpus):
    for seed in range(20):
        _, answers = corpus.passkey(np.random.default_rng(seed), 4 * 128 + 1, 128, dense=False)
        assert [window.sum() for window in answers[1:].reshape(4, 128)][1:] == [5, 5, 5]


def test_validation_documents_are_never_trained_on(folder, corpus):
    files = text_files(folder)
    kept = [corpus.tokenizer.encode(path.read_text(encoding="utf-8")) for path in held_out(files)]
    assert len(kept) + len(corpus.documents) == len(files)
    assert all(document[-1] == corpus.tokenizer.eos_id for document in corpus.documents)
    assert all(list(document[:-1]) not in kept for document in corpus.documents)


def test_one_document_in_sixteen_is_held_out_and_more_documents_change_that_of_no_other():
    files = [Path(f"{i}.txt") for i in range(4000)]
    kept = held_out(files)
    assert 200 < len(kept) < 300
    for n in (1, 2, 7, 40, 900):
        some = files[:n]
        first = min(some, key=lambda file: sha256(file.name.encode()).hexdigest())  # one at least is held out
        assert held_out(some) == [file for file in some if file in kept or file == first]
    book, other = Path("moby_dick_091.txt"), Path("other.txt")
    assert book in held_out([*files, book]) and held_out([book, other]) == [book]  # tiny/book.txt


def test_contrast_decides_which_entries_are_seen():
    shape = {"steps": 1, "learning_rate": 1.0, "window": 8, "documents": 2, "packing": 4, "mix": {"text": [1, 1]}}
    phase = PackedPhase(ranges=[7], **shape)
    assert phase.extra(0) == phase.extra(0, "detached") == [0, 1, 2, 3, 0, 3, 6, 7]
    assert phase.extra(0, "positives") == [0, 1, 2, 3] * 2
    assert phase.extra(0, "none") == [0] * 8
    listed = PackedPhase(contexts=[0, 3, 7, 7], **shape | {"documents": 3})  # of the paper's 7B model
    assert listed.extra(5) == [0, 1, 2, 3, 0, 3, 6, 7, 0, 3, 7, 7]
    assert contexts(listed, 0, "full") == "(0,0) (1,2) (2,5) (3,4)"


def test_detached_contexts_give_the_same_loss_and_another_step(whole, recipe, folder, tmp_path):
    train(recipe, folder, tmp_path, "--contrast", "detached", "--stop-after", 2)
    (first, second), (right, other, *_) = losses(tmp_path), losses(whole)
    assert first == right and second != other


def test_the_learning_rate_rises_and_falls_in_every_phase():
    for phase in Recipe(HERE / "tiny.json").phases:
        rates = [phase.learning_rate_at(step) for step in range(phase.steps)]
        assert rates[0] < 0.1 * max(rates) and rates[-1] < 0.1 * max(rates) and max(rates) <= phase.learning_rate


@pytest.mark.parametrize(
    "changes, rates",
    [
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"warmup": 0, "final": 0.0}, [1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
        ({"warmup": 2, "final": 0.5}, [0.5, 0.981, 0.927, 0.846, 0.75, 0.654, 0.573, 0.519]),
    ],
    ids=str,
)
def test_the_learning_rate_is_what_a_recipe_says(changes, rates, recipe):
    phase = PackedPhase(**json.loads(recipe.read_text())["phases"][0] | {"steps": 8, "learning_rate": 1.0} | changes)
    assert [phase.learning_rate_at(step) for step in range(8)] == pytest.approx(rates, abs=1e-3)


@pytest.mark.parametrize(
    "name, seen",
    [
        ("tune", "(0,0) (1,1) (2,1) (3,0)"),
        ("tune_7b", "(0,0) (1,2) (2,5) (3,4)"),
        ("tune_code", "(0,0) (1,2) (2,5) (3,4)"),
    ],
)
def test_recipes_for_tuning_are_the_papers(name, seen):
    """Appendix A.2: positives and negatives of the quarters of a batch, 256k tokens a step, a constant rate of 2e-5."""
    recipe = Recipe(HERE / f"{name}.json")
    (phase,) = recipe.phases
    assert contexts(phase, 0, "full") == seen and phase.step_tokens == 1 << 18
    assert {phase.learning_rate_at(step) for step in (50, 1000, phase.steps - 1)} == {2e-5}
    assert recipe.weight_decay == 0.01 and not phase.asks


@pytest.mark.parametrize("name, tokens", [("smollm2", 1 << 12), ("smollm2_gpu", 1 << 16)])
def test_recipes_for_a_plain_llama_show_memory_layers_positives_and_negatives_in_one_batch(name, tokens):
    recipe = Recipe(HERE / f"{name}.json")
    (phase,) = recipe.phases
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 30}
    phase.check_fits(FastConfig(**shape | recipe.model))
    assert contexts(phase, 0, "full") == "(0,0) (1,2) (2,4) (3,4)" and phase.step_tokens == tokens
    assert phase.learning_rate_at(phase.steps - 1) == phase.learning_rate == 1e-3


def test_the_memory_that_comes_along_for_smollm2_is_of_its_recipe_and_is_refused_over_other_weights(tmp_path):
    """Over SmolLM2 itself, where `python examples/smollm2.py` fetched it, it is laid and reads on."""
    path, model = HERE / "smollm2_memory.safetensors", Recipe(HERE / "smollm2.json").model
    attention = load_file(path)
    assert {x.dtype for x in attention.values()} == {torch.bfloat16} and all(map(is_finite, attention.values()))
    parts = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in model["mem_layers"] for part in "qkvo"]
    assert sorted(attention) == sorted(parts)
    others = {name: x + 0.01 for name, x in attention.items()}
    with pytest.raises(ValueError, match="was tuned from other weights than those in elsewhere"):
        laid_over(path, as_weights(others), Path("elsewhere"))
    base = HERE.parent / "smollm2"
    if base.exists():
        run_main(convert.main, "--input", base, "--over", path, "--output", tmp_path / "laid")
        config = FastConfig.from_json(tmp_path / "laid" / "config.json")
        assert {name: getattr(config, name) for name in model} == model | {"mem_layers": tuple(model["mem_layers"])}
        laid, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "laid", base))
        assert {name for name, x in laid.items() if not torch.equal(x.float(), before[name].float())} == {*attention}


def test_a_recipe_without_a_shape_tunes_what_is_named(folder, tmp_path):
    done, _ = train(HERE / "tune.json", folder, tmp_path / "run")
    assert done.returncode == 2 and "hidden_size" in done.stderr and "--init" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_tells_what_it_trains_on_and_how_it_goes(recipe, folder, tmp_path):
    raw = json.loads(recipe.read_text())
    asks, text = (
        raw["phases"][1] | {"steps": 20, "learning_rate": 1e-3, "mix": {kind: [1, 1]}} for kind in ("dense", "text")
    )
    asks["ranges"] = None
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(raw | {"phases": [asks, text]}))
    done, _ = train(path, folder, tmp_path / "run", "--validate", 30, "--stop-after", 20)
    assert done.returncode == 0, done.stderr
    more, _ = train(path, folder, tmp_path / "run", "--validate", 30, "--resume")
    lines, after = done.stdout.splitlines(), more.stdout.splitlines()
    counted = sum(p.numel() for p in FastLlama(FastConfig(**raw["model"])).parameters())
    assert lines[0] == f"{counted:,} parameters; 40 steps, {40 * 2 * 2 * 4 * 64:,} tokens"
    assert "documents of" in lines[1] and "held out" in lines[1]
    assert lines[2] == "phase 1: 20 steps of 2 x 2 documents x 4 entries of 64 tokens; the entries of a document see"
    assert lines[3:6] == [
        "  (positives, negatives) (0,0) (1,0) (2,0) (3,0)",
        "phase 2: 20 steps of 2 x 2 documents x 4 entries of 64 tokens; the entries of a document see",
        "  (positives, negatives) (0,0) (1,1) (2,1) (3,0)",
    ]
    assert lines[6] == "  (positives, negatives) (0,0) (1,2) (2,4) (3,4)"
    log = losses(tmp_path / "run")
    step = next(line for line in lines if line.startswith("step 20/40"))
    assert f"loss {np.mean([x['loss'] for x in log[:20]]):.4f}  answer loss " in step
    assert "resumed at step 20" in after
    step = next(line for line in after if line.startswith("step 40/40"))
    assert f"loss {np.mean([x['loss'] for x in log[20:]]):.4f}  " in step and "answer" not in step
    assert [x["step"] for x in log if "held_out" in x] == [30, 40]
    told = log[-1]["held_out"]
    assert (
        f"step 40: loss on held-out documents {told['with memory']:.4f} with memory, {told['without']:.4f} without"
        in after
    )
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "python generate.py --model" in more.stdout


def test_rows_of_json_lines_are_documents_and_sources_are_drawn_by_weight(tmp_path):
    tokenizer, texts = Tokenizer(TOKENIZER), [f"{i} {LONG_TEXT[500 * i : 500 * i + 300]}" for i in range(40)]
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in [*texts, "short"])
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        corpora = read_corpora([Source(tmp_path / name)], tokenizer, "body", shortest=100)
        found = [[tokenizer.decode(x.tolist()) for x in corpus.documents] for corpus in corpora]
        wanted = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
        assert sorted(found[0] + found[1]) == sorted(wanted) and 0 < len(found[1]) < 10
        assert corpora[0].tokens == sum(len(tokenizer.encode(text, eos=True)) for text in texts) - corpora[1].tokens
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": LONG_TEXT[:40_000]}) + "\n")
    assert not is_held_out(LONG_TEXT[:40_000])
    both = [Source.parse(f"{tmp_path / name}={weight}") for name, weight in (("a.jsonl", 3), ("c.jsonl", 0.5))]
    corpus, _ = read_corpora(both, tokenizer, "body")
    rng, few = np.random.default_rng(0), 0
    long = corpus.documents[-1].tolist()
    for _ in range(400):  # 500 tokens are one of the long text's, or several of the short ones
        few += 2 in corpus.text(rng, 500)[:-1]
    assert abs(few / 400 - 3 / 3.5) < 0.06 and len(long) > 5000
    other, _ = read_corpora([Source(source.path) for source in both], tokenizer, "body")
    assert corpus.digest() != other.digest()
    assert Source.parse("x=y.jsonl") == Source(Path("x=y.jsonl")) and Source.parse("x=0") == Source(Path("x=0"))


@pytest.mark.parametrize(
    "lines, flags, named",
    [
        ('{"text": "a"}\n{"text"\n', (), "line 2 is broken JSON"),
        ('{"body": "a"}\n', (), "line 1 has no text under 'text'"),
        ('{"text": "a"}\n', ("--shortest", "9"), "no document to train on, of at least 9 letters"),
    ],
)
def test_json_lines_that_hold_no_documents_are_refused(lines, flags, named, recipe, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines)
    done, _ = train(recipe, tmp_path / "a.jsonl", tmp_path / "run", *flags)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_a_tokenizer_is_trained_whose_pieces_spell_any_text_and_no_unfinished_one_is_left(folder, tmp_path):
    path = tmp_path / "tokenizer.model"
    for size in (100, 100_000):
        with pytest.raises(ValueError, match=f"--vocab-size {size}: Vocabulary size"):
            train_tokenizer(folder, path, size)
    assert not list(tmp_path.iterdir())
    train_tokenizer(folder, path, 600)
    tokenizer, text = Tokenizer(path), "  Ahab\n\tsaid: \U0001f433 1851"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 600 and tokenizer.decode(ids) == text
    assert [tokenizer.sp.id_to_piece(i) for i in ids[-4:]] == ["1", "8", "5", "1"]


def test_a_tokenizer_is_not_trained_where_it_could_not_be_written_or_on_what_is_no_text(
    folder, tmp_path, capsys, monkeypatch
):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    (bad / "document_01.txt").write_bytes(b"caf\xe9")
    for flags, named in (
        (["--output", tmp_path / "nowhere" / "m"], "--output"),
        (["--output", tmp_path / "m", "--data", bad], "document_01.txt is not UTF-8 text"),
        (["--output", tmp_path / "m", "--vocab-size", 10**30], "--vocab-size"),
        (["--output", tmp_path / "m", "--vocab-size", 2], "--vocab-size"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "--data", str(folder), *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            tokenizer_program.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and named in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_long_file_is_a_document_and_so_are_the_others_of_a_folder(tmp_path):
    files = {"a/two.ml": "2" * 15_000, "a/one.ml": "1" * 15_000, "a/long.ml": "3" * 60_000, "a/one.txt": "4" * 60_000}
    files |= {"top.ml": "5" * 20_000, "b/short.ml": "6" * 19_999, "tests/a.ml": "7" * 60_000}
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    source = fetch_data.Source("package", "in", (".ml",), r"^tests/")
    found = fetch_data.documents("hol", source, tmp_path)
    joined = files["a/one.ml"] + "\n" + files["a/two.ml"]
    assert found == {"hol": files["top.ml"], "hol_a": joined, "hol_a_long": files["a/long.ml"]}
