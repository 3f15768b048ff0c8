"""A model's folder: what it is if it is no model, and how a new model takes the place of the one that is there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from fast.files import instead, read_json
from longllama import require

# Small files that go with a model, which transformers reads.
BESIDE = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin",
)  # fmt: skip
MODEL = ("config.json", "tokenizer.model", "tokenizer.json", *BESIDE, *WEIGHTS)

METAS = "is a model in Meta's own layout: get it in Hugging Face's layout, whose names often end in -hf"
OTHERS = {  # a file in a folder without a model in Hugging Face's layout -> what that folder is
    "adapter_config.json": "holds an adapter, not a model: merge it into its model with peft's merge_and_unload, and save that",
    "memory_layers.safetensors": "holds tuned memory layers, not a model: convert.py --over lays them over their model",
    "*.gguf": "holds GGUF files, for llama.cpp: convert.py makes a folder of one, by --input FILE.gguf",
    "params.json": METAS,
    "consolidated.*": METAS,
}

# Folders in a folder that a model is being written to: the files of the new one, of the old one while they are moved there, and
# of the old one when all are there. The last is renamed from the one before it, so that no name ever says what is not so.
NEW, LEAVING, BEFORE = ".new.part", ".leaving.part", ".before.part"


def files_of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Those of these names, config.json first."""
    found = (path for path in folder.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in patterns))
    return sorted(found, key=lambda path: (path.name != "config.json", path.name))


def check_folder(folder: Path):
    """Raises OSError or ValueError for a folder that holds no model, or an unfinished one, in a line that says what to do."""
    if folder.is_file():
        raise ValueError(f"{folder} is {instead(folder, 'a file: name the folder that a model is in')}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name one made by convert.py, or a download")
    config = folder / "config.json"
    if not config.is_file():
        check_finished(folder)
    if not (config.is_file() and files_of(folder, WEIGHTS)):
        for pattern, kind in OTHERS.items():
            require(not files_of(folder, (pattern,)), f"{folder} {kind}")
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: name a folder made by convert.py, or a download")
    read_json(config)


def check_finished(folder: Path):
    """Raises ValueError for a folder without config.json where `replacing_model` was killed."""
    again = "write the new one again (convert.py: with --force)"
    remedies = {
        BEFORE: f"the former one is whole in {folder / BEFORE}: use it there, or {again}",
        LEAVING: f"to have the former one, move the files in {folder / LEAVING} back into {folder}, or {again}",
        NEW: again,
    }
    for name, remedy in remedies.items():
        if (folder / name).is_dir():
            raise ValueError(f"{folder} is unfinished, since writing a model was interrupted: {remedy}")


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A temporary folder for the files of a model, which take the place of the model in `folder` when all are written; files
    that belong to no model stay. Raises OSError.

    Whenever it is killed, `folder` has the old model or the new one, or no config.json, and `check_folder` says where the old one
    is. The next time, or after an error, the old one comes back. All happens in the folder, which may be a disk of its own."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        (folder / NEW).mkdir()
        yield folder / NEW
        swap(folder)
    finally:
        settle(folder)
        for path in missing:
            with suppress(OSError):  # which is that it is not empty
                path.rmdir()


def swap(folder: Path):
    old = files_of(folder, MODEL)
    for path in old:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(f"{path} is a folder, where a file of the model belongs: move it away")
    (folder / LEAVING).mkdir()
    for path in old:  # the config first, without which a folder is no model
        path.replace(folder / LEAVING / path.name)
    (folder / LEAVING).rename(folder / BEFORE)
    move_up(folder / NEW)


def settle(folder: Path):
    """Brings a swap that was interrupted to its end if the new model is whole, or else the old one back."""
    if (folder / BEFORE).is_dir() and (folder / "config.json").exists():
        shutil.rmtree(folder / BEFORE)
    if (folder / BEFORE).is_dir():
        for path in files_of(folder, MODEL):  # of the new one, since all of the old one are in there
            path.unlink()
        (folder / BEFORE).rename(folder / LEAVING)
    if (folder / LEAVING).is_dir():
        move_up(folder / LEAVING)
        (folder / LEAVING).rmdir()
    if (folder / NEW).is_dir():
        shutil.rmtree(folder / NEW)


def move_up(folder: Path):
    for path in reversed(files_of(folder, MODEL)):  # the config last, which makes a folder a model
        path.replace(folder.parent / path.name)
