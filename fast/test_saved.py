"""A memory in a file goes on as if there had been no stop, and is refused by name where it does not fit."""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast import FastContext, FastLlama, FastMemory, load_memory, save_memory
from fast.saved import memory_nbytes
from fast.test_model import small_blocks, small_config, small_model
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
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(changes))):
            load_memory(path, small_model(**changes))
    with pytest.raises(ValueError, match="made with dtype float32, and this is bfloat16"):
        load_memory(path, small_model().to(torch.bfloat16))
    free = {
        "last_context_length": 3, "mem_topk": 4, "keep_local": 2, "mem_device": "cpu", "mem_attention_grouping": (1, 2),
        "bos_token_id": 3, "eos_token_id": (4, 5), "pad_token_id": 6,
    }  # fmt: skip
    assert load_memory(path, small_model(**free)).memory_length == 22


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2}], ids=str)
def test_every_weight_counts(changes, tmp_path):
    """One number, two rows that change places, or another sign: of any tensor, by Hugging Face's name."""
    model, path = small_model(hidden_size=64, **changes).to(torch.bfloat16), tmp_path / "memory"
    save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    for tensor in model.hf_tensors().values():
        kept, flat = tensor.clone(), tensor.view(-1)
        for place in torch.randint(tensor.numel(), (3,)).tolist():
            flat[place] = flat[place] * 1.01 + 0.01
            with pytest.raises(ValueError, match="made with weights .* or read the prompt again$"):
                load_memory(path, model)
            tensor.copy_(kept)
        if tensor.dim() > 1:
            for other in (kept.flip(0), -kept):
                tensor.copy_(other)
                with pytest.raises(ValueError, match="made with weights"):
                    load_memory(path, model)
            tensor.copy_(kept)
    assert load_memory(path, model).memory_length == 22


@torch.no_grad()
def test_weights_are_hashed_when_a_memory_is_saved_or_loaded_and_never_else(tmp_path):
    class Counting(FastLlama):
        asked = 0

        def hf_tensors(self) -> dict[str, Tensor]:
            self.asked += 1
            return super().hf_tensors()

    model, path, ids = Counting(small_config()).eval(), tmp_path / "memory", torch.randint(61, (1, 30))
    cache = model(ids, model.new_cache())[1]
    assert model.asked == 0
    save_memory(path, cache, model)
    assert model.asked == 1
    model(ids, load_memory(path, model))
    assert model.asked == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError):
        load_memory(path, model)
    assert model.asked == 2


