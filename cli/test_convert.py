"""convert.py: every layout of released checkpoints, to ours and back; nothing half done, and nothing run that is in a file."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import convert
from cli.loading import TINY
from cli.test_ending import ROOT, one_line, run_main
from fast import FastConfig, FastLlama
from fast.test_model import small_model
from longllama import LongLlama, LongLlamaConfig

TESTDATA = ROOT / "testdata"


def run_convert(*args) -> int:
    return run_main(convert.main, *args)


def hf_llama(folder: Path, **changes) -> LlamaForCausalLM:
    """A random LlamaForCausalLM, saved into folder as transformers saves it."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with contextlib.redirect_stderr(io.StringIO()):  # it shows progress there
        model.save_pretrained(folder)
    return model


def as_released(folder: Path, layout: str):
    """Turns what transformers saved into a layout of the released checkpoints, rotary tables included."""
    source = {}
    for path in sorted(folder.glob("*.safetensors")):
        source |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    source |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    names, kind = sorted(source), layout.split("_")[0]
    parts = [names[::2], names[1::2]] if layout.endswith("sharded") else [names]
    stem, save = ("pytorch_model", lambda x, path: torch.save(x, path)) if kind == "bin" else ("model", save_file)
    files = [
        f"{stem}-{i + 1:05}-of-{len(parts):05}.{kind}" if len(parts) > 1 else f"{stem}.{kind}"
        for i in range(len(parts))
    ]
    for part, file in zip(parts, files):
        save({name: source[name] for name in part}, folder / file)
    if len(parts) > 1:
        index = {"weight_map": {name: file for part, file in zip(parts, files) for name in part}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


class AtTheThirdTensor(TorchDispatchMode):
    """Does something as the third tensor is about to be written: looks around, or raises."""

    def __init__(self, do):
        super().__init__()
        self.do, self.written = do, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.view.dtype:  # as bytes
            self.written += 1
            if self.written == 3:
                self.do()
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["safetensors", "safetensors_sharded", "bin", "bin_sharded"])
def test_every_released_layout_converts_and_goes_back_to_transformers(layout, tmp_path, capsys):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    reference = hf_llama(theirs, num_key_value_heads=2)
    as_released(theirs, layout)
    settings = {"mem_layers": [1], "last_context_length": 12, "mem_dtype": "float32"}
    config = json.loads((theirs / "config.json").read_text()) | settings
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    assert run_convert("--input", theirs, "--output", ours) == 0
    assert sorted(p.name for p in ours.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (ours / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    ids = torch.randint(97, (1, 40))
    for kind in (FastLlama, LongLlama):
        model = kind.from_pretrained(ours)
        assert (model.config.mem_layers, model.config.last_context_length) == ((1,), 12)
        assert (model(ids, last_context_length=40)[0] - reference(ids).logits).abs().max() < 1e-4

    assert run_convert("--input", ours, "--output", back, "--to-hf", "--dtype", "bfloat16") == 0
    again = LlamaForCausalLM.from_pretrained(back)
    right = {name: x.to(torch.bfloat16) for name, x in reference.state_dict().items()}
    assert again.dtype == torch.bfloat16 and all(torch.equal(x, right[name]) for name, x in again.state_dict().items())
    assert FastConfig.from_json(back / "config.json") == FastConfig.from_json(ours / "config.json")
    assert LongLlamaConfig.from_json(back / "config.json") == model.config
    assert capsys.readouterr().out == ""


def test_a_whole_file_is_read_where_an_old_index_lies_beside_it(tmp_path):
    """As transformers does: the index is what is left of an earlier, sharded model."""
    hf_llama(tmp_path / "old")
    as_released(tmp_path / "old", "safetensors_sharded")
    new = FastLlama(FastConfig.from_json(tmp_path / "old" / "config.json"))
    convert.save_pretrained(new, tmp_path / "old")
    read = FastLlama.from_pretrained(tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), new.parameters()))
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "old").lm_head.weight, read.lm_head.weight)
    assert run_convert("--input", tmp_path / "old", "--output", tmp_path / "ours") == 0
    assert torch.equal(FastLlama.from_pretrained(tmp_path / "ours").lm_head.weight, read.lm_head.weight)


