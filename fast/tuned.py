"""A small file of memory layers that were tuned, to be laid over the weights that they were tuned from.

It holds the attention of memory layers alone, under Hugging Face's names, and says whose it is: the whole config of the tuned
model, and the `fingerprint` of all weights that tuning started from. Over others it is refused.
"""

import json
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open

from fast.files import Weights, as_weights, checksum, safetensors_weights, write_safetensors
from fast.model import FastConfig, FastLlama, check_weights
from longllama import require


def fingerprint(weights: Weights) -> str:
    """A digest of a model's weights in bfloat16, so that they may also be stored in more bits. Reads all of them."""
    sums = {name: checksum(read().to(torch.bfloat16)) for name, (_, _, read) in weights.items()}
    return sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def write_tuned(path: Path, model: FastLlama, base: str):
    """base: the fingerprint of what the model was tuned from. Raises OSError."""
    attention = tuple(f"model.layers.{i}.self_attn." for i in model.config.mem_layers)
    tensors = {name: x for name, x in model.hf_tensors().items() if name.startswith(attention)}
    metadata = {"format": "pt", "config": json.dumps(asdict(model.config)), "base": base}
    write_safetensors(path, as_weights(tensors), metadata)


def laid_over(path: Path, base: Weights, where: Path) -> tuple[FastConfig, Weights]:
    """The config and the weights of the tuned model: those in a file of `write_tuned`, and the others of the base, which is in
    `where`. Raises OSError, or ValueError for other files and other bases."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: name the one that train.py --tune memory wrote")
    tuned = safetensors_weights(path)
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
    fits = tuned and {"config", "base"} <= said.keys()
    require(bool(fits), f"{path} holds no tuned memory layers: name the file that train.py --tune memory wrote")
    same = tuned.keys() <= base.keys() and fingerprint(base) == said["base"]
    require(same, f"{path} was tuned from other weights than those in {where}: name the model that it was tuned from")
    try:
        raw = json.loads(said["config"])
        fits = isinstance(raw, dict) and raw.keys() <= {field.name for field in fields(FastConfig)}
        require(fits, "it has fields that no config has")
        config = FastConfig(**raw)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: config: {error}") from None
    return config, check_weights(config, base | tuned, path)
