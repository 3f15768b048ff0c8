"""Turns Hugging Face folders of LLaMA and LongLLaMA into ours, and back.

    python convert.py --input HF_DIR --output DIR --dtype bfloat16      # pytorch_model.bin or safetensors, whole or sharded
    python convert.py --input DIR --output HF_DIR --to-hf               # for LlamaForCausalLM.from_pretrained

Our folder is config.json, one model.safetensors under Hugging Face's tensor names, and tokenizer.model. Going back, the
weights are the same and config.json says LlamaForCausalLM: a plain LLaMA to others, with its memory settings kept.

Tensors are read and written one by one, so memory holds about one at a time. Weights are untrusted: nothing is unpickled but
tensors, and no file outside the input folder is opened.
"""

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

from cli.ending import ending_well, out_of_memory

import torch
from safetensors import safe_open
from torch import Tensor

from cli.flags import parser_for
from cli.loading import DTYPES
from fast import FastConfig
from fast.files import WEIGHT_DTYPES, Weights, as_weights, find_weights, weight_files, write_safetensors
from fast.model import check_weights
from longllama import LongLlama, LongLlamaConfig


def read_weights(folder: Path) -> Weights:
    """The tensors of a Hugging Face folder, of safetensors files if there are any. None is in memory until it is read."""
    if any((folder / f"model.safetensors{ending}").is_file() for ending in ("", ".index.json")):
        return dict(safetensors_weights(folder))
    return dict(bin_weights(weight_files(folder, "pytorch_model.bin")))


def safetensors_weights(folder: Path) -> Iterator:
    def read(path: Path, name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:  # opened for each tensor, so that the one before is let go
            return file.get_tensor(name)

    for name, (path, shape, dtype) in find_weights(folder).items():
        yield name, (shape, dtype, partial(read, path, name))


def bin_weights(paths: list[Path]) -> Iterator:
    load = lru_cache(maxsize=1)(load_bin)  # one shard at a time
    for path in paths:
        for name, tensor in load(path).items():
            yield name, (list(tensor.shape), tensor.dtype, lambda path=path, name=name: load(path)[name])


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped rather than read, without the rotary tables (they are computed here)."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --input needs model.safetensors or pytorch_model.bin, or their shards"
        )
    tensors = load_pickled(path)
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and is_weight(x) for name, x in tensors.items()):
        raise ValueError(f"{path} is not a dictionary of tensors of floating-point numbers")
    return {name: x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def is_weight(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in WEIGHT_DTYPES.values() and x.layout == torch.strided and not x.is_meta


def load_pickled(path: Path):
    """What torch.save wrote, tensors mapped rather than read. Raises OSError, or ValueError for what could be code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many kinds, and torch advises to switch its guard off
        if (isinstance(error, OSError) and error.filename) or out_of_memory(error):  # a file cut short has no name
            raise
        raise ValueError(f"{path} is broken, or holds more than tensors, which is not loaded: get it again") from None


def write_config(path: Path, config: LongLlamaConfig, dtype: torch.dtype, to_hf: bool = False):
    """config.json; to_hf: as LlamaForCausalLM reads it, which ignores the memory settings, and convert.py finds them again."""
    names = ("LlamaForCausalLM", "llama") if to_hf else ("LongLlamaForCausalLM", "longllama")
    extra = {"architectures": names[:1], "model_type": names[1], "hidden_act": "silu"}
    text = json.dumps(extra | asdict(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def save_pretrained(model: LongLlama, folder: str | Path):
    """Writes config.json and model.safetensors, in the parameters' dtype. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", as_weights(model.hf_tensors()), {"format": "pt"})
    write_config(folder / "config.json", model.config, model.norm.weight.dtype)


def convert(source: Path, target: Path, dtype: torch.dtype | None, to_hf: bool, force: bool):
    if not source.is_dir():
        raise FileNotFoundError(f"--input {source} is not a folder")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"--output {target} is a file: name a folder")
    if target.exists() and any(target.iterdir()) and not force:
        raise FileExistsError(f"--output {target} is not empty: name another folder, or add --force")
    if target.exists() and target.samefile(source):
        raise ValueError("--output is the --input folder: name another one")
    config = FastConfig.from_json(source / "config.json")
    weights = read_weights(source)
    wanted = check_weights(config, {name: shape for name, (shape, _, _) in weights.items()}, source)
    weights = {name: weight for name, weight in weights.items() if name in wanted}  # not a copy of tied ones
    saved = dtype or next(iter(weights.values()))[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    disk = target if target.exists() else target.parent  # an existing target may be a mount point
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=disk) as name:
        made = Path(name)
        write_safetensors(made / "model.safetensors", weights, {"format": "pt"}, dtype)
        write_config(made / "config.json", config, saved, to_hf)
        if (source / "tokenizer.model").is_file():
            shutil.copyfile(source / "tokenizer.model", made / "tokenizer.model")
        else:
            print(f"convert.py: warning: {source} has no tokenizer.model; generate.py will need one", file=sys.stderr)
        target.mkdir(exist_ok=True)
        for file in ("tokenizer.model", "model.safetensors", "config.json"):  # the last makes the folder a model
            if (made / file).is_file():
                os.replace(made / file, target / file)
            else:
                (target / file).unlink(missing_ok=True)  # with --force: a tokenizer of what was there before


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder to read")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="what to store weights as (default: as they are)")
    parser.add_argument("--to-hf", action="store_true", help="make a folder for transformers' LlamaForCausalLM")
    parser.add_argument("--force", action="store_true", help="write into --output though it is not empty")
    args = parser.parse_args()
    with ending_well(parser):
        convert(args.input, args.output, DTYPES.get(args.dtype), args.to_hf, args.force)
        print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
