"""A memory in a file goes on as if there had been no stop, and is refused by name where it does not fit."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast import FastLlama, FastMemory, load_memory, save_memory
from fast.test_model import small_blocks, small_model
from longllama import Cache, Memory

SAVED = {
    "float32": {}, "bfloat16": {"mem_dtype": "bfloat16"}, "float8": {"mem_dtype": "float8_e4m3fn"}, "topk": {"mem_topk": 5},
    "keep_local": {"keep_local": 6}, "padded_heads": {"hidden_size": 48, "num_key_value_heads": 2},
    "llama": {"mem_layers": (), "max_position_embeddings": 200},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_a_saved_memory_goes_on_as_if_there_had_been_no_stop(name, padded, tmp_path):
    """Saved after every segment: the first in the first window, later ones with memory, full windows, and overflows."""
    model, path = small_model(**SAVED[name]), tmp_path / "memory"
    model.use_memory(small_blocks(20))
    segments = [3, 40, 7, 1, 1, 1, 1, 30, 16, 1]
    ids = torch.randint(61, (2, sum(segments)))
    mask = torch.ones_like(ids)
    mask[0, : 2 * padded] = 0
    cache = resumed = None
    for i, (part, real) in enumerate(zip(ids.split(segments, dim=1), mask.split(segments, dim=1))):
        right, cache = model(part, cache, real)
        logits, resumed = model(part, resumed, real)
        assert (logits - right).abs().max() < 1e-5
        if i == 2:  # all in memory, and no local context
            cache.restart()
            resumed.restart()
        save_memory(path, resumed.fork(), model)
        resumed = load_memory(path, model)
        lengths = [(c.local_length, c.memory_length, c.memory_bytes) for c in (cache, resumed)]
        assert lengths[0] == lengths[1]
        assert resumed.batch_size == 2 or not (resumed.local_length or resumed.memory_bytes)
    assert list(tmp_path.iterdir()) == [path]
    assert len(cache.layers[1].memory.blocks if cache.layers[1].memory else "several") > 2


@torch.no_grad()
def test_a_loaded_memory_is_of_the_kind_that_is_asked_for(tmp_path):
    class OwnMemory(FastMemory):
        pass

    model, ids, path = small_model(), torch.randint(61, (1, 60)), tmp_path / "memory"
    save_memory(path, model(ids[:, :40])[1], model)
    for kind in (None, OwnMemory):
        cache = load_memory(path, model, kind)
        assert type(cache.layers[1].memory) is (kind or FastMemory)
        right = model(ids[:, 40:], model(ids[:, :40])[1])[0]
        assert (model(ids[:, 40:], cache)[0] - right).abs().max() < 1e-5
    model.use_memory(OwnMemory)
    assert type(load_memory(path, model).layers[1].memory) is OwnMemory


class Newest(FastMemory):
    def choose(self, k: Tensor, real: Tensor | None) -> Tensor:
        return torch.arange(k.shape[2])[-5:].expand(*k.shape[:2], -1)


class AllByName(FastMemory):
    """Keeps all so far; who knows about what comes."""

    def choose(self, k: Tensor, real: Tensor | None) -> None:
        return None


class NewestOfTheCore(Memory):
    choose = Newest.choose


class Cut(FastMemory):
    def append(self, k: Tensor, v: Tensor):
        super().append(k, v)
        self.blocks = [tuple(torch.cat(x, dim=2)[:, :, -5:] for x in zip(*self.blocks))]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Newest, AllByName, NewestOfTheCore, Cut, Memory])
def test_a_memory_that_has_not_all_of_its_tokens_or_is_of_another_make_is_not_saved(kind, tmp_path):
    model, path = small_model(), tmp_path / "memory"
    path.write_text("before")
    _, cache = model(torch.randint(61, (1, 40)), model.new_cache(kind))
    with pytest.raises(ValueError, match=f"^{kind.__name__} is not saved: only a memory that keeps all tokens is$"):
        save_memory(path, cache, model)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@torch.no_grad()
def test_a_cache_of_longllama_py_is_not_saved(tmp_path):
    model = small_model()
    _, cache = model(torch.randint(61, (1, 40)), Cache(model.config))
    with pytest.raises(ValueError, match="Memory is not saved"):
        save_memory(tmp_path / "memory", cache, model)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("kind", [Newest, NewestOfTheCore])
def test_a_saved_memory_is_not_loaded_into_one_that_keeps_other_tokens(kind, tmp_path):
    """It would hold what it should have forgotten, in blocks of another form."""
    model, path = small_model(), tmp_path / "memory"
    save_memory(path, model(torch.randint(61, (1, 40)))[1], model)
    model.use_memory(kind)
    with pytest.raises(ValueError, match=kind.__name__):
        load_memory(path, model)


@torch.no_grad()
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped where")
def test_a_saved_memory_is_mapped_and_not_read_until_it_is_used(tmp_path):
    model = small_model()
    save_memory(tmp_path / "memory", model(torch.randint(61, (1, 100)))[1], model)
    loaded = load_memory(tmp_path / "memory", model)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(x, 16) for x in line[0].split("-")] for line in maps if line[-1] == str(tmp_path / "memory")]
    for x in loaded.layers[1].memory.blocks[0]:
        assert any(start <= x.data_ptr() < stop for start, stop in ranges)


@torch.no_grad()
def test_a_memory_of_another_model_or_of_other_settings_is_refused_by_name(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    for changes in (
        {"mem_layers": (1, 3)}, {"mem_dtype": "float16"}, {"max_position_embeddings": 8}, {"rope_theta": 5.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(changes))):
            load_memory(path, small_model(**changes))
    with pytest.raises(ValueError, match="made with dtype float32, and this is bfloat16"):
        load_memory(path, small_model().to(torch.bfloat16))
    for name, parameter in model.named_parameters():  # any weight, also a part of it
        kept = parameter.clone()
        part = parameter[len(parameter) // 2 :]
        part.add_(torch.randn_like(part))
        with pytest.raises(ValueError, match="made with weights"):
            load_memory(path, model)
        parameter.copy_(kept)
        assert load_memory(path, model).memory_length == 22, name
    free = {
        "last_context_length": 3, "mem_topk": 4, "keep_local": 2, "mem_device": "cpu", "mem_attention_grouping": (1, 2),
    }  # fmt: skip
    assert load_memory(path, small_model(**free)).memory_length == 22


@torch.no_grad()
def test_what_is_no_saved_memory_or_a_broken_one_is_refused(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    whole = path.read_bytes()
    for broken in (whole[:-9], whole[:40], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken"):
            load_memory(path, model)
    for metadata in (None, {"longllama": "3"}, {"longllama": "{}"}, {"longllama": "{"}, {"other": "x"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match="no saved memory"):
            load_memory(path, model)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_memory(tmp_path, model)


def saved(path: Path, model: FastLlama, **options) -> tuple[dict[str, Tensor], dict]:
    """What was saved of 30 tokens: tensors, and what it says of itself."""
    save_memory(path, model(torch.randint(61, (1, 30)), **options)[1], model)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, json.loads(file.metadata()["longllama"])


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "local_length",
        "memory_length",
        "0.local.1",
        "1.memory.v.0",
        "heads",
        "flat",
        "dtype",
        "padding",
        "bits",
        "float",
    ],
)
@pytest.mark.parametrize("mem_dtype", ["float32", "float8_e4m3fn"])
def test_a_memory_that_lacks_something_is_refused(name, mem_dtype, tmp_path):
    model, path, mask = small_model(mem_dtype=mem_dtype), tmp_path / "memory", torch.ones(1, 30)
    mask[:, :2] = 0
    tensors, says = saved(path, model, attention_mask=mask)
    save_file(tensors, path, {"longllama": json.dumps(says)})
    assert load_memory(path, model).memory_length == 22  # as it is
    variants = [says]
    if name in tensors:
        del tensors[name]
    elif name == "heads":
        tensors["0.local.0"] = tensors["0.local.0"][:, :2].clone()
    elif name == "dtype":
        tensors["1.memory.k.0"] = tensors["1.memory.k.0"].double()
    elif name == "padding":
        tensors["real"] = torch.ones(3, 3, dtype=torch.bool)
    elif name == "bits":
        tensors["real"] = tensors["real"].float()
    elif name == "flat":
        tensors["1.memory.k.0"] = torch.ones(3).to(getattr(torch, mem_dtype))
    elif name == "float":
        variants = [says | {"memory_length": float(says["memory_length"])}]
    else:
        variants = [says | {name: 7}, {key: value for key, value in says.items() if key != name}]
    for made_with in variants:
        save_file(tensors, path, {"longllama": json.dumps(made_with)})
        with pytest.raises(ValueError, match="its tensors are not those"):
            load_memory(path, model)


@torch.no_grad()
@pytest.mark.parametrize("scales", [0, 1, 3, 4])
def test_a_float8_memory_has_two_scales_and_no_other_has_any(scales, tmp_path):
    model, path = small_model(mem_dtype="float8_e4m3fn" if scales else "float32"), tmp_path / "memory"
    tensors, says = saved(path, model)
    right = {f"1.memory.scale.{j}": torch.ones(1, 4, 1, 1) for j in range(3)}
    tensors = {name: x for name, x in tensors.items() if name not in right}
    if scales == 4:  # two, of another shape
        tensors |= {name: torch.ones(3) for name in list(right)[:2]}
    else:
        tensors |= dict(list(right.items())[: scales or 2])
    save_file(tensors, path, {"longllama": json.dumps(says)})
    with pytest.raises(ValueError, match="its tensors are not those"):
        load_memory(path, model)


@torch.no_grad()
def test_another_number_of_rows_than_the_cache_has_is_refused(tmp_path):
    model, ids = small_model(), torch.randint(61, (3, 60))
    local = model(ids[:1])[1]
    remembered, forked = local.fork(), local.fork()
    remembered.restart()  # nothing is local
    save_memory(tmp_path / "memory", remembered, model)
    for cache in (local, remembered, forked, load_memory(tmp_path / "memory", model)):
        with pytest.raises(ValueError, match="input_ids has 3 rows, and the cache has 1"):
            model(ids[:, :20], cache)


@torch.no_grad()
def test_a_loaded_memory_has_forks_and_rows_that_go_on_apart(tmp_path):
    model, ids, path = small_model(mem_dtype="float8_e4m3fn"), torch.randint(61, (1, 60)), tmp_path / "memory"
    save_memory(path, model(ids[:, :30])[1], model)
    before, cache = path.read_bytes(), load_memory(path, model)
    fork, many = cache.fork(), cache.expand(2)
    right = model(ids[:, 30:], cache)[0]
    assert (model(ids[:, 30:], fork)[0] - right).abs().max() < 1e-5
    assert (model(ids[:, 30:].repeat(2, 1), many)[0] - right).abs().max() < 1e-5
    assert path.read_bytes() == before


@torch.no_grad()
@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_save_leaves_what_there_was(stop, tmp_path):
    """How writing itself ends is in test_files.py."""
    model, path = small_model(), tmp_path / "memory"
    cache = model(torch.randint(61, (1, 30)))[1]
    path.write_text("before")

    class Interrupting(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is Tensor.cpu:  # while it is written
                assert len(list(tmp_path.iterdir())) == 2
                raise stop
            return super().__torch_function__(function, types, args, kwargs)

    block = cache.layers[2].memory.blocks[0]
    cache.layers[2].memory.blocks = [(block[0], block[1].as_subclass(Interrupting))]
    with pytest.raises(stop):
        save_memory(path, cache, model)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@torch.no_grad()
def test_a_memory_is_saved_through_a_link_and_not_into_a_missing_folder(tmp_path):
    model, link, target = small_model(), tmp_path / "link", tmp_path / "target"
    cache = model(torch.randint(61, (1, 30)))[1]
    link.symlink_to(target)
    save_memory(link, cache, model)
    assert link.is_symlink() and load_memory(target, model).memory_length == cache.memory_length
    with pytest.raises(OSError, match="missing"):
        save_memory(tmp_path / "missing" / "memory", cache, model)
