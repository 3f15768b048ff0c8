"""A memory in a file: read a book once, ask many times, today or another day.

The file is a safetensors file with all that a cache knows, the local context too, so the logits are those of never having
stopped. On a CPU it is mapped, and read when it is used. It is checked before it is used: what it says of itself has to settle
the name, shape and dtype of every tensor in it, by the same `layout` that is written.
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from hashlib import sha256
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fast.context import FastContext
from fast.files import NAMES, as_weights, checksum, write_safetensors
from fast.memory import FastMemory
from fast.model import FastLlama
from fast.storage import padded
from longllama import Cache, require, split_into_windows

VERSION = 2  # of what files say of themselves; the first one's hash was of some weights only
# What may change between a saved memory and the model that goes on from it: how it is used, and what begins and ends texts.
FREE_SETTINGS = (
    "last_context_length", "mem_attention_grouping", "mem_topk", "mem_device", "keep_local",
    "bos_token_id", "eos_token_id", "pad_token_id",
    "head_dim", "weight_dtype",  # which the hash of weights tells
)  # fmt: skip
LENGTHS = ("batch_size", "local_length", "memory_length")  # of a Cache

Layout = dict[str, tuple[list[int], torch.dtype]]  # name -> shape, dtype


def settings(model: FastLlama) -> dict:
    """What a saved memory must have been made with to be of use: the config and the dtype."""
    config, dtype = asdict(model.config), str(model.norm.weight.dtype).removeprefix("torch.")
    floats = {
        field.name: float(config[field.name]) for field in fields(model.config) if field.type is float
    }  # 1 is 1.0
    return {name: x for name, x in (config | floats).items() if name not in FREE_SETTINGS} | {"dtype": dtype}


def hash_weights(model: FastLlama) -> str:
    """A hash of every weight, by its name."""
    tensors = model.hf_tensors()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        checksums = list(zip(tensors, threads.map(checksum, tensors.values())))
    return sha256(str(sorted(checksums)).encode()).hexdigest()[:16]


def layout(
    model: FastLlama, rows: int, local: int, remembered: int, blocks: list[int], has_padding: bool = False
) -> Layout:
    """The tensors of a saved memory, of so many tokens, and its blocks of so many.

    Layer i has the tensors "i.local.j", keys, values and, with a memory, unrotated keys; "i.memory.k.b" and "i.memory.v.b" of
    block b; and, of float8, "i.memory.scale.j". "real" tells padding. Shapes are those of FastContext, FastMemory and Cache.
    """
    config, dtype, mem_dtype = model.config, model.norm.weight.dtype, getattr(torch, model.config.mem_dtype)
    groups, D = config.num_key_value_heads, padded(config.head_dim)
    tensors: Layout = {"real": ([rows, 1, remembered + local, 1], torch.bool)} if has_padding else {}
    for i in range(config.num_hidden_layers):
        remembers = i in config.mem_layers
        for j in range((3 if remembers else 2) if local else 0):
            tensors[f"{i}.local.{j}"] = [rows, groups, local, D], dtype
        for b, tokens in enumerate(blocks if remembers else []):
            tensors |= {f"{i}.memory.{kind}.{b}": ([rows, groups, tokens, D], mem_dtype) for kind in "kv"}
        for j in range(2 if remembers and blocks and mem_dtype == torch.float8_e4m3fn else 0):
            tensors[f"{i}.memory.scale.{j}"] = [rows, groups, 1, 1], torch.float32
    return tensors


def memory_nbytes(cache: Cache, model: FastLlama, T: int) -> int:
    """About how many bytes `save_memory` writes, and never fewer, once the cache has read T more tokens (of one row, if these are
    the first)."""
    start, stop, keep = split_into_windows(T, model.config.last_context_length, cache, model.config)[-1]
    local = keep + stop - start
    remembered = cache.local_length + cache.memory_length + T - local
    tensors = layout(model, cache.batch_size or 1, local, remembered, [remembered], cache.real is not None).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize + 1024 for shape, dtype in tensors)  # 1024: of the header


def check_kept(cache: Cache, done: str = "saved"):
    """Raises ValueError for a memory that has not, or will not keep, all of its tokens: by the name of its class."""
    for memory in (layer.memory for layer in cache.layers if layer.memory is not None):
        whole = isinstance(memory, FastMemory) and not memory.chooses()
        whole = whole and sum(block[0].shape[2] for block in memory.blocks) == cache.memory_length
        require(whole, f"{type(memory).__name__} is not {done}: only a memory that keeps all tokens is")
    for layer in cache.layers:
        require(isinstance(layer, FastContext), f"{type(layer).__name__} is not {done}: only a fast.FastContext is")


def save_memory(path: Path, cache: Cache, model: FastLlama, tokenizer: str | None = None):
    """Writes all that the cache knows to a safetensors file, whole or not at all. Raises OSError, and ValueError for a memory
    that has not all of its tokens. tokenizer: a digest of the one that made the ids."""
    check_kept(cache)
    tensors, sizes = {} if cache.real is None else {"real": cache.real}, []
    for i, layer in enumerate(cache.layers):
        groups = {f"{i}.local": layer.filled()}
        if layer.memory is not None and layer.memory.blocks:
            keys, values = zip(*layer.memory.blocks)
            groups |= {f"{i}.memory.k": keys, f"{i}.memory.v": values, f"{i}.memory.scale": layer.memory.scales}
            sizes = [k.shape[2] for k in keys]
        tensors |= {f"{group}.{j}": x for group, xs in groups.items() for j, x in enumerate(xs)}
    lengths = {name: getattr(cache, name) or 0 for name in LENGTHS}
    right = layout(model, *lengths.values(), sizes, cache.real is not None)
    whole = {name: (list(x.shape), x.dtype) for name, x in tensors.items()} == right
    require(whole, "the cache is not saved: it was made with other settings, or a reading into it was interrupted")
    says = settings(model) | lengths | {"version": VERSION, "weights": hash_weights(model), "tokenizer": tokenizer}
    write_safetensors(path, as_weights(tensors), {"longllama": json.dumps(says)})


def load_memory(
    path: Path, model: FastLlama, new_memory: Callable | None = None, tokenizer: str | None = None
) -> Cache:
    """A cache that goes on from what `save_memory` wrote as if there had been no stop.

    On the CPU, memory is mapped from the file, and read when it is used. new_memory: see `FastLlama.new_cache`. tokenizer: a
    digest, compared if the file has one too. Raises OSError or ValueError: for a broken file, another model or tokenizer, or
    settings that made another memory.
    """
    cache, device = model.new_cache(new_memory), model.norm.weight.device
    check_kept(cache, "loaded")
    lengths, tensors = read_checked(path, model, tokenizer)
    cache.batch_size, cache.local_length, cache.memory_length = lengths
    cache.batch_size = cache.batch_size or None  # nothing was read
    cache.real = tensors["real"].to(device) if "real" in tensors else None

    def numbered(group: str, device: torch.device) -> list[Tensor]:
        pinned = device.type == "cpu" and model.norm.weight.is_cuda  # as FastMemory has it
        found = (tensors[name] for name in numbered_names(group, tensors))
        return [x.pin_memory() if pinned else x.to(device) for x in found]

    for i, layer in enumerate(cache.layers):
        layer.restore(numbered(f"{i}.local", device), cache.local_length)
        if layer.memory is not None:
            kept = layer.memory.device or device
            blocks = list(zip(numbered(f"{i}.memory.k", kept), numbered(f"{i}.memory.v", kept)))
            layer.memory.restore(blocks, numbered(f"{i}.memory.scale", device), cache.memory_length)
    return cache


def numbered_names(group: str, names: dict) -> Iterator[str]:
    return takewhile(names.__contains__, (f"{group}.{j}" for j in count()))


def read_checked(path: Path, model: FastLlama, tokenizer: str | None) -> tuple[list[int], dict[str, Tensor]]:
    """LENGTHS, and the tensors of a saved memory, mapped. Raises OSError or ValueError where they are not a memory's of this
    model, before any is made."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: it should be a saved memory")
    try:
        with safe_open(path, framework="pt") as file:
            says = said(path, file.metadata() or {})
            check_made_with(path, says, settings(model))
            names, lengths = list(file.keys()), [says.get(name, "") for name in LENGTHS]
            slices = {name: file.get_slice(name) for name in names}
            whole = is_whole(lengths, {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}, model)
            tensors = {name: file.get_tensor(name) for name in names if whole}
    except SafetensorError as error:
        raise ValueError(f"{path} is no saved memory, or a broken one: {ascii(str(error))[:200]}") from None
    whole = whole and all(is_valid(name, x) for name, x in tensors.items())
    require(
        whole, f"{path} is broken, or was changed: its tensors are not those of such a memory; read the prompt again"
    )
    given = {} if tokenizer is None or says.get("tokenizer", "null") == "null" else {"tokenizer": tokenizer}
    check_made_with(path, says, given | {"weights": hash_weights(model)})  # it takes longest
    return list(map(int, lengths)), tensors


