"""Files of tensors: found where they should be, refused where they are not to be trusted, and written whole or not at all."""

import errno
import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fast.files import as_weights, find_weights, replacing, unread, weight_files, write_safetensors

INDEX = "model.safetensors.index.json"


def test_tensors_of_all_sizes_are_aligned_in_a_file(tmp_path):
    dtypes = {"a": torch.float8_e4m3fn, "b": torch.float32, "c": torch.bool, "d": torch.float16, "e": torch.float64}
    tensors = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    write_safetensors(tmp_path / "file", as_weights(tensors), {"says": "x"})
    raw = (tmp_path / "file").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0 and all(header[name]["data_offsets"][0] % x.itemsize == 0 for name, x in tensors.items())
    loaded = load_file(tmp_path / "file")
    assert all(
        loaded[name].dtype == x.dtype and torch.equal(loaded[name].float(), x.float()) for name, x in tensors.items()
    )
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"says": "x"}


def test_tensors_are_written_in_another_dtype_and_as_they_lie_and_without_gradients(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    tensors = {"turned": x.T, "part": x[:, 1:], "none": torch.ones(0, 3)}
    tensors["weight"] = torch.nn.Parameter(x.clone())
    for dtype in (None, torch.bfloat16):
        write_safetensors(tmp_path / "file", as_weights(tensors), {}, dtype)
        loaded = load_file(tmp_path / "file")
        assert loaded.keys() == tensors.keys()
        for name, right in tensors.items():
            assert (
                torch.equal(loaded[name], right.detach().to(dtype or right.dtype)) and loaded[name].shape == right.shape
            )


def shards(folder: Path, weight_map) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_weights_are_found_in_a_file_or_in_the_shards_of_an_index(tmp_path):
    a, b = {"x": torch.ones(2, 3)}, {"y": torch.ones(4).half(), "layer.rotary_emb.inv_freq": torch.ones(8)}
    save_file(a, tmp_path / "1.safetensors")
    save_file(b, tmp_path / "2.safetensors")
    shards(tmp_path, {"x": "1.safetensors", "y": "2.safetensors", "layer.rotary_emb.inv_freq": "2.safetensors"})
    found = find_weights(tmp_path)
    assert {name: weight[:2] for name, weight in found.items()} == {
        "x": ([2, 3], torch.float32),
        "y": ([4], torch.float16),
    }
    assert all(torch.equal(found[name][2](), x) for name, x in {"x": a["x"], "y": b["y"]}.items())
    save_file({"x": torch.zeros(5)}, tmp_path / "model.safetensors")  # an index beside a whole file is an old one
    assert [weight[0] for weight in find_weights(tmp_path).values()] == [[5]]


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["b"]}},
        {"weight_map": None},
        {"weight_map": {"a": 2**70}},
        {"weight_map": {"a": float("nan")}},
        3,
    ],
    ids=str,
)
def test_an_index_that_names_no_files_is_refused(index, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json is broken"):
        find_weights(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"], ids=lambda text: text[:1])
def test_an_index_that_is_no_json_or_nested_too_deep_is_refused(text, tmp_path):
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="index.json is broken"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/stolen.safetensors", "a/stolen.safetensors"])
def test_an_index_that_names_a_file_outside_of_its_folder_is_not_followed(name, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "a").mkdir()
    for place in (tmp_path, folder, folder / "a"):
        save_file({"x": torch.ones(2)}, place / "stolen.safetensors")
    shards(folder, {"x": name})
    with pytest.raises(ValueError, match=f"{INDEX} names a file outside of its folder"):
        weight_files(folder, "model.safetensors")
    with pytest.raises(ValueError, match="outside"):
        find_weights(folder)


@pytest.mark.parametrize(
    "weight_map",
    [{"x": "1", "y": "1"}, {"x": "2", "y": "1"}, {"x": "1", "y": "2", "z": "2"}, {"x": "1"}, {"y": "2"}],
    ids=str,
)
def test_shards_that_hold_not_what_their_index_names_are_refused(weight_map, tmp_path):
    for shard, name in ("1", "x"), ("2", "y"):
        save_file({name: torch.ones(2)}, tmp_path / f"{shard}.safetensors")
    if len(weight_map) == 1:  # a shard has a tensor more
        save_file({"x": torch.ones(2), "y": torch.ones(2)}, tmp_path / f"{next(iter(weight_map.values()))}.safetensors")
    shards(tmp_path, {name: f"{shard}.safetensors" for name, shard in weight_map.items()})
    with pytest.raises(ValueError, match=r"safetensors has not the tensors that its index names, see \['[xyz]'"):
        find_weights(tmp_path)


def test_shards_are_found_without_an_index_when_all_are_there(tmp_path):
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, tensor in zip(names, "xyz"):
        save_file({tensor: torch.ones(2)}, tmp_path / name)
    assert find_weights(tmp_path).keys() == {*"xyz"}
    (tmp_path / names[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{names[1]} is missing"):
        find_weights(tmp_path)
    save_file({"z": torch.zeros(2)}, tmp_path / names[1])
    with pytest.raises(
        ValueError, match=r"model-00003-of-00003.safetensors has tensors that another shard has too, see \['z'\]"
    ):
        find_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="has shards of 00002 and of 00003"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    "names, left",
    [
        (["model.safetensors"], []),
        (["model.safetensors", "memory.safetensors", "pytorch_model.bin", "book.txt"], []),
        (["model.safetensors", "model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"]),
        (["model-00001-of-00001.safetensors", "adapter_model.safetensors"], ["adapter_model.safetensors"]),
    ],
)
def test_files_of_weights_that_are_no_part_of_the_model_are_found(names, left, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert unread(tmp_path) == left


@pytest.mark.parametrize(
    "start, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer, .*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><head>", "is a web page"), (b"<HTML>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file"), (b"\x1f\x8b\x08\0", "is packed by gzip"), (b"what", "is broken or cut short"),
    ],
)  # fmt: skip
def test_what_lies_under_the_name_of_a_file_of_weights_is_told(start, said, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match=f"model.safetensors {said}"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    "value, stored, dtype",
    [
        (90_000.0, torch.float32, torch.float16), (-1e38, torch.bfloat16, torch.float16), (1e39, torch.float64, torch.float32),
        (3.4e38, torch.float32, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_a_dtype_cannot_hold_are_refused_by_name_and_leave_nothing(value, stored, dtype, tmp_path):
    tensors = {"fine": torch.ones(3, dtype=stored), "large": torch.tensor([1, value], dtype=stored)}
    with pytest.raises(ValueError, match=f"large has numbers too large for {dtype}: choose --dtype"):
        write_safetensors(tmp_path / "file", as_weights(tensors), {}, dtype)
    assert list(tmp_path.iterdir()) == []


def test_infinity_that_was_there_stays(tmp_path):
    there = torch.tensor([1, torch.inf, -torch.inf, torch.nan])
    write_safetensors(tmp_path / "file", as_weights({"x": there}), {}, torch.float16)
    assert torch.equal(load_file(tmp_path / "file")["x"].float().nan_to_num(7), there.nan_to_num(7))


def test_weights_that_are_missing_or_cut_short_or_of_whole_numbers_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} is missing"):
        find_weights(tmp_path)
    save_file({"weight": torch.ones(20).to(torch.int8)}, path)
    with pytest.raises(ValueError, match="weight is I8"):
        find_weights(tmp_path)
    save_file({"weight": torch.ones(20)}, path)
    whole = path.read_bytes()
    for broken in (whole[:-9], whole[:10], b"", b"\0" * 100, b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is broken or cut short"):
            find_weights(tmp_path)


STOPS = [KeyboardInterrupt(), ZeroDivisionError(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", STOPS, ids=repr)
def test_what_is_interrupted_leaves_what_there_was(error, there, tmp_path):
    path, written = tmp_path / "file", []
    if there:
        path.write_text("before")

    def read() -> Tensor:
        written.append([x for x in tmp_path.iterdir() if x != path])
        if len(written) == 3:
            raise error
        return torch.ones(1000)

    with pytest.raises(type(error)) as raised:
        write_safetensors(path, {name: ([1000], torch.float32, read) for name in "abcd"}, {})
    assert not isinstance(error, OSError) or str(raised.value) == f"{path} cannot be written: {error.strerror}"
    assert len(written) == 3 and len(written[2]) == 1 and written[2][0].name.startswith(".")  # was being written
    assert list(tmp_path.iterdir()) == [path] * there and (not there or path.read_text() == "before")


def test_a_disk_that_is_full_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs a device that is always full")
    with (
        pytest.raises(OSError, match="file cannot be written: No space left"),
        replacing(tmp_path / "file") as unfinished,
    ):
        unfinished.symlink_to(full)
        unfinished.write_bytes(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_something_else_that_is_read_meanwhile_is_that_ones_own(tmp_path):
    def read() -> Tensor:
        return torch.load(tmp_path / "weights")

    with pytest.raises(FileNotFoundError) as raised:
        write_safetensors(tmp_path / "file", {"a": ([3], torch.float32, read)}, {})
    assert raised.value.filename == str(tmp_path / "weights") and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_nothing_is_replaced_but_the_file_that_is_meant(tmp_path):
    pipe, link, target, notes = (tmp_path / name for name in ("pipe", "link", "target", "target.part"))
    weights = as_weights({"x": torch.ones(3)})
    os.mkfifo(pipe)
    link.symlink_to(target)
    notes.write_text("mine")
    for path in (pipe, tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            write_safetensors(path, weights, {})
    assert pipe.is_fifo() and stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    for _ in range(2):  # makes it, and replaces it
        write_safetensors(link, weights, {})
        assert link.is_symlink() and not target.is_symlink() and load_file(target).keys() == {"x"}
    assert notes.read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


def test_a_written_file_is_as_readable_as_other_files(tmp_path):
    weights = as_weights({"x": torch.ones(3)})
    with pytest.raises(OSError, match="missing"):
        write_safetensors(tmp_path / "missing" / "file", weights, {})
    write_safetensors(tmp_path / "file", weights, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
