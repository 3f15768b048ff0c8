"""Instruction and chat tuning through memory, as LongLLaMA-Instruct was made: rows of JSON lines, and loss on answers alone.

    python training/instruct.py --init DIR --data orca.jsonl=0.99 share_gpt.jsonl=0.01   # shares of two sources
    python training/instruct.py --init DIR --data orca.jsonl --checkpoint-layers         # in less memory

A row is an instruction, {"system_prompt": ..., "question": ..., "response": ...}, or a conversation,
{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}. A recipe (training/instruct.json) may
name other fields, and write other prompts around each part. A sample is padded to its full length, at random on the left and on
the right, so that a random part of it lies in memory, not in the local context, when its answer is to be given.
"""

import json
import sys
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from reprlib import repr as brief

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, first_line

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cli.flags import parser_for
from cli.texts import ASSISTANT, OPENING, USER, is_utf8
from fast import FastConfig, FastLlama
from fast.model import LARGEST, is_count
from longllama import require
from tokenizer import Tokenizer
from training.data import Source, is_held_out, json_lines
from training.recipe import Phase, Recipe
from training.recompute import RecomputedBlock, recomputed_cache
from training.stopping import Stop
from training.trainer import LESS, Trainer, add_training_flags, tokenizer_of

IGNORED = -100  # the label of what has no loss
CHECKED = 4  # batches of held-out rows
SAMPLE = 40  # tokens of an answer, and of what it answers


@dataclass(frozen=True, kw_only=True)
class InstructPhase(Phase):
    """samples: of a batch. length: tokens of each, padding included. last_context_length: so many of them stay local, the others
    go through memory; null: the config's. input, output: at most so many tokens of an instruction, and of its answer; null: any,
    if one of the answer is left.
    random_padding: false puts all of it on the right."""

    samples: int
    length: int
    last_context_length: int | None = None
    input: int | None = None
    output: int | None = None
    random_padding: bool = True

    COUNTS = (*Phase.COUNTS, "samples", "length")

    def __post_init__(self):
        super().__post_init__()
        for name in ("last_context_length", "input", "output"):
            value = getattr(self, name)
            fits = value is None or (is_count(value) and value <= LARGEST)
            require(fits, f"{name} must be null or a whole number of 1 to {LARGEST}, not {brief(value)}")
        fits = (self.input or 0) < self.length
        require(fits, f"input {self.input} must be less than length {self.length}: an answer follows")
        require(type(self.random_padding) is bool, f"random_padding must be true or false, not {self.random_padding!r}")

    @property
    def group_tokens(self) -> int:
        return self.samples * self.length

    def check_fits(self, config: FastConfig):
        window = config.max_position_embeddings
        fits = config.mem_layers or self.length <= window
        require(
            fits, f"a length of {self.length}, but max_position_embeddings is {window}, and there are no mem_layers"
        )


@dataclass(frozen=True)
class Fields:
    """Under which names rows have their parts; and who is who in a conversation."""

    system: str = "system_prompt"
    question: str = "question"
    response: str = "response"
    conversation: str = "conversations"
    speaker: str = "from"
    text: str = "value"
    system_speaker: tuple[str, ...] = ("system",)
    user: tuple[str, ...] = ("human", "user")
    model: tuple[str, ...] = ("gpt", "chatgpt", "assistant")


@dataclass(frozen=True)
class Prompts:
    """What is written around the parts of a row. Of an instruction without a system prompt, what is around that is left out."""

    before_system: str = ""
    after_system: str = "\n"
    before_question: str = ""
    after_question: str = "\n"
    before_response: str = ""
    after_response: str = ""
    opening: str = OPENING  # of a conversation
    user: str = USER  # before each of the user's texts
    model: str = ASSISTANT  # before each answer


def settings(kind: type, recipe: Recipe, name: str):
    """Fields, or Prompts, with what a recipe says of them. Raises ValueError."""
    raw = recipe.raw.get(name, {})
    try:
        require(isinstance(raw, dict), "it must be an object")
        made = kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in raw.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of the recipe: {first_line(error)}") from None
    for key, default in vars(kind()).items():
        value = getattr(made, key)
        fits = isinstance(value, type(default)) and (isinstance(value, str) or all(isinstance(x, str) for x in value))
        require(fits, f"{name} of the recipe: {key} must be like {default!r}, not {brief(value)}")
    return made


