"""convert.py: every layout of released checkpoints, to ours and back; nothing half done, and nothing run that is in a file."""

import contextlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import convert
from cli.loading import TINY, load
from cli.test_ending import ROOT, one_line, run_main
from cli.test_json_tokenizer import write_tokenizer
from cli.test_tokenizer import PATHS as TOKENIZERS
from cli.test_tokenizer import TEXTS
from fast import FastConfig, FastLlama
from fast.test_gguf import random_llama, whole
from fast.test_model import small_model
from longllama import LongLlama, LongLlamaConfig, rope_table
from tokenizer import Tokenizer

TESTDATA, CPU = ROOT / "testdata", torch.device("cpu")


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


def llama_3_2(
    folder: Path, release: int = 4, bos: int = 90, ends=(91, 92, 93), **sizes
) -> tuple[LlamaForCausalLM, dict]:
    """A random LLaMA, saved in the form of Llama 3.2 but for the sizes, and how its angles are scaled. release: config.json
    as it was released, for transformers 4, or as transformers 5 writes it again."""
    scaling = {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    settings = {"head_dim": 32, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05}
    settings |= {"tie_word_embeddings": True, "bos_token_id": bos, "eos_token_id": [*ends], "pad_token_id": None}
    reference = hf_llama(folder, rope_parameters=scaling | {"rope_theta": 500000.0}, **settings | sizes)
    if release == 4:
        raw = json.loads((folder / "config.json").read_text())
        del raw["rope_parameters"]
        raw |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32", "pretraining_tp": 1}
        (folder / "config.json").write_text(json.dumps(raw))
    generation = {"bos_token_id": bos, "do_sample": True, "eos_token_id": [ends[0], ends[-1]]}
    generation |= {"temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return reference, scaling


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
        index = {"metadata": {}, "weight_map": {name: file for part, file in zip(parts, files) for name in part}}
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
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    assert sorted(p.name for p in ours.iterdir()) == files
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
        seen.extend(p.name for p in (tmp_path / "new" / "ours").iterdir())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), AtTheThirdTensor(fail):
        run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "new" / "ours")
    assert len(seen) == 1 and seen[0].startswith(".") and seen[0].endswith(".part")
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
    left = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert left == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.model", "tokenizer.json"])
def test_a_folder_where_a_file_belongs_is_named_and_nothing_is_changed(file, tmp_path, capsys):
    convert.save_pretrained(small_model(vocab_size=2048), tmp_path / "a", TINY / "tokenizer.model")
    (tmp_path / "b" / file / "a folder in its place").mkdir(parents=True)
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b", "--force") == 2
    assert file in one_line(capsys)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [file]


def test_a_converted_model_is_not_mixed_with_what_was_there(tmp_path):
    hf_llama(tmp_path / "old")
    as_released(tmp_path / "old", "bin_sharded")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "diary.txt",
    ):
        (tmp_path / "old" / name).write_text("{}")
    convert.save_pretrained(small_model(), tmp_path / "new")
    assert run_convert("--input", tmp_path / "new", "--output", tmp_path / "old", "--force") == 0
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == [
        "config.json",
        "diary.txt",
        "model.safetensors",
    ]


def test_a_model_saved_over_another_takes_its_tokenizer_with_it_or_leaves_the_one_there(tmp_path):
    tokenizer = (TINY / "tokenizer.model").read_bytes()
    hf_llama(tmp_path)
    for given in (TINY / "tokenizer.model", None, tmp_path / "tokenizer.model"):
        convert.save_pretrained(small_model(), tmp_path, given)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.model",
        ]
        assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer


def test_an_unfinished_folder_is_refused_and_says_where_the_former_model_is(tmp_path, capsys):
    """As a kill leaves it when the new files are being moved in; fast/test_folder.py kills at every step."""
    folder = tmp_path / "model"
    convert.save_pretrained(small_model(), folder / ".before.part")
    for args in (["--input", folder, "--output", tmp_path / "b"],):
        assert run_convert(*args) == 2
        assert f"is unfinished, since writing a model was interrupted: the former one is whole in {folder}" in one_line(
            capsys
        )
    with pytest.raises(ValueError, match="is unfinished"):
        FastLlama.from_pretrained(folder)
    with pytest.raises(ValueError, match="is unfinished"):
        load(folder, torch.device("cpu"))


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
        (theirs / "config.json").write_text(json.dumps(raw | {"model_type": "qwen2"}))
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


