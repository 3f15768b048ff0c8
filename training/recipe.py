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
from longllama import cross_batch_extra, require
from training.data import KEYED, OTHERS

SCHEDULES = ("cosine", "constant")
MOST_STEPS = 1 << 53  # up to here a float counts exactly
LEAST_WEIGHT = 1e-9  # of all kinds of document together: shares are taken of it


def is_number(value, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and 0 <= value <= high


def is_whole(value, high: int) -> bool:
    return type(value) is int and 0 <= value <= high


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training, of any kind of data.

    groups: batches per step, whose gradients are averaged. warmup: steps at its start over which the learning rate rises.
    schedule: "cosine", which falls to the share `final` of the learning rate at the end, or "constant".
    """

    steps: int
    learning_rate: float
    groups: int = 1
    schedule: str = "cosine"
    warmup: int = 50
    final: float = 0.05

    COUNTS = ("steps", "groups")  # whole numbers of at least 1
    SHARES = ("learning_rate", "final")  # numbers of 0 to 1
    asks = False  # whether there are pass keys, asked for

    def __post_init__(self):
        for name in self.COUNTS:
            value, most = getattr(self, name), MOST_STEPS if name == "steps" else LARGEST
            fits = is_count(value) and value <= most
            require(fits, f"{name} must be a whole number of 1 to {most}, not {brief(value)}")
        for name in self.SHARES:
            value = getattr(self, name)
            require(is_number(value, 1), f"{name} must be 0 to 1, not {brief(value)}")
        fits = is_whole(self.warmup, LARGEST)
        require(fits, f"warmup must be a whole number of 0 to {LARGEST}, not {brief(self.warmup)}")
        require(self.schedule in SCHEDULES, f"schedule must be one of {SCHEDULES}, not {brief(self.schedule)}")

    @property
    def step_tokens(self) -> int:
        return self.groups * self.group_tokens

    def learning_rate_at(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        risen = (step + 1) / self.warmup if self.warmup else 1.0
        return self.learning_rate * min(risen, self.final + (1 - self.final) * cosine)


@dataclass(frozen=True, kw_only=True)
class PackedPhase(Phase):
    """FoT's training, on packed documents.

    documents, packing, window: a batch is that many documents, of `packing` entries of `window` tokens each.
    ranges: each step draws its cross-batch range from these; null: entries see their own document's past and nothing else.
    contexts: instead of a range, how many entries before it each of the `packing` entries of a document sees.
    mix: kind of document -> its weight at the start and at the end, see `Corpus.batch`.
    cut, repeated, single: the shares of hard kinds of pass key, see `Corpus.passkey`.
    """

    window: int
    documents: int
    packing: int
    ranges: list[int] | None = None
    contexts: list[int] | None = None
    mix: dict[str, list[float]]
    cut: float = 0.0
    repeated: float = 0.0
    single: float = 0.0

    COUNTS = (*Phase.COUNTS, "window", "documents", "packing")
    SHARES = (*Phase.SHARES, "cut", "repeated", "single")

    def __post_init__(self):
        super().__post_init__()
        for name, most in (("ranges", LARGEST), ("contexts", self.documents * self.packing)):
            listed = getattr(self, name)
            fits = listed is None or (isinstance(listed, list) and listed and all(is_whole(n, most) for n in listed))
            require(fits, f"{name} must be null or a list of whole numbers of 0 to {most}, not {brief(listed)}")
        require(self.ranges is None or self.contexts is None, "ranges and contexts exclude each other: leave one out")
        fits = self.contexts is None or len(self.contexts) == self.packing
        require(fits, f"contexts must give one number for each of {self.packing} entries, not {brief(self.contexts)}")
        mix, kinds = self.mix, (*KEYED, *OTHERS)
        fits = isinstance(mix, dict) and mix and set(mix) <= set(kinds)
        fits = fits and all(
            isinstance(pair, list) and len(pair) == 2 and all(is_number(weight, LARGEST) for weight in pair)
            for pair in mix.values()
        )
        require(fits, f"mix must give some of {', '.join(kinds)} two weights each, [start, end], not {brief(mix)}")
        free = OTHERS if self.contrasts else kinds  # the first document of a batch may be of these, see `Corpus.batch`
        drawn = all(sum(mix[kind][end] for kind in free if kind in mix) >= LEAST_WEIGHT for end in (0, 1))
        require(drawn, f"mix must give weight to {' or '.join(free)}, at the start and at the end, not {brief(mix)}")

    @property
    def contrasts(self) -> bool:
        """Whether entries may see other documents."""
        return self.ranges is not None or self.contexts is not None

    @property
    def group_tokens(self) -> int:
        return self.documents * self.packing * self.window

    @property
    def asks(self) -> bool:
        return any(kind in KEYED for kind in self.mix)

    def mix_at(self, done: float) -> dict[str, float]:
        return {kind: (1 - done) * start + done * end for kind, (start, end) in self.mix.items()}

    def extra(self, draw: int, contrast: str = "full") -> list[int]:
        """How many entries before it each entry sees. draw: which of the ranges. contrast: "full", or "detached", which sees the
        same; or for ablations only "positives", or "none"."""
        entries = self.documents * self.packing
        if contrast == "none":
            return [0] * entries
        if contrast == "positives" or not self.contrasts:
            return [b % self.packing for b in range(entries)]
        if self.contexts is not None:
            return [min(self.contexts[b % self.packing], b) for b in range(entries)]
        return cross_batch_extra(entries, self.ranges[draw % len(self.ranges)], self.packing)

    def check_fits(self, config: FastConfig):
        window = config.max_position_embeddings
        require(self.window <= window, f"a window of {self.window}, but max_position_embeddings is {window}")


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
    """A recipe file: seed, weight_decay, answer_weight (of the loss over pass-key digits; default 0), model (config), phases."""

    NAMES = ("seed", "weight_decay", "answer_weight", "model", "phases")

    def __init__(self, path: Path, phase: type[Phase] = PackedPhase, more: tuple[str, ...] = ()):
        """more: names that a kind of data has besides, for it to check."""
        text = read_text(path, "--recipe")
        try:
            self.raw = parse(text)
            self.seed, self.model, phases = self.raw["seed"], self.raw["model"], self.raw["phases"]
            unknown = sorted(self.raw.keys() - {*self.NAMES, *more})
            require(not unknown, f"no recipe has {brief(unknown)}: its names are {', '.join((*self.NAMES, *more))}")
            listed = isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases)
            require(listed, f"phases must be a list of objects, not {brief(phases)}")
            require(bool(phases), "it has no phases")
            self.phases = [phase(**raw) for raw in phases]
            fits = is_whole(self.seed, 2**63 - 1)
            require(fits, f"seed must be a whole number of at most 63 bits, not {brief(self.seed)}")
            weights = [self.raw["weight_decay"], self.raw.get("answer_weight", 0.0)]
            for name, weight in zip(("weight_decay", "answer_weight"), weights):
                require(is_number(weight), f"{name} must be at least 0, not {brief(weight)}")
            self.weight_decay, self.answer_weight = map(float, weights)
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
