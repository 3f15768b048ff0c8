"""Recipes: what a model is trained on, for how long, and at which learning rate."""

import json
import math
import sys
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from reprlib import repr as brief

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import first_line

from cli.texts import read_text
from fast import FastConfig
from fast.files import instead
from fast.model import LARGEST, is_count
from longllama import require
from training.data import KEYED, OTHERS

WARMUP = 50  # steps at the start of each phase over which its learning rate rises
MOST_STEPS = 1 << 53  # up to here a float counts exactly
LEAST_WEIGHT = 1e-9  # of all kinds of document together: shares are taken of it


def is_number(value, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and 0 <= value <= high


def is_whole(value, high: int) -> bool:
    return type(value) is int and 0 <= value <= high


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    documents, packing, window: a batch is that many documents, of `packing` entries of `window` tokens each.
    ranges: each step draws its cross-batch range from these; null: entries see their own document's past and nothing else.
    mix: kind of document -> its weight at the start and at the end, see `Corpus.batch`. groups: batches per step, each a
    cross-batch of its own.
    cut, repeated, single: the shares of hard kinds of pass key, see `Corpus.passkey`.
    """

    steps: int
    learning_rate: float
    window: int
    documents: int
    packing: int
    ranges: list[int] | None
    mix: dict[str, list[float]]
    groups: int = 1
    cut: float = 0.0
    repeated: float = 0.0
    single: float = 0.0

    def __post_init__(self):
        for name in ("steps", "window", "documents", "packing", "groups"):
            value, most = getattr(self, name), MOST_STEPS if name == "steps" else LARGEST
            fits = is_count(value) and value <= most
            require(fits, f"{name} must be a whole number of 1 to {most}, not {brief(value)}")
        for name in ("learning_rate", "cut", "repeated", "single"):
            value = getattr(self, name)
            require(is_number(value, 1), f"{name} must be 0 to 1, not {brief(value)}")
        ranges, mix, kinds = self.ranges, self.mix, (*KEYED, *OTHERS)
        fits = ranges is None or (isinstance(ranges, list) and ranges and all(is_whole(n, LARGEST) for n in ranges))
        require(fits, f"ranges must be null or a list of whole numbers of 0 to {LARGEST}, not {brief(ranges)}")
        fits = isinstance(mix, dict) and mix and set(mix) <= set(kinds)
        fits = fits and all(
            isinstance(pair, list) and len(pair) == 2 and all(is_number(weight, LARGEST) for weight in pair)
            for pair in mix.values()
        )
        require(fits, f"mix must give some of {', '.join(kinds)} two weights each, [start, end], not {brief(mix)}")
        free = kinds if ranges is None else OTHERS  # the first document of a batch may be of these, see `Corpus.batch`
        drawn = all(sum(mix[kind][end] for kind in free if kind in mix) >= LEAST_WEIGHT for end in (0, 1))
        require(drawn, f"mix must give weight to {' or '.join(free)}, at the start and at the end, not {brief(mix)}")

    @property
    def group_tokens(self) -> int:
        return self.documents * self.packing * self.window

    @property
    def step_tokens(self) -> int:
        return self.groups * self.group_tokens

    def mix_at(self, done: float) -> dict[str, float]:
        return {kind: (1 - done) * start + done * end for kind, (start, end) in self.mix.items()}

    def learning_rate_at(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / WARMUP, 0.05 + 0.95 * cosine)


def parse(text: str) -> dict:
    """A JSON object, in which no name stands twice. Raises ValueError."""

    def unique(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
        require(not twice, f"{brief(twice)} stands twice in one object")
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    require(isinstance(raw, dict), "it is no JSON object")
    return raw


class Recipe:
    """A recipe file: seed, weight_decay, answer_weight (of the loss over pass-key digits), model (config), phases."""

    def __init__(self, path: Path):
        text = read_text(path, "--recipe")
        try:
            self.raw = parse(text)
            self.seed, self.model, phases = self.raw["seed"], self.raw["model"], self.raw["phases"]
            listed = isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases)
            require(listed, f"phases must be a list of objects, not {brief(phases)}")
            require(bool(phases), "it has no phases")
            self.phases = [Phase(**phase) for phase in phases]
            fits = is_whole(self.seed, 2**63 - 1)
            require(fits, f"seed must be a whole number of at most 63 bits, not {brief(self.seed)}")
            for name in ("weight_decay", "answer_weight"):
                require(is_number(self.raw[name]), f"{name} must be at least 0, not {brief(self.raw[name])}")
            self.weight_decay, self.answer_weight = float(self.raw["weight_decay"]), float(self.raw["answer_weight"])
            names = {field.name for field in fields(FastConfig)}
            require(isinstance(self.model, dict), f"model must be an object, not {brief(self.model)}")
            unknown = sorted(set(self.model) - names)
            require(not unknown, f"model has fields that no config has: {brief(unknown)}")
        except (ValueError, TypeError, KeyError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise ValueError(f"{path} is {instead(path, f'no recipe such as training/tiny.json: {said}')}") from None
        self.ends = list(accumulate(phase.steps for phase in self.phases))
        self.steps = self.ends[-1]

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase that a step belongs to, and the step's number in it."""
        for phase, end in zip(self.phases, self.ends):
            if step < end:
                return phase, step - end + phase.steps
        raise IndexError(step)

    def continues(self, text: str, step: int) -> bool:
        """Whether a run of another recipe, as JSON text, was, up to this step, a run of this one. So phases can be added to a
        finished run."""
        try:
            other = parse(text)
        except ValueError:
            return False
        begun = sum(end - phase.steps < step for phase, end in zip(self.phases, self.ends))
        rest = [{k: v for k, v in raw.items() if k != "phases"} for raw in (self.raw, other)]
        theirs = other.get("phases")
        same = isinstance(theirs, list) and self.raw["phases"][:begun] == theirs[:begun]
        return rest[0] == rest[1] and same and step <= self.steps

    def tokens_after(self, step: int) -> int:
        left = [min(phase.steps, max(end - step, 0)) for phase, end in zip(self.phases, self.ends)]
        return sum(phase.step_tokens * steps for phase, steps in zip(self.phases, left))
