"""Files of tensors: the one finder of weights, in shards too, and the one writer, for models, conversion and saved memories.

Files are untrusted: what an index names outside of its folder is not followed, and headers are checked before anything is read.
What is written is whole or not there: it goes to a temporary name first.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longllama import require

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL"}

Weights = dict[str, tuple[list[int], torch.dtype, Callable[[], Tensor]]]  # name -> shape, dtype, and how to read it


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError, and ValueError by the file's name."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
        require(isinstance(raw, dict), "must be a JSON object")
    except (ValueError, RecursionError) as error:  # broken JSON is a ValueError, if it is not nested too deep
        raise ValueError(f"{path}: {error}") from None
    return raw


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file of weights in a Hugging Face folder, or else the shards that its index names. They must lie beside it."""
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{index} is broken: it must have a weight_map of tensor names to file names") from None
    require(not outside, f"{index} names a file outside of its folder, which is not followed: {outside[:1]}")
    return [folder / shard for shard in shards]


def find_weights(folder: Path) -> dict[str, tuple[Path, list[int], torch.dtype]]:
    """Name -> (file, shape, dtype) of the tensors in model.safetensors, or its shards; none is read."""
    found = {}
    for path in weight_files(folder, "model.safetensors"):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: get it, or run convert.py if the weights are pytorch_model.bin files"
            )
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    known = part.get_dtype() in WEIGHT_DTYPES  # and not whole numbers, say, that would need a scale
                    require(
                        known, f"{path}: {name} is {part.get_dtype()}, which is not one of {', '.join(WEIGHT_DTYPES)}"
                    )
                    found[name] = path, part.get_shape(), WEIGHT_DTYPES[part.get_dtype()]
        except SafetensorError as error:
            raise ValueError(f"{path} is broken or cut short ({error}): get it again") from None
    return {name: at for name, at in found.items() if not name.endswith("rotary_emb.inv_freq")}


@contextmanager
def unfinished(path: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary path, which is gone afterwards, and the path of the file that it may become: what a link points to, and not the
    link. Raises OSError, by the name of `path`."""
    target = Path(os.path.realpath(path))
    part = target.with_name(
        f".{target.name[:32]}.{os.getpid()}.part"
    )  # nobody else's, and no longer than a name can be
    try:
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not target.is_file():
            raise OSError("it is not a regular file, and is not replaced by one")
        yield part, target
    except OSError as error:
        if error.filename and Path(error.filename) not in (part, target):  # something else, that was read meanwhile
            raise
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes the file of that name when all is written. Raises OSError."""
    with unfinished(path) as (part, target):
        yield part
        part.replace(target)


def check_writable(path: Path, nbytes: int = 0):
    """Tries, before the work begins, whether a file of that name and size could be written. Raises OSError."""
    with unfinished(path) as (part, target):
        part.write_bytes(bytes(4096))  # a full disk takes a name, and nothing in it
        free = shutil.disk_usage(target.parent).free
        if nbytes > free:
            raise OSError(f"it takes {nbytes / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left")


def write_safetensors(path: Path, weights: Weights, metadata: dict[str, str], dtype: torch.dtype | None = None):
    """Writes a safetensors file, in dtype or as the weights are, whole or not at all. Raises OSError.

    Tensor by tensor (safetensors' own writer wants all in memory at once): an 8-byte header length, a JSON header, the data.
    """
    header, offset = {"__metadata__": metadata}, 0
    ordered = sorted(weights.items(), key=lambda item: -(dtype or item[1][1]).itemsize)  # so that all are aligned
    for name, (shape, stored, _) in ordered:
        end = offset + torch.Size(shape).numel() * (dtype or stored).itemsize
        header[name] = {"dtype": NAMES[dtype or stored], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (_, stored, read) in ordered:
            file.write(read().to(dtype or stored).cpu().contiguous().view(torch.uint8).numpy().data)


def as_weights(tensors: dict[str, Tensor]) -> Weights:
    """Tensors, as `write_safetensors` wants them: detached, since numpy takes none that has gradients."""
    return {name: (list(x.shape), x.dtype, x.detach) for name, x in tensors.items()}
