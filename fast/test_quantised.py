"""Weights in 8 and 4 bits: how far they are rounded, products against float64's, and that no model is read in 16 bits first."""

import json
import weakref
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fast import FastConfig, FastLlama, load_memory, save_memory
from fast.files import as_weights, find_weights, write_safetensors
from fast.quantised import (
    FEW,
    GROUP,
    KINDS,
    MANY,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    dequantised,
    dequantised_weights,
    quantise,
    quantised_weights,
    use_quantised,
)
from fast.test_model import DEVICES, read, small_config
from longllama import LongLlama

each_kind = pytest.mark.parametrize("kind", KINDS)


def rounded_config(**changes) -> FastConfig:
    return small_config(intermediate_size=64, vocab_size=80, **changes)


def saved(folder, **changes) -> tuple[FastLlama, FastConfig]:
    """A random model, in a folder."""
    torch.manual_seed(0)
    model = FastLlama(rounded_config(**changes)).eval()
    save_file(model.hf_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.config)))
    return model, model.config


def rounded_folder(source, folder, kind: str):
    """What convert.py makes of it."""
    weights = quantised_weights(find_weights(source), kind)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"weight_dtype": kind}))


def matrix(*shape: int) -> Tensor:
    """With a row of zeros, rows of very different sizes, and one number that is far from its neighbours."""
    torch.manual_seed(0)
    made = torch.randn(shape) * torch.logspace(-6, 4, shape[0]).unsqueeze(1)
    made[3], made[5, 7] = 0, 300 * made[5].abs().max()
    return made


# ------------------------------------------------------------------------------------------------------------ Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_at_most_half_a_step_from_each_weight(dtype):
    right = matrix(20, 96).to(dtype)
    weight, scale = quantise(right, "int8")
    assert (weight.dtype, weight.shape, scale.dtype, scale.shape) == (torch.int8, (20, 96), torch.bfloat16, (20, 1))
    assert ((dequantised(weight, scale, torch.float64) - right.double()).abs() <= scale.double() / 2).all()
    assert weight.abs().amax(dim=1).tolist() == [127 if i != 3 else 0 for i in range(20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_at_most_half_a_step_from_each_weight_but_where_16_values_end(dtype):
    right = matrix(20, 96).to(dtype)
    weight, scale = quantise(right, "int4")
    assert (weight.dtype, weight.shape, scale.dtype, scale.shape) == (torch.uint8, (20, 48), torch.bfloat16, (20, 3))
    step = scale.double().repeat_interleave(GROUP, dim=1)
    error, ends = (dequantised(weight, scale, torch.float64) - right.double()).abs(), right.double() / step > 7.5
    assert (error <= step.abs() * torch.where(ends, 1.01, 0.5))[right != 0].all() and (error[3] == 0).all()
    assert 0 < ends.double().mean() < 0.05
    largest = right.double().unflatten(1, (-1, GROUP)).abs().amax(dim=2)
    assert ((step.unflatten(1, (-1, GROUP))[..., 0].abs() * 8 - largest).abs() <= largest / 256).all()


@each_kind
def test_rows_are_rounded_each_by_itself(kind):
    parts = matrix(20, 96).split([4, 9, 7])
    whole, each = quantise(torch.cat(parts), kind), [quantise(x, kind) for x in parts]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*each)))


# ------------------------------------------------------------------------------------------------------------ Products


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, FEW + 1, MANY])
@pytest.mark.parametrize("kind, shape", [("int8", (48, 96)), ("int8", (37, 80)), ("int8", (5, 36)), ("int4", (48, 96)),
                                         ("int4", (37, 64)), ("int4", (160, 32)), ("int4", (1088, 1024)),
                                         ("int8", (1030, 1024))])  # fmt: skip
