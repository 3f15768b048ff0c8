"""The training loop and its data, checked: python -m pytest training"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from longllama import cross_batch_extra
from tokenizer import Tokenizer
from training.data import Corpus, held_out, text_files
from training.tasks import KEY
from training.train import Phase, Recipe, extra_contexts, main
from training.train_tokenizer import train as train_tokenizer

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tiny" / "tokenizer.model"
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
    return Corpus(folder, Tokenizer(TOKENIZER))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two short phases over a small model, with two groups a step."""
    raw = json.loads((HERE / "tiny.json").read_text())
    raw["model"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "mem_layers": [1]}
    mix = {"text": [0.4, 0.6], "dense": [0.3, 0.2], "passkey": [0.3, 0.2]}
    phase = {"learning_rate": 3e-2, "window": 64, "documents": 2, "packing": 4, "mix": mix, "groups": 2}
    raw["phases"] = [phase | {"steps": 4, "ranges": None}, phase | {"steps": 5, "ranges": [3, 7]}]
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(raw))
    return path


def train(recipe, folder, output, *flags, processes: int = 1, before=None):
    """Runs train.py, after before() in its process; returns what it printed, and the finished model's tensors if there is one."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [
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
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=before,
    )
    model = Path(output) / "model.safetensors"
    return done, load_file(model) if model.exists() else None


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


def test_two_processes_train_as_one(whole, recipe, folder, tmp_path):
    done, _ = train(recipe, folder, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = losses(whole), losses(tmp_path / "two")
    assert len(one) == 9
    assert np.allclose([x["loss"] for x in one], [x["loss"] for x in two], atol=2e-3)
    assert min(x["loss"] for x in one) < one[0]["loss"] - 0.1  # batches differ: the last is not the easiest


def test_a_checkpoint_of_two_processes_resumes_on_one(recipe, folder, tmp_path):
    train(recipe, folder, tmp_path, "--stop-after", "5", processes=2)
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
    assert out == "" and err.count("\n") == 1 and any(part in err for part in message.split("|"))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": "x"}, "steps"), ({"packing": 0}, "packing"), ({"learning_rate": -1}, "learning_rate"), ({"cut": 2}, "cut"),
        ({"ranges": []}, "ranges"), ({"mix": {"text": 1}}, "mix"), ({"mix": {"prose": [1, 1]}}, "mix"),
        ({"mix": {"text": [0, 1]}}, "mix"), ({"ranges": [3], "mix": {"dense": [1, 0], "text": [0, 1]}}, "mix"),
        ({"stepz": 1}, "stepz"), ({"window": 512}, "max_position_embeddings is 256"),
        ({"phases": []}, "phases"), ({"seed": "a"}, "seed"), ({"weight_decay": None}, "weight_decay"), ({"model": []}, "model"),
        ({"model": {"vocab_sizee": 1}}, "vocab_sizee"),
        ({"model": {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1}}, "the tokenizer has 2048 ids"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_a_recipe_are_named(changes, named, recipe, folder, tmp_path, capsys, monkeypatch):
    raw = json.loads(recipe.read_text())
    of_recipe = next(iter(changes)) in raw
    changed = raw | changes if of_recipe else raw | {"phases": [raw["phases"][0] | changes]}
    (tmp_path / "recipe.json").write_text(json.dumps(changed))
    test_mistakes_get_one_line_and_status_2([], named, tmp_path / "recipe.json", folder, tmp_path, capsys, monkeypatch)


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

    def room_for_the_log_alone():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes of a file

    done, _ = train(recipe, folder, output, "--stop-after", 1, before=room_for_the_log_alone)
    assert done.returncode == 2 and "cannot be written: is the disk full?" in done.stderr
    assert [path.name for path in output.iterdir()] == ["losses.jsonl"]


def test_a_checkpoint_without_all_weights_is_not_gone_on_from(whole, recipe, folder, tmp_path):
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    del state["model"]["norm.weight"]
    torch.save(state, tmp_path / "checkpoint.pt")
    shutil.copyfile(whole / "losses.jsonl", tmp_path / "losses.jsonl")
    done, _ = train(recipe, folder, tmp_path, "--resume")
    assert done.returncode == 2 and "model: norm.weight is missing" in done.stderr


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
    assert held_out([Path("moby_dick_091.txt"), Path("other.txt")]) == [Path("moby_dick_091.txt")]  # tiny/book.txt


def test_contrast_decides_which_entries_are_seen():
    phase = Phase(steps=1, learning_rate=1.0, window=8, documents=2, packing=4, ranges=[7], mix={"text": [1, 1]})
    assert extra_contexts(phase, (0, 0, 0)) == [0, 1, 2, 3, 0, 3, 6, 7]
    assert extra_contexts(phase, (0, 0, 0), "positives") == [0, 1, 2, 3] * 2
    assert extra_contexts(phase, (0, 0, 0), "none") == [0] * 8


def test_the_learning_rate_rises_and_falls_in_every_phase():
    for phase in Recipe(HERE / "tiny.json").phases:
        rates = [phase.learning_rate_at(step) for step in range(phase.steps)]
        assert rates[0] < 0.1 * max(rates) and rates[-1] < 0.1 * max(rates) and max(rates) <= phase.learning_rate


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
