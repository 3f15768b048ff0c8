"""Models, tokenizers and memories by the names that flags give them, and what may surprise about a prompt."""

import importlib.util
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from cli.ending import first_line, warn

import torch

from fast import FastConfig, FastLlama
from fast.files import instead, read_json, unread
from fast.folder import check_folder
from longllama import Cache, require, split_into_windows
from tokenizer import Tokenizer

MEMORY = ("append", "attend", "fork", "expand")  # what every memory has
TINY = Path(__file__).resolve().parents[1] / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        made = torch.zeros(1, device=name)
        made.item()  # which "meta" refuses
        return made.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"--device {name} is none that torch can use here: auto takes the best there is") from None


def load(
    folder: Path,
    device: torch.device,
    dtype: str = "auto",
    memory: str | None = None,
    weights: str | None = None,
    **overrides,
) -> tuple[FastLlama, Tokenizer]:
    """The model and the tokenizer in a folder. memory: FILE.py:CLASS. weights: "int8" or "int4". overrides: of the config;
    None is none. Raises OSError or ValueError."""
    check_folder(folder)
    tokenizer = read_tokenizer(tokenizer_in(folder))
    dtype = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = with_special_ids(FastConfig.from_json(folder / "config.json"), tokenizer, folder)
    overrides |= {"weight_dtype": weights}
    overrides = with_window(config, {name: value for name, value in overrides.items() if value is not None})
    overrides |= {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    model = FastLlama.from_pretrained(folder, device, dtype, **overrides)
    for text in unlike_its_config(folder, model.config):
        warn(text)
    if memory is not None:
        model.use_memory(own_memory(memory))
    return model, tokenizer


def with_window(config: FastConfig, overrides: dict) -> dict:
    """Overrides of a model's config, completed where they name a window or layers with a memory; with a warning for layers that
    were not trained with one. Raises ValueError for a window that is larger than the model's own."""
    own = config.max_position_embeddings
    window = overrides.get("max_position_embeddings", own)
    if window > own:
        raise ValueError(
            f"--window {window} is larger than the model's own, {own}: memory reads longer texts, --mem-layers"
        )
    if window < own:  # the end of a prompt, and as much again after it, fit
        half = {"last_context_length": min(config.last_context_length, max(window // 2, 1))}
        overrides = half | {"keep_local": min(config.keep_local, window // 4)} | overrides
    if new := sorted({*overrides.get("mem_layers", ())} - {*config.mem_layers}):
        layers = f"layer {new[0]} was" if len(new) == 1 else f"layers {', '.join(map(str, new))} were"
        said = "not trained with a memory: a little of it may help, much of it harms, until training/train.py --init tunes it"
        warn(f"{layers} {said}")
    return overrides


TOKENIZERS = {  # what may lie under the name of a tokenizer.model, by its first bytes
    rb"\Z": "empty: get it from where the model is from",
    rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n": "a tokenizer of tiktoken's, as Llama 3 has it: its tokenizer.json is what is read here",
    rb"\s*[{\[]": "JSON: if it is a tokenizer.json, give it this name",
}  # fmt: skip


def tokenizer_in(folder: Path) -> Path:
    """The file of a model's tokenizer. tokenizer.model, which the released models have, comes before tokenizer.json."""
    fast = folder / "tokenizer.json"
    return fast if fast.is_file() and not (folder / "tokenizer.model").exists() else folder / "tokenizer.model"


def copy_tokenizer(path: Path, folder: Path):
    """The file of a tokenizer, whatever its name, under the name that it has in a model's folder."""
    shutil.copyfile(path, folder / ("tokenizer.json" if path.suffix == ".json" else "tokenizer.model"))


def encode_prompt(tokenizer: Tokenizer, text: str, after_memory: bool = False, where: str = "") -> list[int]:
    """The ids of a prompt, which may go on from a saved memory. Raises ValueError, from `where` on, if there are none."""
    ids = tokenizer.encode(text, bos=not after_memory)
    why = "--load-memory goes on from a text that was read" if after_memory else "its tokenizer puts nothing in front"
    require(bool(ids), f"{where}{why}: the prompt must not be empty")
    return ids


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model's folder. Raises OSError or ValueError."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the tokenizer.model or tokenizer.json in it")
    if not path.is_file():
        name = f"{path.name} and no tokenizer.json" if path.suffix == ".model" else path.name
        raise FileNotFoundError(f"{path.parent} has no {name}: get it from where the model is from")
    with path.open("rb") as file:
        start = file.read(4096)
    found = [kind for form, kind in TOKENIZERS.items() if re.match(form, start)]
    if path.suffix == ".json" and start[:1] in (b"{", b"["):
        found = []
    if kind := instead(path, found[0] if found else ""):
        raise ValueError(f"{path} is {kind}")
    return Tokenizer(path)


def unlike_its_config(folder: Path, config: FastConfig) -> Iterator[str]:
    """What may surprise about the weights in a folder, that were read with this config."""
    if read_json(folder / "config.json").get("tie_word_embeddings") and not config.tie_word_embeddings:
        yield (
            f"{folder}: config.json ties lm_head.weight to model.embed_tokens.weight, and they are two different matrices: "
            "both are used"
        )
    if left := unread(folder):
        yield f"{folder}: {', '.join(left[:3])} {'is' if len(left) == 1 else 'are'} no part of the weights, and not used"


def own_memory(name: str) -> Callable:
    """The class that FILE.py:CLASS names. The file is run. Raises ValueError."""
    file, _, kind = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py":
        raise ValueError(f"--memory {name}: write FILE.py:CLASS, a Python file and a class in it")
    if not path.is_file():
        raise ValueError(f"--memory {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"own_memory_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--memory {file} does not run: {type(error).__name__}: {first_line(error)}") from None
    found = getattr(module, kind, None)
    if not inspect.isclass(found) or not all(hasattr(found, part) for part in MEMORY):
        raise ValueError(f"--memory {name}: {file} has no class {kind} with {', '.join(MEMORY)}")
    return found


def check_vocabulary(where: Path, tokenizer: Tokenizer, config: FastConfig):
    """Raises ValueError where the tokenizer, from `where`, has ids that the model has not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}: "
            "they do not belong together"
        )


def with_special_ids(config: FastConfig, tokenizer: Tokenizer, folder: Path) -> FastConfig:
    """The config, with the ids that its tokenizer has for `<s>`, and for what ends a text where the config's are none that could:
    with a warning. Several may end it. Raises ValueError where the two do not belong together."""
    check_vocabulary(folder, tokenizer, config)
    said = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    ends = tuple(i for i in said if tokenizer.ends_text(i))
    if ends != said:
        ends = ends or (tokenizer.eos_id,)
        listed = [", ".join(map(str, ids)) for ids in (said, ends)]
        told = f"eos_token_id {listed[0]} ends no text of {tokenizer.path.name}: it ends at {listed[1]} instead"
        warn(f"{folder}: {told}")
    bos = config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
    return replace(config, bos_token_id=bos, eos_token_id=ends if len(ends) > 1 else ends[0])


def warnings(
    prompt: str, ids: list[int], new: int, model: FastLlama, tokenizer: Tokenizer, cache: Cache
) -> Iterator[str]:
    """What may surprise about a prompt of these ids that is read after what the cache holds, and `new` tokens after it."""
    start = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
    if start and prompt.lstrip().startswith(start):
        yield f"the prompt begins with the text {start}; the bos token is added without it, so leave it out"
    yield from overflow_warnings(len(ids), new, model, cache)


def overflow_warnings(T: int, new: int, model: FastLlama, cache: Cache) -> Iterator[str]:
    """Whether T tokens and `new` ones after them fill the window so that the text suffers, or ends."""
    config = model.config
    start, stop, keep = split_into_windows(T, config.last_context_length, cache, config)[-1]
    window, local = config.max_position_embeddings, keep + stop - start
    if not config.mem_layers and local > window:  # which the model refuses
        yield f"{local} tokens exceed the window of {window}, and the model has no memory: --mem-layers gives it one"
    if (
        not config.mem_layers and local <= window < local + new - 1
    ):  # the last one is not read; a longer prompt is refused
        yield (
            f"{local} tokens and {new} new ones exceed the window of {window}, and without memory layers the text ends there: "
            f"--max-new-tokens {window - local + 1} avoids it"
        )
    if config.mem_layers and not config.keep_local and local + new > window:
        fits = f"--last-context-length {window - new} avoids it"
        if cache.local_length or new >= window:
            fits = f"at most {max(window - local, 1)} new tokens avoid it"
        yield (
            f"a local context of {local} and {new} new tokens exceed the window of {window}: once it is full, layers "
            f"without memory start again with almost no context; {fits}, --keep-local {window // 4} softens it"
        )
