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
from functools import partial
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longllama import require

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROUNDED = {"weight_int8": ("I8", torch.int8), "weight_int4": ("U8", torch.uint8)}  # by the ends of their names
AT_ONCE = 1 << 24  # numbers of a weight that are copied from a GPU at once
NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()} | {dtype: name for name, dtype in ROUNDED.values()}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL"}

Weights = dict[str, tuple[list[int], torch.dtype, Callable[[], Tensor]]]  # name -> shape, dtype, and how to read it

STARTS = {  # what may lie under the name of a model's file, by its first bytes
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned",
    b"<!doctype html": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
    b"gguf": "a GGUF file, for llama.cpp: convert.py makes a folder of it, by --input FILE.gguf",
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"\xef\xbb\xbf": "text with a byte-order mark: save it as UTF-8 without one",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
}


def instead(path: Path, otherwise: str) -> str:
    """What a file that could not be read is, with a remedy, by its first bytes; or else what the caller says."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    return next((kind for first, kind in STARTS.items() if start.startswith(first)), otherwise)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises OSError or ValueError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(raw, dict), "it is no JSON object")
    except (ValueError, RecursionError) as error:  # broken JSON is a ValueError, if it is not nested too deep
        raise ValueError(f"{path} is {instead(path, f'broken: {error}')}") from None
    return raw


def weight_files(folder: Path, name: str) -> dict[Path, set[str] | None]:
    """The file of weights in a Hugging Face folder, or else its shards, with the names of the tensors that an index has in each.
    Shards must lie beside their index; without one, they are known by their names."""
    whole, index, (stem, kind) = folder / name, folder / f"{name}.index.json", name.split(".")
    if whole.is_file():
        return {whole: None}
    if index.is_file():
        return indexed(index)
    counts = sorted({path.stem[-5:] for path in folder.glob(f"{stem}-{'[0-9]' * 5}-of-{'[0-9]' * 5}.{kind}")})
    require(len(counts) <= 1, f"{folder} has shards of {' and of '.join(counts)}: keep those of one model")
    names = [f"{stem}-{i + 1:05}-of-{count}.{kind}" for count in counts for i in range(int(count))]
    return {folder / shard: None for shard in names or [name]}


def indexed(index: Path) -> dict[Path, set[str]]:
    shards, weight_map = {}, read_json(index).get("weight_map")
    fits = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values()) and weight_map
    require(bool(fits), f"{index} is broken: it must have a weight_map of tensor names to file names")
    for tensor, shard in weight_map.items():
        require(
            Path(shard).name == shard, f"{index} names a file outside of its folder, which is not followed: {shard}"
        )
        shards.setdefault(index.parent / shard, set()).add(tensor)
    return dict(sorted(shards.items()))


def is_computed(name: str) -> bool:
    """Whether a tensor is a rotary table, which is computed here."""
    return name.endswith("rotary_emb.inv_freq")


def gathered(files: dict[Path, set[str] | None], read: Callable[[Path], Weights]) -> Weights:
    """The tensors of `weight_files`, without the rotary tables. Raises ValueError where it is not clear which are the model's."""
    found = {}
    for path, names in files.items():
        part = {name: weight for name, weight in read(path).items() if not is_computed(name)}
        differ = sorted(part.keys() ^ {name for name in names if not is_computed(name)}) if names is not None else []
        require(not differ, f"{path} has not the tensors that its index names, see {differ[:3]}: get both again")
        twice = sorted(part.keys() & found)
        require(not twice, f"{path} has tensors that another shard has too, see {twice[:3]}: get them again")
        found |= part
    return found


def find_weights(folder: Path) -> Weights:
    """The tensors in model.safetensors, or its shards; none is read."""
    return gathered(weight_files(folder, "model.safetensors"), safetensors_weights)


def safetensors_weights(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: get it, or run convert.py if the weights are pytorch_model.bin files"
        )
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                part, rounded = file.get_slice(name), ROUNDED.get(name.rpartition(".")[2])
                dtypes = dict([rounded]) if rounded else WEIGHT_DTYPES  # not whole numbers without a scale, say
                known, told = part.get_dtype() in dtypes, ", ".join(dtypes)
                require(known, f"{path}: {name} is {part.get_dtype()}, which is not one of {told}")
                found[name] = part.get_shape(), dtypes[part.get_dtype()], partial(read_tensor, path, name)
    except SafetensorError as error:
        raise ValueError(f"{path} is {instead(path, f'broken or cut short ({error}): get it again')}") from None
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:  # opened for each tensor, so that the one before is let go
        return file.get_tensor(name)


def unread(folder: Path) -> list[str]:
    """Names of safetensors files of a model that lie beside its weights, and are no part of them: what an earlier model or an
    adapter left."""
    files = weight_files(folder, "model.safetensors")
    beside = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    return sorted(path.name for path in beside if path not in files)


def checksum(x: Tensor) -> int:
    """CRC-32 of the bytes of a tensor: it tells weights apart, nobody gains by making two look alike, and it is three times as
    fast as the fastest of hashlib on a CPU without instructions for them."""
    value = 0
    for piece in x.flatten().split(AT_ONCE):
        value = crc32(piece.cpu().view(torch.uint8).numpy(), value)
    return value


def is_finite(x: Tensor) -> bool:
    return x.numel() == 0 or all(end.isfinite() for end in x.aminmax())  # 30 times as fast as to look at each


def check_fits(name: str, x: Tensor, dtype: torch.dtype):
    """Raises ValueError where finite numbers of x would be infinite in dtype."""
    if dtype != x.dtype and torch.finfo(dtype).max < torch.finfo(x.dtype).max:
        suspects = torch.stack(x.aminmax()) if is_finite(x) and x.numel() else x[x.isfinite()]
        wider = "bfloat16 or float32" if dtype == torch.float16 else "a wider one"
        fits = not suspects.to(dtype).isinf().any()
        require(fits, f"{name} has numbers too large for {dtype}: choose --dtype {wider}")


@contextmanager
def unfinished(path: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary path, which is gone afterwards, and the path of the file that it may become: what a link points to, and not the
    link. Raises OSError, by the name of `path`."""
    target = Path(os.path.realpath(path))
    # Nobody else's, and no longer than a name can be.
    part = target.with_name(f".{target.name[:32]}.{os.getpid()}.part")
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
            raise OSError(f"it takes {nbytes / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB left")


def write_safetensors(path: Path, weights: Weights, metadata: dict[str, str], dtype: torch.dtype | None = None):
    """Writes a safetensors file, in dtype or as the weights are, whole or not at all. Raises OSError, and ValueError for
    numbers too large for dtype.

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
        for name, (_, stored, read) in ordered:
            x = read()
            check_fits(name, x, dtype or stored)
            file.write(x.to(dtype or stored).cpu().contiguous().view(torch.uint8).numpy().data)


def as_weights(tensors: dict[str, Tensor]) -> Weights:
    """Tensors, as `write_safetensors` wants them: detached, since numpy takes none that has gradients."""
    return {name: (list(x.shape), x.dtype, x.detach) for name, x in tensors.items()}