@torch.no_grad()
def test_a_memory_read_with_another_tokenizer_is_refused_where_both_are_known(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    cache = model(torch.randint(61, (1, 30)))[1]
    for saved, loaded, fits in (
        ("ab" * 32, "ab" * 32, True), ("ab" * 32, "ac" * 32, False), ("ab", None, True), (None, "ab", True),
        (None, None, True),
    ):  # fmt: skip
        save_memory(path, cache, model, tokenizer=saved)
        if fits:
            assert load_memory(path, model, tokenizer=loaded).memory_length == 22
        else:
            with pytest.raises(ValueError, match=f"made with tokenizer {saved}, and this is {loaded}: use the same"):
                load_memory(path, model, tokenizer=loaded)


@torch.no_grad()
def test_a_number_may_be_written_as_a_whole_one_in_another_config(tmp_path):
    path = tmp_path / "memory"
    save_memory(path, small_model().new_cache(), small_model(rope_theta=10000))
    load_memory(path, small_model(rope_theta=10000.0))


@torch.no_grad()
def test_what_is_no_saved_memory_or_a_broken_one_is_refused(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    save_memory(path, model(torch.randint(61, (1, 30)))[1], model)
    whole = path.read_bytes()
    for broken in (whole[:-9], whole[:40], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken"):
            load_memory(path, model)
    deep = ["[" * 100_000, "[" * 900 + "]" * 900, '{"weights": ' * 100_000]
    for text in (None, "3", "{}", "{", "[1]", "NaN", '"weights"', "\n", *deep):
        metadata = {"other": "x"} if text is None else {"longllama": text}
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match="no saved memory"):
            load_memory(path, model)
    save_file({"a": torch.ones(2)}, path, {"longllama": json.dumps({"weights": "0123", "vocab_size": 61})})
    with pytest.raises(ValueError, match="saved by another version of this program: read the prompt again$"):
        load_memory(path, model)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_memory(tmp_path, model)


def saved(path: Path, model: FastLlama, **options) -> tuple[dict[str, Tensor], dict]:
    """What was saved of 30 tokens: tensors, and what it says of itself."""
    save_memory(path, model(torch.randint(61, (1, 30)), **options)[1], model)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, json.loads(file.metadata()["longllama"])


BLOCKS = [f"{i}.memory.{kind}.0" for i in (1, 2) for kind in "kv"]
SCALES = [f"{i}.memory.scale.{j}" for i in (1, 2) for j in range(2)]
DAMAGES = {  # names of tensors, and what becomes of them
    "a tensor is gone": (["0.local.1"], None), "values are gone": (["1.memory.v.0"], None), "no block": (BLOCKS, None),
    "padding of others": (["real"], lambda x: torch.ones(3, 3, dtype=torch.bool)), "padding is no bits": (["real"], Tensor.float),
    "padding is 2": (["real"], lambda x: (x.view(torch.uint8) * 2).view(torch.bool)),
    "fewer heads": (["0.local.0"], lambda x: x[:, :2].clone()), "another dtype": (BLOCKS[:1], Tensor.double),
    "flat": (BLOCKS[:1], Tensor.flatten), "one number": (BLOCKS[:1], lambda x: x.flatten()[0].clone()),
    "no tokens": (BLOCKS, lambda x: x[:, :, :0].clone()), "no rows": ([*BLOCKS, *SCALES], lambda x: x[:0].clone()),
    "twice as wide": (BLOCKS, lambda x: x.repeat(1, 1, 1, 2)),
    "another local context": (["1.local.2"], lambda x: x[:, :, 1:].clone()),
    "one more": (["3.local.2", "5.local.0", "1.memory.k.1", "hello"], lambda x: torch.ones(1, 4, 8, 8)),
    "scales gone": (SCALES, None), "one scale gone": (SCALES[1:2], None),
    "a third": (["1.memory.scale.2"], lambda x: torch.ones(1, 4, 1, 1)),
    "a scale's shape": (SCALES[:1], Tensor.flatten), "a scale's dtype": (SCALES[:1], Tensor.double),
} | {f"a scale is {bad}": (SCALES[3:], lambda x, bad=bad: x * 0 + bad) for bad in (0.0, -1.0, torch.nan, torch.inf)}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_memory_whose_tensors_are_not_those_that_were_saved_is_refused(damage, tmp_path):
    model, path, mask = small_model(mem_dtype="float8_e4m3fn"), tmp_path / "memory", torch.ones(1, 30)
    mask[:, :2] = 0
    tensors, says = saved(path, model, attention_mask=mask)
    save_file(tensors, path, {"longllama": json.dumps(says)})
    assert load_memory(path, model).memory_length == 22  # as it is
    names, change = DAMAGES[damage]
    tensors |= {name: change and change(tensors.get(name)) for name in names}
    save_file({name: x for name, x in tensors.items() if x is not None}, path, {"longllama": json.dumps(says)})
    with pytest.raises(ValueError, match=f"^{path} is broken, .*; read the prompt again$"):
        load_memory(path, model)


@torch.no_grad()
@pytest.mark.parametrize("value", [None, "gone", -1, 0, 7, 2**70, True, 22.0, "22", [22], {}, float("nan")], ids=str)
@pytest.mark.parametrize("name", ["local_length", "memory_length", "batch_size"])
@pytest.mark.parametrize("changes", [{}, {"mem_layers": (), "max_position_embeddings": 30}], ids=["memory", "none"])
def test_a_memory_of_impossible_lengths_is_refused(changes, name, value, tmp_path):
    model, path = small_model(**changes), tmp_path / "memory"
    tensors, says = saved(path, model)
    says |= {name: value}
    if value == "gone":
        del says[name]
    save_file(tensors, path, {"longllama": json.dumps(says)})
    possible = not model.config.mem_layers and name == "memory_length" and type(value) is int and 0 <= value < 2**70
    if possible:  # what was lost is only counted
        assert load_memory(path, model).memory_length == value
    else:
        with pytest.raises(ValueError, match="its tensors are not those"):
            load_memory(path, model)


@torch.no_grad()
def test_a_memory_without_float8_has_no_scales(tmp_path):
    model, path = small_model(), tmp_path / "memory"
    tensors, says = saved(path, model)
    save_file(tensors | {name: torch.ones(1, 4, 1, 1) for name in SCALES}, path, {"longllama": json.dumps(says)})
    with pytest.raises(ValueError, match="its tensors are not those"):
        load_memory(path, model)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, value",
    [("mem_layers", "\n\x1b[2J"), ("vocab_size", 61.0), ("mem_positionals", 1), ("weights", [[0] * 999] * 9)],
)
def test_what_a_file_says_of_itself_is_shown_on_one_short_line(name, value, tmp_path):
    model, path = small_model(), tmp_path / "memory"
    tensors, says = saved(path, model)
    save_file(tensors, path, {"longllama": json.dumps(says | {name: value})})
    with pytest.raises(ValueError, match=f"made with {name} ") as error:
        load_memory(path, model)
    assert str(error.value).isprintable() and len(str(error.value)) < 300 + len(str(path))


@torch.no_grad()
@pytest.mark.parametrize("mem_dtype", ["float32", "float8_e4m3fn"])
def test_bytes_that_change_anywhere_end_in_one_line_or_in_a_memory_to_go_on_from(mem_dtype, tmp_path):
    model, path, random = small_model(mem_dtype=mem_dtype), tmp_path / "memory", Random(0)
    save_memory(path, model(torch.randint(61, (2, 30)))[1], model)
    whole, refused = path.read_bytes(), 0
    head = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        changed = bytearray(whole)
        changed[random.randrange(head)] ^= 1 << random.randrange(8)
        if random.random() < 0.5:
            changed[head - 60 + random.randrange(60)] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        try:
            list(model.generate(torch.ones(2, 3, dtype=torch.long), 2, cache=load_memory(path, model)))
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 150


@torch.no_grad()
def test_a_local_context_beyond_the_window_goes_on(tmp_path):
    model, path, ids = small_model(), tmp_path / "memory", torch.randint(61, (1, 45))
    _, cache = model(ids[:, :40], last_context_length=30)
    save_memory(path, cache, model)
    loaded = load_memory(path, model)
    assert loaded.local_length == 30
    assert (model(ids[:, 40:], loaded)[0] - model(ids[:, 40:], cache)[0]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mem_layers": ()}], ids=["memory", "none"])
def test_how_many_rows_there_are_is_kept_where_no_tensor_tells(changes, tmp_path):
    model, path = small_model(**changes), tmp_path / "memory"
    for rows in (None, 3):
        cache = model.new_cache() if rows is None else model(torch.randint(61, (rows, 5)))[1]
        cache.restart()
        save_memory(path, cache, model)
        assert load_memory(path, model).batch_size == rows


@torch.no_grad()
def test_a_cache_that_was_left_in_the_midst_of_reading_is_not_saved(tmp_path):
    class Stopped(FastContext):
        def append_and_attend(self, *args, **options) -> Tensor:
            if self.memory is not None:
                raise KeyboardInterrupt
            return super().append_and_attend(*args, **options)

    model, ids = small_model(), torch.randint(61, (1, 5))
    cache = model.new_cache(None, Stopped)
    with pytest.raises(KeyboardInterrupt):
        model(ids, cache)
    with pytest.raises(ValueError, match="interrupted"):
        save_memory(tmp_path / "memory", cache, model)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"mem_dtype": "float8_e4m3fn", "num_key_value_heads": 2}, {"keep_local": 9}], ids=str
)
@pytest.mark.parametrize("parts", [(1,), (14,), (700, 3), (300, 1, 12), (300, 400)], ids=str)
def test_the_size_of_a_file_is_known_before_the_last_part_is_read(parts, changes, tmp_path):
    model, path = small_model(hidden_size=256, last_context_length=12, **changes), tmp_path / "memory"
    cache = model.new_cache()
    for T in parts:
        expected = memory_nbytes(cache, model, T)
        model(torch.randint(61, (1, T)), cache)
    save_memory(path, cache, model)
    assert path.stat().st_size <= expected <= 1.02 * path.stat().st_size + 20_000


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
