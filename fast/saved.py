"""A memory in a file: read a book once, ask many times, today or another day.

The file is a safetensors file with all that a cache knows, the local context too, so the logits are those of never having
stopped. On a CPU it is mapped, and read when it is used.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fast.files import as_weights, write_safetensors
from fast.memory import FastMemory
from fast.model import FastLlama
from longllama import Cache, require

# What may change between a saved memory and the model that goes on from it.
FREE_SETTINGS = ("last_context_length", "mem_attention_grouping", "mem_topk", "mem_device", "keep_local")


def settings(model: FastLlama) -> dict:
    """What a saved memory must have been made with to be of use: the config, the dtype, and some of every weight, hashed."""
    digest = sha256()
    for name, tensor in model.hf_tensors().items():
        some = tensor.flatten()[:: -(-tensor.numel() // 256)].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    config = json.loads(json.dumps(asdict(model.config)))
    made_by = {"dtype": str(model.norm.weight.dtype).removeprefix("torch."), "weights": digest.hexdigest()[:16]}
    return {name: value for name, value in config.items() if name not in FREE_SETTINGS} | made_by


def check_kept(cache: Cache, done: str = "saved"):
    """Raises ValueError for a memory that has not, or will not keep, all of its tokens: by the name of its class."""
    for memory in (layer.memory for layer in cache.layers if layer.memory is not None):
        whole = isinstance(memory, FastMemory) and not memory.chooses()
        whole = whole and sum(block[0].shape[2] for block in memory.blocks) == cache.memory_length
        require(whole, f"{type(memory).__name__} is not {done}: only a memory that keeps all tokens is")


def save_memory(path: Path, cache: Cache, model: FastLlama):
    """Writes all that the cache knows to a safetensors file, whole or not at all. Raises OSError, and ValueError for a memory
    that has not all of its tokens.

    Layer i has the tensors "i.local.j", keys, values and, with a memory, unrotated keys; "i.memory.k.b" and "i.memory.v.b" of
    block b; and, of float8, "i.memory.scale.j". "real" tells padding. Shapes are those of FastContext, FastMemory and Cache.
    """
    check_kept(cache)
    tensors = {} if cache.real is None else {"real": cache.real}
    for i, layer in enumerate(cache.layers):
        groups = {f"{i}.local": layer.filled()}
        if layer.memory is not None and layer.memory.blocks:
            keys, values = zip(*layer.memory.blocks)
            groups |= {f"{i}.memory.k": keys, f"{i}.memory.v": values, f"{i}.memory.scale": layer.memory.scales}
        tensors |= {f"{group}.{j}": x for group, xs in groups.items() for j, x in enumerate(xs)}
    lengths = {"local_length": cache.local_length, "memory_length": cache.memory_length}
    write_safetensors(path, as_weights(tensors), {"longllama": json.dumps(settings(model) | lengths)})


def load_memory(path: Path, model: FastLlama, new_memory: Callable | None = None) -> Cache:
    """A cache that goes on from what `save_memory` wrote as if there had been no stop.

    On the CPU, memory is mapped from the file, and read when it is used. new_memory: see `FastLlama.new_cache`. Raises OSError
    or ValueError: for a broken file, another model, or settings that made another memory.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: it should be a saved memory")
    try:
        with safe_open(path, framework="pt") as file:
            made_with = json.loads((file.metadata() or {}).get("longllama", "{}"))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no saved memory, or a broken one: {str(error).splitlines()[0]}") from None
    if not isinstance(made_with, dict) or "weights" not in made_with:
        raise ValueError(f"{path} is no saved memory")
    for name, value in settings(model).items():
        if made_with.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {made_with.get(name)}, and this is {value}: use the same model, "
                "--dtype and --mem-dtype, or read the prompt again"
            )
    cache, device = model.new_cache(new_memory), model.norm.weight.device
    check_kept(cache, "loaded")
    cache.local_length, cache.memory_length = (made_with.get(name) for name in ("local_length", "memory_length"))
    cache.batch_size = next((x.shape[0] for x in tensors.values() if x.dim()), None)
    cache.real = tensors["real"].to(device) if "real" in tensors else None

    def numbered(group: str, device: torch.device) -> list[Tensor]:
        names = takewhile(tensors.__contains__, (f"{group}.{j}" for j in count()))
        pinned = device.type == "cpu" and model.norm.weight.is_cuda  # as FastMemory has it
        return [tensors[name].pin_memory() if pinned else tensors[name].to(device) for name in names]

    for i, layer in enumerate(cache.layers):
        layer.restore(numbered(f"{i}.local", device), cache.local_length)
        if layer.memory is not None:
            kept = layer.memory.device or device
            blocks = list(zip(numbered(f"{i}.memory.k", kept), numbered(f"{i}.memory.v", kept)))
            layer.memory.restore(blocks, numbered(f"{i}.memory.scale", device), cache.memory_length)
    if not is_whole(cache, model):
        raise ValueError(
            f"{path} is broken, or was changed: its tensors are not those of such a memory; read the prompt again"
        )
    return cache


def is_whole(cache: Cache, model: FastLlama) -> bool:
    """Whether a cache's tensors are such as this model makes, and as many as its lengths say."""
    local, remembered, B = cache.local_length, cache.memory_length, cache.batch_size
    groups, D = model.config.num_key_value_heads, model.config.head_dim

    def fits(x: Tensor, tokens: int, dtype: torch.dtype) -> bool:
        return x.dtype == dtype and x.shape == (B, groups, tokens, -(-D // 8) * 8)  # as `store` pads

    if not all(type(n) is int and n >= 0 for n in (local, remembered)):
        return False
    whole = True
    for layer in cache.layers:
        memory, kinds = layer.memory, 0 if local == 0 else 2 if layer.memory is None else 3
        whole &= len(layer.tensors) == kinds and all(fits(x, local, model.norm.weight.dtype) for x in layer.tensors)
        if memory is not None:
            sizes = [k.shape[2] if k.dim() == 4 else -1 for k, _ in memory.blocks]
            whole &= all(fits(x, n, memory.dtype) for block, n in zip(memory.blocks, sizes) for x in block)
            whole &= sum(sizes) == remembered
            whole &= len(memory.scales) == (2 if sizes and memory.dtype == torch.float8_e4m3fn else 0)
            whole &= all(scale.shape == (B, groups, 1, 1) for scale in memory.scales)
    if cache.real is not None:
        whole &= cache.real.dtype == torch.bool and cache.real.shape == (B, 1, remembered + local, 1)
    return whole