def test_a_saved_model_comes_back_the_same(tmp_path):
    for dtype, changes in (torch.float32, {}), (torch.float64, {"tie_word_embeddings": True, "num_key_value_heads": 2}):
        model = small_model(**changes).to(dtype)
        convert.save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
        again = FastLlama.from_pretrained(tmp_path, dtype=dtype)
        assert again.config == model.config and not again.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --------------------------------------------------------------------------------------------- Whole or not at all


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    hf_llama(tmp_path / "theirs")
    seen = []

    def fail():
        seen.extend(p.name for p in tmp_path.iterdir() if p.name != "theirs")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), AtTheThirdTensor(fail):
        run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert len(seen) == 1 and seen[0].startswith(".ours.") and seen[0].endswith(".part")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("before", [None, "another model"])
def test_an_interrupted_conversion_leaves_what_there_was(before, tmp_path, capsys):
    def interrupt():
        raise KeyboardInterrupt

    ours, files = tmp_path / "ours", {}
    if before:
        convert.save_pretrained(small_model(), ours)
        files = {path.name: path.read_bytes() for path in ours.iterdir()}
    with AtTheThirdTensor(interrupt) as mode:
        assert run_convert("--input", TESTDATA, "--output", ours, "--force") == 130
    assert mode.written == 3 and capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [ours] * bool(before)
    assert not before or {path.name: path.read_bytes() for path in ours.iterdir()} == files


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, capsys):
    def full():
        raise OSError(28, "No space left on device")

    with AtTheThirdTensor(full):
        assert run_convert("--input", TESTDATA, "--output", tmp_path / "ours") == 2
    assert "cannot be written: No space left on device" in one_line(capsys) and not list(tmp_path.iterdir())


def test_conversion_writes_on_the_disk_that_its_output_is_on(tmp_path):
    """An existing folder may be a disk of its own, onto which no file can be moved from beside it."""
    hf_llama(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    seen = []

    def look():
        seen.extend(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))

    with AtTheThirdTensor(look):
        assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0
    made = [name for name in seen if not name.startswith("theirs") and name != "ours"]
    assert made and all(name.startswith("ours/") for name in made)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.model"])