ODD = {
    "sparse": Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "whole numbers": Tensor.int,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "negated when read": lambda x: torch.complex(x, x).conj().imag,
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "one number, many times": lambda x: x[:1].expand(len(x)),
    "numpy": Tensor.numpy,
    "a list": lambda x: [x],
    "nothing": lambda x: None,
}


@pytest.mark.filterwarnings("ignore")  # torch warns as it makes some of them
@pytest.mark.parametrize("kind", ODD)
def test_one_bad_tensor_among_all_is_refused(kind, tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    tensors = torch.load(file)
    tensors["model.norm.weight"] = ODD[kind](tensors["model.norm.weight"])
    torch.save(tensors, file)
    capsys.readouterr()
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    said = "holds more than tensors" if kind == "numpy" else "is not a dictionary of tensors"
    assert said in one_line(capsys) and not (tmp_path / "ours").exists()


def test_parameters_and_matrices_that_lie_turned_are_read(tmp_path):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    right = torch.load(file)
    tensors = {name: torch.nn.Parameter(x.T.contiguous().T if x.dim() == 2 else x) for name, x in right.items()}
    torch.save(tensors, file)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(x, right[name]) for name, x in ours.items())


class Claims:
    """A tensor of a size and strides that its storage has not."""

    def __init__(self, size: tuple, strides: tuple):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        self.claim = storage, 0, size, strides, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.claim


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size", [(1000,), (2**48,), (2**70,), (-2,)])
def test_a_tensor_that_claims_more_than_is_stored_is_refused(size, zipped, tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    file = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save({"model.norm.weight": Claims(size, (1,))}, file, _use_new_zipfile_serialization=zipped)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert one_line(capsys) and not (tmp_path / "ours").exists()


def zip_again(path: Path, compression: int = zipfile.ZIP_STORED, change=None, more: bytes = b""):
    """Packs a zip file again. change: of the bytes that it then has."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in (members | {f"{path.stem}/more": more}).items():
            new.writestr(name, data)
    path.write_bytes((change or bytes)(path.read_bytes()))


def encrypted(data: bytes) -> bytes:
    at = data.index(b"PK\1\2")  # of the first member in the directory: its flags are 8 bytes on
    return data[: at + 8] + bytes([data[at + 8] | 1]) + data[at + 9 :]


def overlapping(data: bytes) -> bytes:
    """The first member is listed twice."""
    first, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    entry = data[first : data.index(b"PK\1\2", first + 1)]
    size = (end - first + len(entry)).to_bytes(4, "little")
    return data[:end] + entry + data[end : end + 12] + size + data[end + 16 :]


@pytest.mark.parametrize(
    "how, said",
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"compression": zipfile.ZIP_DEFLATED, "more": bytes(1 << 24)}, "is compressed"),
        ({"compression": zipfile.ZIP_BZIP2}, "is compressed"),
        ({"compression": zipfile.ZIP_LZMA}, "is compressed"),
        ({"change": overlapping}, "is compressed"),
        ({"change": encrypted}, "is broken"),
        ({"change": lambda data: data[:-30]}, "is broken"),
        ({"change": lambda data: data.replace(b"data.pkl", b"date.pkl", 1)}, "is broken"),
    ],
)  # fmt: skip
def test_archives_whose_members_are_not_bytes_of_their_own_are_refused(how, said, tmp_path, capsys):
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    zip_again(file, **how)
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 2
    assert f"pytorch_model.bin {said}" in one_line(capsys) and not (tmp_path / "ours").exists()


def test_an_archive_that_is_packed_again_without_compression_is_read(tmp_path):
    """So that the refusals above are of what was changed."""
    hf_llama(tmp_path / "theirs")
    as_released(tmp_path / "theirs", "bin")
    right = torch.load(tmp_path / "theirs" / "pytorch_model.bin")
    zip_again(tmp_path / "theirs" / "pytorch_model.bin")
    assert run_convert("--input", tmp_path / "theirs", "--output", tmp_path / "ours") == 0
    assert all(torch.equal(x, right[name]) for name, x in load_file(tmp_path / "ours" / "model.safetensors").items())


@pytest.mark.parametrize("layout", ["safetensors_sharded", "bin_sharded"])
def test_shards_without_an_index_are_read_and_one_that_is_lost_is_named(layout, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    right = hf_llama(theirs).state_dict()
    as_released(theirs, layout)
    next(theirs.glob("*.index.json")).unlink()
    assert run_convert("--input", theirs, "--output", tmp_path / "ours") == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in ours.items())
    lost = next(theirs.glob("*-00001-of-00002.*"))
    lost.unlink()
    capsys.readouterr()
    assert run_convert("--input", theirs, "--output", tmp_path / "b") == 2
    assert f"{lost.name} is missing" in one_line(capsys)


@pytest.mark.parametrize(
    "files, said",
    [
        ({"adapter_config.json": "{}"}, "holds an adapter"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "Meta's own layout"),
        ({"model.gguf": "GGUF"}, "GGUF"),
        ({"config.json": "{}", "tokenizer.model": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"config.json": "{}", "tokenizer.model": "<html>"}, "a web page"),
        ({"config.json": "{}", "tokenizer.model": "IQ== 0\n"}, "tiktoken's, as Llama 3 has it"),
        ({"config.json": "{}"}, "has no tokenizer.model and no tokenizer.json"),
        ({"config.json": "{}", "tokenizer.json": "{}"}, "is no tokenizer.json that can be read"),
        ({"config.json": "\ufeff{}"}, "byte-order mark"),
        ({}, "has no config.json"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_of_ours_is_told_by_what_it_holds_when_it_is_loaded(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((OSError, ValueError)) as raised:
        load(tmp_path, torch.device("cpu"))
    assert said in str(raised.value)


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


@torch.no_grad()
@pytest.mark.parametrize("layout", ["safetensors", "safetensors_sharded", "bin", "bin_sharded"])
@pytest.mark.parametrize("case", ["different", "equal", "head only"])
def test_tied_weights_are_what_transformers_takes_them_for(case, layout, tmp_path, capsys):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    hf_llama(theirs)
    tensors = load_file(theirs / "model.safetensors")
    if case != "different":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if case == "head only":
        del tensors["model.embed_tokens.weight"]
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    as_released(theirs, layout)
    ids = torch.randint(97, (1, 30))
    right = LlamaForCausalLM.from_pretrained(theirs)(ids).logits
    capsys.readouterr()
    assert run_convert("--input", theirs, "--output", ours) == 0
    warned = "config.json ties lm_head.weight to model.embed_tokens.weight, and they are two" in capsys.readouterr().err
    assert run_convert("--input", ours, "--output", back, "--to-hf") == 0
    assert warned == (case == "different")
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] != warned
    assert ("lm_head.weight" in load_file(ours / "model.safetensors")) == warned
    for kind, folder in (LongLlama, ours), (FastLlama, ours), *[(FastLlama, theirs)] * layout.startswith("safetensors"):
        assert (kind.from_pretrained(folder)(ids, last_context_length=30)[0] - right).abs().max() < 1e-4
    assert (LlamaForCausalLM.from_pretrained(back)(ids).logits - right).abs().max() < 1e-4


def test_loading_warns_of_matrices_that_are_not_tied_and_of_files_that_are_not_read(tmp_path, capsys):
    convert.save_pretrained(small_model(vocab_size=2048), tmp_path, TINY / "tokenizer.model")
    load(tmp_path, torch.device("cpu"))
    assert capsys.readouterr().err == ""
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    model, _ = load(tmp_path, torch.device("cpu"))
    said = capsys.readouterr().err
    assert "two different matrices: both are used" in said and not model.config.tie_word_embeddings
    assert "model-00001-of-00002.safetensors is no part of the weights" in said and said.count("warning: ") == 2


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


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "bos_token": None,
    "model_max_length": 2048,
}
BESIDE = {
    "generation_config.json": json.dumps({"eos_token_id": 2, "temperature": 0.6, "bos_token_id": 1}, indent=2) + "\n",
    "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG),
    "special_tokens_map.json": json.dumps({"bos_token": "<s>"}),
    "added_tokens.json": json.dumps({"<pad>": 2048}),
    "chat_template.json": json.dumps({"chat_template": "x"}),
    "chat_template.jinja": "{{ é }}",
}


def folder_with(folder: Path, files: dict[str, str]) -> Path:
    convert.save_pretrained(small_model(vocab_size=2048), folder, TINY / "tokenizer.model")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_small_files_that_go_with_a_model_come_along_both_ways(tmp_path):
    a = folder_with(tmp_path / "a", BESIDE)
    assert run_convert("--input", a, "--output", tmp_path / "b") == 0
    assert run_convert("--input", tmp_path / "b", "--output", tmp_path / "c", "--to-hf") == 0
    for name, text in BESIDE.items():
        assert (tmp_path / "b" / name).read_text(encoding="utf-8") == text
        assert name == "tokenizer_config.json" or (tmp_path / "c" / name).read_text(encoding="utf-8") == text
    kept = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert (kept["model_max_length"], kept["bos_token"], kept["add_bos_token"]) == (2048, "<s>", True)


@pytest.mark.parametrize(
    "text", ["{", "[]", "\ufeff{}", "[" * 100_000, '{"a": "' + "x" * (1 << 24) + '"}'], ids=lambda x: x[:2]
)
def test_a_small_file_that_is_not_sound_is_left_out_with_a_warning(text, tmp_path, capsys):
    a = folder_with(tmp_path / "a", {"added_tokens.json": text, "special_tokens_map.json": "{}"})
    (a / "chat_template.jinja").write_bytes(b"\xff")
    assert run_convert("--input", a, "--output", tmp_path / "b") == 0
    said = capsys.readouterr().err
    assert said.count("is left out: ") == 2 and "added_tokens.json is" in said and "chat_template.jinja is" in said
    names = ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.model"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names


@pytest.mark.parametrize(
    "config",
    [
        None, {}, TOKENIZER_CONFIG, {"tokenizer_class": "CodeLlamaTokenizer", "add_eos_token": True, "bos_token": "</s>"},
        {"legacy": None}, {"legacy": False, "add_prefix_space": True, "tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "", "pad_token": "<pad>"},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "eos_token": {"content": "", "special": True}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.stem)
def test_transformers_makes_our_ids_of_a_folder_that_went_back(path, config, tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    tokenizer = Tokenizer(path)
    convert.save_pretrained(small_model(vocab_size=tokenizer.vocab_size), tmp_path / "a", path)
    if config is not None:
        (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    if config != {}:
        special = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
        (tmp_path / "a" / "special_tokens_map.json").write_text(json.dumps(special))
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b", "--to-hf") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in [text for text in TEXTS if "<s>" not in text] + ["def f(x):\n    return x\n", " one", "a\tb", "a    b"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) <= tokenizer.vocab_size


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}], ids=str)
@pytest.mark.parametrize("kind, start", [("bytes", True), ("bytes", False), ("spaces", True), ("metaspace", True)])
def test_a_tokenizer_json_comes_along_both_ways_and_transformers_makes_our_ids_of_it(kind, start, config, tmp_path):
    files = write_tokenizer(tmp_path / "from", kind, start, chat_template="x", **config)
    tokenizer = Tokenizer(files)
    convert.save_pretrained(small_model(vocab_size=tokenizer.vocab_size), tmp_path / "a", files)
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert run_convert("--input", tmp_path / "b", "--output", tmp_path / "c", "--to-hf") == 0
    for folder in "abc":
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == files.read_bytes()
        kept = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert (
            kept["chat_template"] == "x" and Tokenizer(tmp_path / folder / "tokenizer.json").eos_id == tokenizer.eos_id
        )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    for text in [*(text for text in TEXTS if "<s>" not in text), " one", "a\tb", "a    b"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    assert theirs.eos_token_id == tokenizer.eos_id
    convert.save_pretrained(small_model(vocab_size=tokenizer.vocab_size), tmp_path / "b")  # over it: its own stays
    assert Tokenizer(tmp_path / "b" / "tokenizer.json").eos_id == tokenizer.eos_id


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\n", "IQ== 0\nIg== 1\n"])
def test_a_tokenizer_that_is_none_is_refused_before_anything_is_written(text, tmp_path, capsys):
    a = folder_with(tmp_path / "a", {"tokenizer.model": text})
    assert run_convert("--input", a, "--output", tmp_path / "b") == 2
    assert ("git lfs pull" if "git" in text else "Llama 3") in one_line(capsys) and not (tmp_path / "b").exists()


def test_numbers_too_large_for_the_dtype_asked_for_are_refused_and_those_that_are_none_warned_of(tmp_path, capsys):
    model = small_model()
    model.norm.weight.data[2] = 90_000
    model.layers[1].down_proj.weight.data[0, 0] = torch.nan
    convert.save_pretrained(model, tmp_path / "a")
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b", "--dtype", "float16") == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert "error: model.norm.weight has numbers too large" in said and "--dtype bfloat16" in said
    assert not (tmp_path / "b").exists()
    assert run_convert("--input", tmp_path / "a", "--output", tmp_path / "b", "--dtype", "bfloat16") == 0
    assert "model.layers.1.mlp.down_proj.weight has numbers that are not finite" in capsys.readouterr().err


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


@torch.no_grad()
@pytest.mark.parametrize("release", [4, 5])
def test_a_checkpoint_in_the_form_of_llama_3_2_converts_and_goes_back(release, tmp_path, capsys):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    reference, scaling = llama_3_2(theirs, release)
    assert run_convert("--input", theirs, "--output", ours) == 0
    assert run_convert("--input", ours, "--output", back, "--to-hf") == 0
    ids = torch.randint(90, (1, 40))
    for kind, ends in ((FastLlama, (91, 93)), (LongLlama, [91, 93])):
        model = kind.from_pretrained(ours)
        assert (model(ids)[0] - reference(ids).logits).abs().max() < 1e-4
        assert model.config.eos_token_id == ends and model.config.rope_scaling == scaling
    again, config = LlamaForCausalLM.from_pretrained(back), LlamaConfig.from_pretrained(theirs)
    assert torch.equal(again(ids).logits, reference(ids).logits)
    for name in ("rope_parameters", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(again.config, name) == getattr(config, name)
    for start in (0, 8000, 100000):  # cosines: float32 angles of 100,000 are 0.008 apart
        x, at = torch.zeros(1), torch.arange(start, start + 400)[None]
        right = [table[0, :, :16] for table in reference.model.rotary_emb(x, at)]
        table = rope_table(start, 400, model.config, torch.device("cpu"))
        assert all((a - b).abs().max() < 1e-4 + start * 2**-23 for a, b in zip(table, right))


def test_memory_layers_without_positions_are_no_llama_for_transformers(tmp_path, capsys):
    model = small_model(mem_layers=(1,), mem_positionals=False)
    convert.save_pretrained(model, tmp_path / "ours", TINY / "tokenizer.model")
    assert run_convert("--input", tmp_path / "ours", "--output", tmp_path / "hf", "--to-hf") == 2
    assert "mem_positionals false is no LLaMA" in capsys.readouterr().err and not (tmp_path / "hf").exists()


@torch.no_grad()
def test_mem_layers_and_window_put_memory_on_a_plain_llama(tmp_path, capsys):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    hf_llama(tmp_path / "theirs", rope_parameters=scaling | {"rope_theta": 500.0})
    (tmp_path / "theirs" / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    convert_it = ("--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--force")
    assert run_convert(*convert_it, "--mem-layers", 1, 2, "--window", 16) == 0
    err = capsys.readouterr().err
    assert "layers 1, 2 were not trained with a memory" in err
    config = FastConfig.from_json(tmp_path / "ours" / "config.json")
    assert (config.mem_layers, config.max_position_embeddings, config.last_context_length) == ((1, 2), 16, 8)
    assert config.rope_scaling == scaling
    ids = torch.randint(97, (1, 60))
    by_hand = {"mem_layers": (1, 2), "max_position_embeddings": 16, "last_context_length": 8}
    right, cache = LongLlama.from_pretrained(tmp_path / "theirs", **by_hand)(ids)
    assert (cache.local_length, cache.memory_length) == (8, 52)
    assert (FastLlama.from_pretrained(tmp_path / "ours")(ids)[0] - right).abs().max() < 1e-4
    assert run_convert("--input", tmp_path / "ours", "--output", tmp_path / "b", "--mem-layers", 1) == 0
    assert "not trained" not in capsys.readouterr().err  # its config.json says that it has a memory
    assert run_convert(*convert_it, "--window", 65) == 2
    assert "--window 65 is larger than the model's own, 64" in one_line(capsys)
    assert run_convert(*convert_it, "--mem-layers", 3) == 2
    assert "mem_layers (3,) must be of 0 to 2" in capsys.readouterr().err


@torch.no_grad()
def test_a_gguf_file_converts_and_goes_on_to_transformers(tmp_path, capsys, monkeypatch):
    file, ours, back = whole(tmp_path, kind="F16", vocabulary=2048), tmp_path / "ours", tmp_path / "back"
    assert run_convert("--input", file, "--output", ours, "--mem-layers", 1) == 0
    model, tokenizer = load(ours, torch.device("cpu"))
    assert tokenizer.encode("a") == [1, *Tokenizer(ours / "tokenizer.model").sp.encode("a")]
    assert run_convert("--input", file, "--output", back, "--to-hf", "--dtype", "float32") == 0
    ids, right = torch.randint(2048, (1, 40)), random_llama(vocab_size=2048)
    for p in right.parameters():
        p.copy_(p.half())  # as the matrices are stored; norms are 1
    logits = right(ids).logits
    assert (LlamaForCausalLM.from_pretrained(back, dtype=torch.float32)(ids).logits - logits).abs().max() < 1e-4
    assert (model(ids, last_context_length=40)[0] - logits).abs().max() < 1e-4 and model.config.mem_layers == (1,)
    capsys.readouterr()
    assert run_convert("--input", tmp_path, "--output", tmp_path / "c") == 2
    assert "convert.py makes a folder of one, by --input FILE.gguf" in one_line(capsys)
    for package in ("gguf", "sentencepiece.sentencepiece_model_pb2"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert run_convert("--input", file, "--output", tmp_path / "c") == 2
        assert "pip install" in one_line(capsys) and not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------------ Rounded weights


@torch.no_grad()
@pytest.mark.parametrize("kind, size", [("int8", 0.52), ("int4", 0.36)])
def test_rounded_folders_are_read_as_they_are_and_made_whole_again_for_transformers(kind, size, tmp_path, capsys):
    ids, (small, back, again) = torch.randint(2048, (1, 300)), (tmp_path / name for name in ("small", "back", "again"))
    assert run_convert("--input", TINY, "--output", small, "--weights", kind) == 0
    nbytes = (small / "model.safetensors").stat().st_size
    assert nbytes < size * (TINY / "model.safetensors").stat().st_size  # a fifth of the tiny model is its embedding
    (rounded, _), (read_so, _) = load(small, CPU), load(TINY, CPU, weights=kind)
    assert rounded.config.weight_dtype == kind and torch.equal(rounded(ids)[0], read_so(ids)[0])
    assert run_convert("--input", small, "--output", again) == 0
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()

    assert run_convert("--input", small, "--output", back, "--to-hf", "--dtype", "float32") == 0
    theirs = LlamaForCausalLM.from_pretrained(back)
    assert FastConfig.from_json(back / "config.json").weight_dtype is None
    part = ids[:, :100]  # less than a window: plain LLaMA
    right, out = theirs(part).logits, rounded(part, last_context_length=100)[0]
    assert (out - right).norm() < 1e-2 * right.norm()
    assert run_convert("--input", small, "--output", back, "--to-hf", "--force") == 0
    assert LlamaForCausalLM.from_pretrained(back).dtype == torch.bfloat16
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--weights", "int8", "--to-hf"], "--to-hf makes a folder for transformers"),
        (["--weights", "int8", "--dtype", "float16"], "leave out --dtype"),
        (["--weights", "int4"], "rounded to int8 already"),
        (["--weights", "int2"], "invalid choice: 'int2'"),
    ],
)
def test_what_cannot_be_rounded_is_refused_in_one_line(flags, said, tmp_path, capsys):
    assert run_convert("--input", TINY, "--output", tmp_path / "small", "--weights", "int8") == 0
    capsys.readouterr()
    assert run_convert("--input", tmp_path / "small", "--output", tmp_path / "made", *flags) == 2
    assert said in one_line(capsys) and not (tmp_path / "made").exists()


def test_rounded_weights_are_not_saved_from_a_model(tmp_path):
    with pytest.raises(ValueError, match="stored by convert.py --weights"):
        convert.save_pretrained(small_model(weight_dtype="int8"), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_weights_that_are_not_finite_are_told_of_where_they_are_rounded_too(tmp_path, capsys):
    model = small_model()
    with torch.no_grad():
        model.layers[1].o_proj.weight[3, 4] = torch.inf
    convert.save_pretrained(model, tmp_path / "whole", TINY / "tokenizer.model")
    assert run_convert("--input", tmp_path / "whole", "--output", tmp_path / "small", "--weights", "int8") == 0
    assert "model.layers.1.self_attn.o_proj.weight_scale has numbers that are not finite" in capsys.readouterr().err
