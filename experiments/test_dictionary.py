"""Dictionary lookup, checked: python -m pytest experiments/test_dictionary.py"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from convert import save_pretrained
from experiments import dictionary
from experiments.dictionary import KEY, RECORD, VALUE, WINDOW, K, Q, Stage, V
from fast import FastLlama


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are too small to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_keys_are_all_different_and_records_are_spelled_out():
    keys, values = dictionary.draw(np.random.default_rng(0), 5000)
    assert len({tuple(key) for key in keys.tolist()}) == 5000
    assert {*keys.flatten().tolist()} == {*values.flatten().tolist()} == {*range(dictionary.SYMBOLS)}
    ids = dictionary.spell(K, keys[:2], values[:2]).tolist()
    (k, other), (v, another) = keys[:2].tolist(), values[:2].tolist()
    assert ids == [K, *k, V, *v, K, *other, V, *another]


def test_logits_of_values_are_those_before_them():
    positions = torch.arange(2 * RECORD).view(1, -1, 1)
    assert dictionary.of_values(positions).flatten().tolist() == [5, 6, 13, 14]
    ids = dictionary.spell(Q, *dictionary.draw(np.random.default_rng(0), 2))
    assert ids[5] == V == ids[13]


@pytest.mark.parametrize("most", [1, 0])
def test_the_loss_is_that_of_reading_records_and_then_questions(most):
    """d = 1 and plain: what is seen in training is what is seen when a dictionary of one window has been read."""
    torch.manual_seed(0)
    model, n = dictionary.new_model(plain=most == 0), WINDOW // RECORD
    seen = []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    loss, share = dictionary.train_step(model, Stage(3, n, 1, 1), most, np.random.default_rng(0))
    records, questions = seen[0].view(3, 2, WINDOW).unbind(1)
    with torch.no_grad():
        _, cache = model(records, last_context_length=WINDOW)
        logits, _ = model(questions, cache, last_context_length=WINDOW)
    at = torch.arange(WINDOW) % RECORD
    asked = ((at == KEY + 1) | (at == KEY + 2)).nonzero().flatten()
    wanted, logits = questions[:, asked + 1], logits[:, asked]
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), atol=2e-2, rtol=0
    )
    right = (logits.argmax(dim=-1) == wanted).view(-1, VALUE).all(dim=-1).float().mean().item()
    assert share == pytest.approx(right, abs=0.05)
    pairs = [x.view(3, n, RECORD)[..., 1:].tolist() for x in (records, questions)]
    assert [sorted(document) for document in pairs[0]] == [sorted(document) for document in pairs[1]]


def test_no_key_is_in_two_documents_and_few_symbols_make_keys_alike():
    model, keys = dictionary.new_model(plain=False), set()
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: keys.update(map(tuple, inputs[0].tolist())))
    dictionary.train_step(model, Stage(4, 32, 3, 1, symbols=4), 3, np.random.default_rng(0))
    records = torch.tensor([row for row in keys if row[0] == K]).view(-1, RECORD)[:, 1 : KEY + 1]
    assert len({tuple(key) for key in records.tolist()}) == 4 * 32  # no key is in two documents
    assert all(len(set(place)) <= 4 for place in records.T.tolist())


def test_dictionaries_are_asked_and_a_model_that_is_not_trained_knows_nothing():
    torch.manual_seed(0)
    assert dictionary.ask(dictionary.new_model(plain=False), 1024, 0) < 0.02


@pytest.mark.parametrize("kind", ["d = 1", "d = 64"])
def test_trained_models_find_a_record_among_hundreds(kind):
    model = FastLlama.from_pretrained(dictionary.home(dictionary.MODELS, 0, kind))
    assert dictionary.ask(model, 4096, 1) > 0.95


def test_models_that_are_there_are_asked_and_the_table_and_picture_show_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    models, files = tmp_path / "models", [tmp_path / "table.md", tmp_path / "picture.svg"]
    shutil.copytree(dictionary.MODELS / "seed0", models / "seed0")
    plain = dictionary.home(models, 0, "plain")
    shutil.rmtree(plain, ignore_errors=True)
    torch.manual_seed(0)
    save_pretrained(dictionary.new_model(plain=True), plain)  # which knows nothing
    flags = ["--models", models, "--lengths", "512,2k", "--table", files[0], "--picture", files[1]]
    monkeypatch.setattr(sys, "argv", ["dictionary.py", *map(str, flags)])
    dictionary.main()
    rows = capsys.readouterr().out.splitlines()
    assert (
        files[0].read_text().splitlines() == rows and rows[0] == "| | 512 | 2k |" and files[1].stat().st_size > 10_000
    )
    shares = {row.split(" | ")[0][2:]: [float(x.strip("% |")) for x in row.split(" | ")[1:]] for row in rows[2:]}
    assert shares.keys() == dictionary.KINDS.keys()
    assert min(shares["d = 1"]) > 95 and min(shares["d = 64"]) > 95 and max(shares["plain"]) < 2


def test_dictionaries_that_cannot_be_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dictionary.py", "--lengths", "8"])
    with pytest.raises(SystemExit) as stop:
        dictionary.main()
    assert stop.value.code == 2 and "--lengths must be of 256 to 128M tokens" in capsys.readouterr().err