def test_products_are_near_float64s_with_the_rounded_matrix(kind, shape, rows, device, dtype):
    torch.manual_seed(1)
    other = nn.Linear(*reversed(shape), bias=False).to(device)
    x, rounded = torch.randn(1, rows, shape[1]).to(device, dtype), quantise(other.weight, kind)
    layer = Int8Linear(other) if kind == "int8" else Int4Linear(other)
    layer.to(dtype)  # scales with it
    right = x.double() @ dequantised(*rounded, torch.float64).T
    for packed in (False, True):
        if packed and kind == "int4":
            layer.pack()
            on_cpu = device == "cpu" and shape[0] % 16 == 0
            assert (layer.scales_and_zeros is not None) == on_cpu
        out = layer(x)
        assert out.dtype == dtype and out.shape == right.shape
        assert (out - right).norm() < 4e-3 * right.norm()  # bfloat16 rounds by 2e-3 on average


@torch.no_grad()
@each_kind
def test_many_tokens_are_multiplied_in_float32_if_that_is_the_models(kind):
    other, x = nn.Linear(96, 64, bias=False), torch.randn(2, MANY, 96)
    right = x.double() @ dequantised(*quantise(other.weight, kind), torch.float64).T
    layer = Int8Linear(other) if kind == "int8" else Int4Linear(other)
    if kind == "int4":
        layer.pack()
        if layer.block is None:
            pytest.skip("the int4 kernel of this processor has another layout")
    assert (layer(x) - right).norm() < 1e-6 * right.norm()


@torch.no_grad()
def test_the_embedding_is_the_rounded_matrix():
    other, ids = nn.Embedding(40, 24), torch.randint(40, (2, 7))
    right = dequantised(*quantise(other.weight, "int8"), torch.float32)
    assert torch.equal(Int8Embedding(other)(ids), right[ids])


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2}], ids=str)
def test_logits_are_those_of_the_model_of_rounded_matrices(kind, changes, tmp_path):
    """Read by LongLlama, which knows nothing of rounding."""
    unrounded, config = saved(tmp_path, **changes)
    weights = dequantised_weights(quantised_weights(find_weights(tmp_path), kind), torch.float32)
    write_safetensors(tmp_path / "again.safetensors", weights, {})
    rounded = FastLlama.from_pretrained(tmp_path, weight_dtype=kind)
    (tmp_path / "again.safetensors").replace(tmp_path / "model.safetensors")
    ids = torch.randint(config.vocab_size, (1, 60))
    right, out = LongLlama.from_pretrained(tmp_path)(ids)[0], rounded(ids)[0]
    assert (out - right).norm() < 3e-2 * right.norm()  # bfloat16 makes 1% of such short windows
    far = (right - unrounded(ids)[0]).norm() / right.norm()
    assert (0.003 < far < 0.05) if kind == "int8" else (0.1 < far < 0.6)
    steps, at_once = read(rounded, ids[:, :44], [40, *[1] * 4]), read(rounded, ids[:, :44], [40, 4])
    assert (steps - at_once).norm() < 3e-2 * right.norm()


# ------------------------------------------------------------------------------------------------------ In files, loaded


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rounded_folder_gives_bit_for_bit_what_rounding_on_reading_does(kind, dtype, tied, tmp_path):
    _, config = saved(tmp_path, tie_word_embeddings=tied)
    (tmp_path / "rounded").mkdir()
    rounded_folder(tmp_path, tmp_path / "rounded", kind)
    stored = FastLlama.from_pretrained(tmp_path / "rounded", dtype=dtype)
    read_so = FastLlama.from_pretrained(tmp_path, dtype=dtype, weight_dtype=kind)
    assert stored.config == read_so.config and stored.config.weight_dtype == kind
    ids = torch.randint(config.vocab_size, (1, 60))
    assert torch.equal(stored(ids)[0], read_so(ids)[0])
    size = (tmp_path / "rounded" / "model.safetensors").stat().st_size
    assert size < (0.36 if kind == "int8" else 0.33) * (tmp_path / "model.safetensors").stat().st_size  # headers too
    save_memory(tmp_path / "memory", stored(ids)[1], stored)
    load_memory(tmp_path / "memory", read_so)
    with pytest.raises(ValueError, match="weights"):
        load_memory(tmp_path / "memory", FastLlama.from_pretrained(tmp_path, dtype=dtype))


