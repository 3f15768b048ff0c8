"""Reading what a run has left: its checkpoint, every part of which is checked before it is used, and its log."""

import json
import math
import sys
import zipfile
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import first_line, warn

from convert import load_pickled
from fast import FastConfig, FastLlama
from fast.files import is_finite
from fast.model import is_count
from longllama import require

PARTS = {"step": int, "recipe": str, "made_with": dict, "config": dict, "model": dict, "optimizer": dict}
COUNTED = 1 << 24  # steps that AdamW counts, in float32


def read_checkpoint(path: Path) -> tuple[dict, FastConfig]:
    """The parts of a checkpoint, of the right kinds, and the model's config. Raises OSError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is nothing to resume, so leave --resume out")
    state = load_pickled(path)
    fits = zipfile.is_zipfile(path) and undamaged(path)
    require(fits, f"{path} is damaged: what is in it is not what was written; start anew, without --resume")
    for part, kind in PARTS.items():
        fits = isinstance(state, dict) and isinstance(state.get(part), kind)
        require(fits, f"{path} is not a checkpoint of a training run: it has no {part}")
    require(is_count(state["step"]), f"{path}: step must be a whole number of at least 1, not {state['step']}")
    unknown = state["config"].keys() - {field.name for field in fields(FastConfig)}
    require(not unknown, f"{path}: config has fields that no config has: {sorted(map(str, unknown))[:3]}")
    try:
        right = state["made_with"].get("config") in (None, digest(state["config"]))  # None: before there was one
        require(right, "it is not the one that was written")
        config = FastConfig(**state["config"])
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: config: {first_line(error)}") from None
    require(
        config.num_hidden_layers <= len(state["model"]), f"{path}: model has fewer weights than its config has layers"
    )
    return state, config


def undamaged(path: Path) -> bool:
    """By the checksums of the archive, which mapping does not look at."""
    with zipfile.ZipFile(path) as file:
        return file.testzip() is None


def digest(config: dict) -> str:
    return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def check_state(path: Path, state: dict, model: FastLlama, recipe_model: dict):
    """Raises ValueError where a checkpoint does not hold what a run of this model, made by a recipe, has written."""
    try:
        named = FastConfig(**asdict(model.config) | recipe_model) == model.config
    except ValueError:
        named = False
    require(named, f"{path}: config is not that of its recipe")
    wanted = {name: x for name, x in model.named_parameters() if x.requires_grad}
    kept = wanted if len(wanted) < len([*model.parameters()]) else model.state_dict()  # not what is frozen
    check_tensors(f"{path}: model", state["model"], {name: x.shape for name, x in kept.items()})
    tied = [state["model"].get(name) for name in ("embed_tokens.weight", "lm_head.weight")]
    fits = None in tied or not model.config.tie_word_embeddings or torch.equal(*tied)
    require(fits, f"{path}: model: tied weights differ")
    found, step = state["optimizer"].get("state"), float(min(state["step"], COUNTED))
    require(
        isinstance(found, dict) and found.keys() == wanted.keys(), f"{path}: optimizer has not the state of each weight"
    )
    for name, x in wanted.items():
        where = f"{path}: optimizer: {name}"
        check_tensors(where, found[name], {"step": torch.Size(), "exp_avg": x.shape, "exp_avg_sq": x.shape})
        fits = found[name]["step"].item() == step and bool((found[name]["exp_avg_sq"] >= 0).all())
        require(fits, f"{where} is not that of step {state['step']}")


def check_tensors(where: str, found, shapes: dict[str, torch.Size]):
    require(isinstance(found, dict), f"{where} is no dictionary of tensors")
    for name in [*(shapes.keys() - found.keys()), *(found.keys() - shapes.keys())]:
        raise ValueError(
            f"{where}: {name} is {'missing' if name in shapes else 'not expected'}: start anew, without --resume"
        )
    for name, shape in shapes.items():
        x = found[name]
        fits = isinstance(x, Tensor) and not x.is_nested and x.layout == torch.strided and x.device.type == "cpu"
        fits = fits and (x.shape, x.dtype) == (shape, torch.float32)
        require(fits, f"{where}: {name} must be a tensor of {list(shape)} in float32")
        check_finite(where, name, x)


def check_finite(where: str, name: str, x: Tensor):
    require(is_finite(x), f"{where}: {name} has values that are not finite")


def read_log(path: Path, step: int, names: tuple[str, ...]) -> list[dict]:
    """The log's lines up to a step, with these losses. It is only a log: where lines are missing or broken, a warning says so."""
    kept = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
            if is_log_line(found, names) and found["step"] <= step:
                kept[found["step"]] = found
        except (ValueError, RecursionError):
            continue
    if len(kept) < step:
        warn(f"{path} lacks {step - len(kept)} of {step} steps, or their lines are broken: going on without them")
    return [kept[number] for number in sorted(kept)]


def is_log_line(line, names: tuple[str, ...]) -> bool:
    fits = isinstance(line, dict) and {"step", *names} <= line.keys() <= {"step", *names, "held_out"}
    fits = fits and is_count(line["step"]) and are_losses({name: line[name] for name in names})
    return fits and are_losses(line.get("held_out", {}))


def are_losses(found) -> bool:
    return isinstance(found, dict) and all(type(x) is float and math.isfinite(x) for x in found.values())