def test_the_config_which_makes_a_folder_a_model_is_written_last(file, tmp_path, capsys):
    """Where another file cannot be put there, there is no config either."""
    convert.save_pretrained(small_model(), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (tmp_path / "b" / file / "a folder in its place").mkdir(parents=True)
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b", "--force") == 2
    assert file in one_line(capsys)
    assert not (tmp_path / "b" / "config.json").exists()


def test_conversion_refuses_a_folder_in_use_unless_forced(tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "diary.txt").write_text("dear diary")
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert "--force" in one_line(capsys) and len(list((tmp_path / "ours").iterdir())) == 1
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--force") == 0
    assert (tmp_path / "ours" / "diary.txt").read_text() == "dear diary"
    tokenizer = tmp_path / "ours" / "tokenizer.model"
    tokenizer.write_bytes((TINY / "tokenizer.model").read_bytes())  # of another model: this one came without
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--force") == 0
    assert not tokenizer.exists()


# -------------------------------------------------------------------------------------------------- What is refused


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


@pytest.mark.parametrize(
    "damage",
    [
        "code", "cut", "empty", "text", "no_dictionary", "no_names", "sparse", "shard_outside", "broken_index", "missing",
        "no_config", "same_folder", "wrong_config", "other_kind",
    ],
)  # fmt: skip
def test_conversion_refuses_bad_input_in_one_line(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf_llama(theirs)
    as_released(theirs, "bin_sharded" if damage in ("shard_outside", "broken_index") else "bin")
    weights, index = theirs / "pytorch_model.bin", theirs / "pytorch_model.bin.index.json"
    raw = json.loads((theirs / "config.json").read_text())
    if damage == "code":
        torch.save({"model.norm.weight": Exploit()}, weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage in ("empty", "text"):
        weights.write_text("" if damage == "empty" else "version https://git-lfs.github.com/spec/v1")
    elif damage == "no_dictionary":
        torch.save([1, 2], weights)
    elif damage == "no_names":
        torch.save({1: torch.ones(2)}, weights)
    elif damage == "sparse":
        torch.save({"model.norm.weight": torch.ones(2).to_sparse()}, weights)
    elif damage == "shard_outside":
        index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    elif damage == "broken_index":
        index.write_text("{")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_config":
        (theirs / "config.json").unlink()
    elif damage == "wrong_config":
        (theirs / "config.json").write_text(json.dumps(raw | {"intermediate_size": 81}))
    elif damage == "other_kind":
        (theirs / "config.json").write_text(json.dumps(raw | {"model_type": "mistral"}))
    assert run_convert("--input", theirs, "--output", theirs if damage == "same_folder" else ours) == 2
    said = one_line(capsys)
    assert said.startswith("convert.py: error: ") and "weights_only" not in said
    assert not ours.exists() and not Path("exploited").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_the_exploit_that_is_refused_would_have_worked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Exploit()}, "weights")
    torch.load("weights", weights_only=False)
    assert Path("exploited").exists()


@pytest.mark.parametrize("kind", ["sparse", "meta", "whole"])
def test_one_bad_tensor_among_all_is_refused(kind, tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    tensors = torch.load(file)
    x = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = {"sparse": x.to_sparse, "whole": x.int, "meta": lambda: x.to("meta")}[kind]()
    torch.save(tensors, file)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert "is not a dictionary of tensors" in one_line(capsys) and not (tmp_path / "ours").exists()


def test_bin_files_of_before_torch_1_6_are_read(tmp_path):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    tensors = torch.load(file)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(x, tensors[name]) for name, x in ours.items()) and len(ours) == 3 + 3 * 9


def test_tied_weights_may_come_with_a_copy_which_is_not_converted(tmp_path):
    model = small_model(tie_word_embeddings=True)
    convert.save_pretrained(model, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    again = FastLlama.from_pretrained(tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_conversion_keeps_the_dtype_and_makes_the_folders(dtype, tmp_path, capsys):
    new = tmp_path / "new" / "folder"
    model = small_model().to(getattr(torch, dtype))
    convert.save_pretrained(model, tmp_path / "a")
    assert run_convert("--input", tmp_path / "a", "--output", new) == 0
    assert "has no tokenizer.model" in capsys.readouterr().err
    with safe_open(new / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in model.hf_tensors()} == {getattr(torch, dtype)}
        assert file.metadata() == {"format": "pt"}  # which transformers wants
    raw = json.loads((new / "config.json").read_text())
    assert (raw["torch_dtype"], raw["model_type"], raw["hidden_act"]) == (dtype, "longllama", "silu")


def test_conversion_is_refused_onto_its_input_and_onto_a_file_also_if_forced(tmp_path, capsys):
    convert.save_pretrained(small_model(), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    for source, target, said in (
        ("a", "link", "is the --input folder"), ("a", "file", "is a file: name a folder"), ("none", "b", "is not a folder"),
    ):  # fmt: skip
        assert run_convert("--input", tmp_path / source, "--output", tmp_path / target, "--force") == 2
        assert said in one_line(capsys)
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("flags", [[], ["--input", "a"], ["--input", "a", "--output", "b", "--dtype", "int8"]], ids=str)
def test_mistakes_in_flags_get_one_line_and_status_2(flags, capsys):
    assert run_convert(*flags) == 2
    assert one_line(capsys).startswith("convert.py: error: ")


def test_settings_of_memory_go_to_transformers_and_come_back(tmp_path):
    model = small_model(
        mem_topk=7, mem_device="cpu", mem_dtype="float8_e4m3fn", mem_attention_grouping=(1, 2), keep_local=3
    )
    convert.save_pretrained(model, tmp_path / "a")
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "hf", "--to-hf") == 0
    assert run_convert("--input", tmp_path / "hf", "--output", tmp_path / "b") == 0
    for folder in ("hf", "b"):
        assert FastConfig.from_json(tmp_path / folder / "config.json") == model.config
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