class Alive(TorchDispatchMode):
    """most: the largest number of floating-point numbers, in tensors made since, that there were at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and out.is_floating_point() and not out.is_meta and not out._is_view()
        if made and all(out is not x for x in args):
            n, self.now = out.numel(), self.now + out.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(out, self.drop, n)
        return out

    def drop(self, n: int):
        self.now -= n


@each_kind
@pytest.mark.parametrize("stored", [False, True])
def test_a_rounded_model_is_never_in_memory_as_it_was(kind, stored, tmp_path):
    unrounded, _ = saved(tmp_path, num_hidden_layers=8)
    folder = tmp_path
    if stored:
        folder = tmp_path / "rounded"
        folder.mkdir()
        rounded_folder(tmp_path, folder, kind)
    with Alive() as alive:
        model = FastLlama.from_pretrained(folder, weight_dtype=kind)
    sizes = [p.numel() for p in unrounded.parameters() if p.dim() == 2]
    kept = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    kept += sum(x.numel() for x in model.buffers())
    assert kept < 0.1 * sum(sizes) + 33 * 32  # scales, norms
    assert alive.most < 2 * kept + 6 * max(sizes) < 0.5 * sum(sizes)  # a matrix, and what rounding makes of it
    with Alive() as alive:
        FastLlama.from_pretrained(tmp_path)
    assert alive.most > sum(sizes)


@each_kind
def test_every_matrix_of_a_model_is_rounded_and_none_is_trained(kind):
    model = FastLlama(rounded_config(weight_dtype=kind))
    assert not any(isinstance(x, (nn.Linear, nn.Embedding)) for x in model.modules())
    whole = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(whole) == 4 * 4 + 2 and not any(p.requires_grad for p in whole)
    assert {type(x) for x in model.layers[0].children()} >= {Int8Linear if kind == "int8" else Int4Linear}
    assert (type(model.embed_tokens), type(model.lm_head)) == (Int8Embedding, Int8Linear)


@each_kind
def test_rounded_modules_are_compiled_whole(kind):
    """By the way of a GPU: a product with what the stored numbers stand for, which a compiler computes as it reads them."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    use_quantised(model, kind)
    x = torch.randn(1, FEW + 1, 64)
    made = torch.compile(model[0], fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(made, model[0](x), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ What is refused


def test_what_was_rounded_is_not_rounded_again_and_is_not_read_as_if_it_was_not(tmp_path):
    saved(tmp_path)
    (tmp_path / "rounded").mkdir()
    rounded_folder(tmp_path, tmp_path / "rounded", "int8")
    for other in ("int4", None):
        with pytest.raises(ValueError, match="rounded to int8 already"):
            FastLlama.from_pretrained(tmp_path / "rounded", weight_dtype=other)
    with pytest.raises(Exception, match="does not contain tensor"):
        LongLlama.from_pretrained(tmp_path / "rounded")
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    for wrong in (None, "int4"):
        (tmp_path / "rounded" / "config.json").write_text(json.dumps(config | {"weight_dtype": wrong}))
        with pytest.raises(ValueError, match="weights and config.json differ"):
            FastLlama.from_pretrained(tmp_path / "rounded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_rounded_weights_of_another_dtype_are_refused(dtype, tmp_path):
    saved(tmp_path)
    (tmp_path / "rounded").mkdir()
    rounded_folder(tmp_path, tmp_path / "rounded", "int8")
    tensors = {name: read() for name, (_, _, read) in find_weights(tmp_path / "rounded").items()}
    tensors["lm_head.weight_int8"] = tensors["lm_head.weight_int8"].to(dtype)
    write_safetensors(tmp_path / "rounded" / "model.safetensors", as_weights(tensors), {})
    with pytest.raises(ValueError, match="lm_head.weight_int8 is .*, which is not one of I8"):
        FastLlama.from_pretrained(tmp_path / "rounded")


@pytest.mark.parametrize("kind", ["int2", 8, ["int8"], True])
def test_kinds_that_there_are_not_are_refused(kind):
    with pytest.raises(ValueError, match="weight_dtype must be null, int8 or int4"):
        small_config(weight_dtype=kind)


def test_int4_of_rows_that_are_no_groups_is_refused():
    with pytest.raises(ValueError, match="rows have 32, 32, 48: take int8"):
        small_config(weight_dtype="int4")