def said(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """What a file says of itself, each thing as JSON: true is not 1 then, and nothing has more than one line."""
    try:
        says = {name: json.dumps(value) for name, value in json.loads(metadata["longllama"]).items()}
        require("weights" in says, "")
    except (KeyError, ValueError, AttributeError, RecursionError):  # RecursionError: nested too deep
        raise ValueError(f"{path} is no saved memory") from None
    known = says.get("version") == str(VERSION)
    require(known, f"{path} was saved by another version of this program: read the prompt again")
    return says


def check_made_with(path: Path, says: dict[str, str], right: dict):
    for name, value in right.items():
        made_with, value = says.get(name, "null"), json.dumps(value)  # null: before there was such a setting
        if made_with != value:
            made_with, value = (text.strip('"')[:80] for text in (made_with, value))
            raise ValueError(
                f"{path} was made with {name} {made_with}, and this is {value}: use the same model, --dtype and "
                "--mem-dtype, or read the prompt again"
            )


def is_whole(lengths: list[str], found: dict[str, tuple[list[int], str]], model: FastLlama) -> bool:
    """Whether LENGTHS, as JSON, are possible, and settle exactly the tensors (shape, dtype) that a file has."""
    if not all(re.fullmatch("[0-9]{1,9}", text) for text in lengths):
        return False
    rows, local, remembered = map(int, lengths)
    layers = model.config.mem_layers
    keys = [found[name][0] for name in numbered_names(f"{layers[0]}.memory.k", found)] if layers else []
    blocks = [tokens for shape in keys for tokens in shape[2:3]]
    right = layout(model, rows, local, remembered, blocks, "real" in found)
    return (
        found == {name: (shape, NAMES[dtype]) for name, (shape, dtype) in right.items()}
        and 0 not in blocks
        and sum(blocks) == (remembered if layers else 0)
        and (rows > 0 or not (found or local or remembered))
    )


def is_valid(name: str, x: Tensor) -> bool:
    """Whether "real", or scales, hold what they may. Keys and values are not read so early."""
    if name == "real":
        return bool((x.view(torch.uint8) <= 1).all())
    return ".scale." not in name or bool((x.isfinite() & (x > 0)).all())