@dataclass
class Sample:
    """Token ids, of which some are an answer, which has the loss; and some are hidden: no other token sees them."""

    ids: list[int]
    answer: list[bool]
    hidden: list[bool]

    def add(self, ids: list[int], answer: bool = False, hidden: bool = False):
        self.ids += ids
        self.answer += [answer] * len(ids)
        self.hidden += [hidden] * len(ids)


class Rows:
    """Rows of JSON lines as samples."""

    names = ("loss",)

    def __init__(self, sources: list[Source], tokenizer: Tokenizer, recipe: Recipe):
        self.tokenizer = tokenizer
        self.fields, self.prompts = settings(Fields, recipe, "fields"), settings(Prompts, recipe, "prompts")
        self.sources, self.held = [], []  # rows of each source; those held out, of all
        self.left_out = 0  # conversations without an answer
        for source in sources:
            rows = {False: [], True: []}
            for row in self.read(source.path):
                rows[is_held_out(repr(row))].append(row)
            require(bool(rows[False]), f"{source.path} has no rows to train on")
            self.sources.append(rows[False])
            self.held += rows[True]
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        self.pad = tokenizer.pad_id or 0

    def read(self, path: Path) -> list[dict]:
        """The rows of a file, or of all files of a folder. Raises OSError or ValueError, naming the row that is none."""
        files, rows = [path], []
        if path.is_dir():
            files = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
            require(bool(files), f"{path} has no .jsonl or .jsonl.gz files")
        for file in files:
            for where, row in json_lines(file):
                try:
                    self.check(row)
                except ValueError as error:
                    raise ValueError(f"{where} {first_line(error)}") from None
                rows.append(row)
        answered = [row for row in rows if self.is_answered(row)]
        self.left_out += len(rows) - len(answered)
        return answered

    def is_answered(self, row: dict) -> bool:
        turns = row.get(self.fields.conversation)
        return turns is None or any(turn[self.fields.speaker] in self.fields.model for turn in turns)

    def check(self, row: dict):
        fields = self.fields
        require(is_utf8(json.dumps(row, ensure_ascii=False)), "has half a character in it, which is no text")
        if fields.conversation not in row:
            names = [fields.question, fields.response, *[fields.system] * (fields.system in row)]
            wrong = [name for name in names if not isinstance(row.get(name), str)]
            require(not wrong, f"has no {fields.conversation}, and no text under {', '.join(wrong)}")
            return
        turns = row[fields.conversation]
        fits = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        require(fits, f"has no list of turns under {fields.conversation}")
        for turn in turns:
            who, known = turn.get(fields.speaker), (*fields.system_speaker, *fields.user, *fields.model)
            require(who in known, f"has a turn of {brief(who)}, who is none of {', '.join(known)}")
            require(isinstance(turn.get(fields.text), str), f"has a turn without text under {fields.text}")

    def encode(self, row: dict, most_input: int | None = None, most_output: int | None = None) -> Sample:
        """most_input, most_output: tokens of an instruction, and of its answer."""
        if self.fields.conversation in row:
            return self.conversation(row)
        return self.instruction(row, most_input, most_output)

    def instruction(self, row: dict, most_input: int | None, most_output: int | None) -> Sample:
        """`<s>`, the prompt, the answer and `</s>`; prompt and answer are tokenised apart, as they are in use."""
        fields, prompts, sample = self.fields, self.prompts, Sample([], [], [])
        system = row.get(fields.system)
        text = f"{prompts.before_system}{system}{prompts.after_system}" if system else ""
        text += f"{prompts.before_question}{row[fields.question]}{prompts.after_question}"
        sample.add(self.tokenizer.encode(text)[:most_input])
        answer = f"{prompts.before_response}{row[fields.response]}{prompts.after_response}"
        sample.add(self.tokenizer.encode(answer, bos=False, eos=True)[:most_output], answer=True)
        return sample

    def conversation(self, row: dict) -> Sample:
        """`<s>`, the opening, and every turn behind its prefix, each tokenised by itself; a system prompt is put as in an
        instruction. `</s>`, which ends an answer, is hidden: in use it is never read."""
        encode, sample = lambda text: self.tokenizer.encode(text, bos=False), Sample([], [], [])
        sample.add(self.tokenizer.encode(self.prompts.opening))
        for turn in row[self.fields.conversation]:
            who, text = turn[self.fields.speaker], turn[self.fields.text]
            if who in self.fields.system_speaker:
                sample.add(encode(f"{self.prompts.before_system}{text}{self.prompts.after_system}"))
                continue
            answers = who in self.fields.model
            sample.add(encode(self.prompts.model if answers else self.prompts.user))
            sample.add(encode(text), answer=answers)
            if answers:
                sample.add([self.tokenizer.eos_id], answer=True, hidden=True)
        return sample

    def batch(self, rows: list[dict], phase: InstructPhase, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and attention mask, (B, length) each."""
        shape = len(rows), phase.length
        ids, labels, mask = np.full(shape, self.pad), np.full(shape, IGNORED), np.zeros(shape, np.int64)
        for i, row in enumerate(rows):
            sample = self.encode(row, phase.input or phase.length - 1, phase.output)
            new, answer, hidden = (part[: phase.length] for part in (sample.ids, sample.answer, sample.hidden))
            start = int(rng.integers(phase.length - len(new) + 1)) if phase.random_padding else 0
            at = slice(start, start + len(new))
            ids[i, at], mask[i, at], labels[i, at] = new, ~np.array(hidden), np.where(answer, new, IGNORED)
        return tuple(map(torch.from_numpy, (ids, labels, mask)))

    def digest(self) -> str:
        hashed = sha256(repr((self.fields, self.prompts, self.shares)).encode())
        for row in chain(*self.sources):
            hashed.update(repr(row).encode(errors="surrogatepass"))
        return hashed.hexdigest()

    def lines(self, recipe: Recipe) -> list[str]:
        counts = " and ".join(f"{len(rows):,} ({share:.0%})" for rows, share in zip(self.sources, self.shares))
        left_out = f"; {self.left_out:,} conversations without an answer are left out" if self.left_out else ""
        return [f"{counts} rows, and {len(self.held):,} held out{left_out}"]

    def loss(
        self, model: FastLlama, phase: InstructPhase, step: int, seed: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(self.sources), phase.samples, p=self.shares)
        rows = [self.sources[i][rng.integers(len(self.sources[i]))] for i in drawn]
        loss = mean_loss(model, self.batch(rows, phase, rng), phase.last_context_length)
        return loss, [loss]

    def validate(self, model: FastLlama, phase: InstructPhase) -> dict[str, float]:
        """Of the same samples, a part of each in memory; and, where a window holds them, all of it in the local context."""
        ways, rng = {"through memory": phase.last_context_length}, np.random.default_rng(0)
        if phase.length <= model.config.max_position_embeddings:
            ways["all local"] = phase.length
        drawn = [self.held[i] for i in rng.permutation(len(self.held))[: CHECKED * phase.samples]]
        batches = [drawn[i : i + phase.samples] for i in range(0, len(drawn), phase.samples)]
        batches = [self.batch(rows, phase, rng) for rows in batches]
        losses = {how: [mean_loss(model, batch, last).item() for batch in batches] for how, last in ways.items()}
        return {how: sum(each) / len(each) for how, each in losses.items() if each}

    def sample(self, model: FastLlama) -> tuple[str, str] | None:
        """How the model answers the first row that is held out."""
        if not self.held:
            return None
        sample = self.encode(self.held[0])
        prompt, device = sample.ids[: sample.answer.index(True)], model.norm.weight.device
        if not model.config.mem_layers:
            prompt = prompt[-max(model.config.max_position_embeddings - SAMPLE, 1) :]
        new = [i.item() for i in model.generate(torch.tensor([prompt], device=device), SAMPLE, temperature=0)]
        return self.tokenizer.decode(prompt[-SAMPLE:]), self.tokenizer.decode(new)


def mean_loss(model: FastLlama, batch: tuple[Tensor, Tensor, Tensor], last: int | None) -> Tensor:
    device = model.norm.weight.device
    ids, labels, mask = (x.to(device) for x in batch)
    recomputes = torch.is_grad_enabled() and isinstance(model.layers[0], RecomputedBlock)
    cache = recomputed_cache(model) if recomputes else None
    return model(ids, cache, mask, last, labels=labels)[0]


def main():
    here = Path(__file__).resolve().parent
    parser = parser_for(__doc__)
    add_training_flags(parser, here / "instruct.json", here / "runs" / "instruct")
    parser.add_argument(
        "--data",
        type=Source.parse,
        nargs="+",
        required=True,
        metavar="PATH[=WEIGHT]",
        help=".jsonl or .jsonl.gz files, or folders of them; a sample is of each as often as its weight says",
    )
    args = parser.parse_args()
    args.tokenizer = tokenizer_of(args)
    with ending_well(parser, LESS), Stop() as stop:
        recipe = Recipe(args.recipe, InstructPhase, more=("fields", "prompts"))
        try:
            Trainer(args, stop, recipe, lambda tokenizer: Rows(args.data, tokenizer, recipe), {}).run()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
