"""FoT training: cross-batch attention over packed documents (Tworkowski et al. 2023, sections 3.2 and A).

    python training/fetch_data.py && python training/train.py              # makes the tiny model, from nothing
    python training/train.py --resume                                      # goes on from the last checkpoint
    torchrun --nproc-per-node 8 training/train.py --recipe R --init DIR    # FoT-tunes a converted checkpoint on 8 GPUs

A recipe (training/tiny.json, training/tune.json) is the model's config and a list of phases; each phase says how long, at
which learning rate, on what mix of documents, and with which cross-batch ranges it trains. The output folder gets
losses.jsonl and checkpoint.pt while training runs, and at the end config.json, model.safetensors and tokenizer.model.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from cli.flags import number, parser_for
from cli.loading import TINY, check_vocabulary, pick_device
from convert import load_pickled, save_pretrained
from fast import FastConfig, FastLlama
from fast.files import replacing
from fast.model import is_count
from longllama import cross_batch_extra, require
from tokenizer import Tokenizer
from training.data import DATA, KEYED, OTHERS, Corpus

WARMUP = 50  # steps at the start of each phase over which its learning rate rises
CLIP = 1.0  # largest norm of the gradient
REPORT, CHECKPOINT = 20, 100  # steps between progress lines, and between checkpoints


def is_number(value, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and 0 <= value <= high


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
            value = getattr(self, name)
            require(is_count(value), f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("learning_rate", "cut", "repeated", "single"):
            require(is_number(getattr(self, name), 1), f"{name} must be 0 to 1, not {getattr(self, name)!r}")
        ranges, mix, kinds = self.ranges, self.mix, (*KEYED, *OTHERS)
        fits = ranges is None or (isinstance(ranges, list) and ranges and all(n == 0 or is_count(n) for n in ranges))
        require(fits, f"ranges must be null or a list of whole numbers, not {ranges!r}")
        fits = isinstance(mix, dict) and mix and set(mix) <= set(kinds)
        fits = fits and all(
            isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in mix.values()
        )
        require(fits, f"mix must give some of {', '.join(kinds)} two weights each, [start, end], not {mix!r}")
        free = kinds if ranges is None else OTHERS  # the first document of a batch may be of these, see `Corpus.batch`
        drawn = all(sum(mix[kind][end] for kind in free if kind in mix) > 0 for end in (0, 1))
        require(drawn, f"mix must give weight to {' or '.join(free)}, at the start and at the end, not {mix!r}")

    @property
    def step_tokens(self) -> int:
        return self.groups * self.documents * self.packing * self.window

    def mix_at(self, done: float) -> dict[str, float]:
        return {kind: (1 - done) * start + done * end for kind, (start, end) in self.mix.items()}

    def learning_rate_at(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / WARMUP, 0.05 + 0.95 * cosine)


class Recipe:
    """A recipe file: seed, weight_decay, answer_weight (of the loss over pass-key digits), model (config), phases."""

    def __init__(self, path: Path):
        try:
            self.raw = json.loads(path.read_text(encoding="utf-8"))
            self.seed, self.weight_decay = self.raw["seed"], self.raw["weight_decay"]
            self.answer_weight, self.model = self.raw["answer_weight"], self.raw["model"]
            self.phases = [Phase(**phase) for phase in self.raw["phases"]]
            require(bool(self.phases), "it has no phases")
            fits = self.seed == 0 or (is_count(self.seed) and self.seed < 2**63)
            require(fits, f"seed must be a whole number of at most 63 bits, not {self.seed!r}")
            for name in ("weight_decay", "answer_weight"):
                require(is_number(self.raw[name]), f"{name} must be at least 0, not {self.raw[name]!r}")
            names = {field.name for field in fields(FastConfig)}
            require(isinstance(self.model, dict), f"model must be an object, not {self.model!r}")
            require(set(self.model) <= names, f"model has fields that no config has: {sorted(set(self.model) - names)}")
        except (ValueError, TypeError, KeyError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no recipe such as training/tiny.json: {said}") from None
        self.steps = sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase that a step belongs to, and the step's number in it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)

    def continues(self, other: dict, step: int) -> bool:
        """Whether a run of another recipe was, up to this step, a run of this one. So phases can be added to a finished run."""
        begun = sum(1 for i, _ in enumerate(self.phases) if sum(phase.steps for phase in self.phases[:i]) < step)
        rest = [{k: v for k, v in raw.items() if k != "phases"} for raw in (self.raw, other)]
        return rest[0] == rest[1] and self.raw["phases"][:begun] == other["phases"][:begun] and step <= self.steps

    def tokens_after(self, step: int) -> int:
        return sum(self.at(s)[0].step_tokens for s in range(step, self.steps))


def extra_contexts(phase: Phase, seed: tuple[int, ...], contrast: str = "full") -> list[int]:
    """How many entries before it each entry sees. contrast: "full", or for ablations only "positives", or "none"."""
    entries = phase.documents * phase.packing
    if contrast == "none":
        return [0] * entries
    if contrast == "positives" or phase.ranges is None:
        return [b % phase.packing for b in range(entries)]
    return cross_batch_extra(entries, phase.ranges[sum(seed) % len(phase.ranges)], phase.packing)


def losses(model: FastLlama, batch, extra: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over all tokens, and over the digits of pass keys asked for (0 without any)."""
    inputs, targets, answers = (torch.from_numpy(x).to(device) for x in (batch.inputs, batch.targets, batch.answers))
    with torch.autocast(device.type, torch.bfloat16):
        logits = model.forward_cross_batch(inputs, extra)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    answers = answers.flatten()
    return loss.mean(), (loss * answers).sum() / answers.sum().clamp(min=1)


class Trainer:
    def __init__(self, args: argparse.Namespace):
        self.args, self.recipe = args, Recipe(args.recipe)
        require(args.output.is_dir() or not args.output.exists(), f"--output {args.output} is no folder: name one")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(args.device) if self.world > 1 else pick_device(args.device)
        if self.world > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        for phase in self.recipe.phases:
            if phase.groups % self.world:
                raise ValueError(f"groups {phase.groups} must be a multiple of the {self.world} processes")
        self.checkpoint, self.log = args.output / "checkpoint.pt", args.output / "losses.jsonl"
        if self.checkpoint.exists() and not args.resume:
            raise FileExistsError(f"{args.output} has a run in it: add --resume to go on, or name another --output")
        if (args.output / "config.json").exists() and not args.resume:
            raise FileExistsError(f"{args.output} has a model in it, which is not replaced: name another --output")
        self.corpus = Corpus(args.data, Tokenizer(args.tokenizer))
        self.made_with = {  # besides the recipe; a run is resumed with the same
            "--tokenizer": sha256(args.tokenizer.read_bytes()).hexdigest(),
            "--data": self.corpus.digest(),
            "--contrast": args.contrast,
        }
        state = self.read_checkpoint() if args.resume else None
        self.model = self._model(state)
        check_vocabulary(args.tokenizer, self.corpus.tokenizer, self.model)
        widest, window = max(phase.window for phase in self.recipe.phases), self.model.config.max_position_embeddings
        require(widest <= window, f"{args.recipe} has a window of {widest}, but max_position_embeddings is {window}")
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        self.step, self.losses = 0, []
        if state:
            self.go_on_from(state)

    def _model(self, state: dict | None) -> FastLlama:
        torch.manual_seed(self.recipe.seed)
        if state:
            model = FastLlama(FastConfig(**state["config"]))
        elif self.args.init:
            model = FastLlama.from_pretrained(self.args.init, **self.recipe.model).train()
        else:
            model = FastLlama(FastConfig(**self.recipe.model))
        model = model.to(self.device)
        if self.world > 1:
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
            register_fsdp_forward_method(model, "forward_cross_batch")
        return model

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; each process takes its share of the groups. Returns this step's two losses."""
        phase, step = self.recipe.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.learning_rate_at(step)
        total = torch.zeros(2, device=self.device)
        for group in range(self.rank, phase.groups, self.world):
            seed = (self.recipe.seed, self.step, group)
            mix = phase.mix_at(step / phase.steps)
            hard = {"cut": phase.cut, "repeated": phase.repeated, "single": phase.single}
            batch = self.corpus.batch(seed, phase.documents, phase.window, mix, extra_contexts(phase, seed), **hard)
            extra = extra_contexts(phase, seed, self.args.contrast)
            loss, answer_loss = losses(self.model, batch, extra, self.device)
            # Sharded gradients are averaged over processes, so a process's own are averaged over its own groups.
            ((loss + self.recipe.answer_weight * answer_loss) * self.world / phase.groups).backward()
            total += torch.stack((loss.detach(), answer_loss.detach())) / phase.groups
        if self.world > 1:
            dist.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return tuple(total.tolist())

    def run(self):
        stop = min(self.args.stop_after or self.recipe.steps, self.recipe.steps)
        started, tokens = time.monotonic(), 0
        self.args.output.mkdir(parents=True, exist_ok=True)
        while self.step < stop:
            phase, _ = self.recipe.at(self.step)
            loss, answer_loss = self.train_step()
            tokens += phase.step_tokens
            self.losses.append({"step": self.step, "loss": loss, "answer_loss": answer_loss})
            if self.step % REPORT == 0 and self.rank == 0:
                seconds = time.monotonic() - started
                left = self.recipe.tokens_after(self.step) * seconds / tokens / 60
                print(
                    f"step {self.step}/{self.recipe.steps}  loss {loss:.4f}  answers {answer_loss:.4f}  "
                    f"{tokens / seconds:,.0f} tokens/s  {left:.0f} min left",
                    flush=True,
                )
            if self.step % CHECKPOINT == 0 or self.step == stop:
                self.save_checkpoint()
        self.export()
        if self.world > 1:
            dist.barrier()  # no process leaves while another still needs it

    # Checkpoints hold whole tensors, not shards, so one written by 8 processes resumes on 1.

    def _state(self, full: bool) -> tuple[dict, dict]:
        return get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(full_state_dict=full, cpu_offload=full)
        )

    def save_checkpoint(self):
        model, optimizer = self._state(full=True)
        if self.rank == 0:
            state = {"step": self.step, "recipe": json.dumps(self.recipe.raw), "made_with": self.made_with}
            state |= {"config": asdict(self.model.config), "model": model, "optimizer": optimizer}
            # The log first: steps in it that no checkpoint has are left out when the run is resumed.
            with replacing(self.log) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.losses), encoding="utf-8")
            with replacing(self.checkpoint) as unfinished:
                try:
                    torch.save(state, unfinished)
                except RuntimeError:  # which is what torch makes of a failed write
                    raise OSError("is the disk full?") from None

    def read_checkpoint(self) -> dict:
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"{self.checkpoint} is missing: there is nothing to resume, so leave --resume out")
        state, parts = load_pickled(self.checkpoint), {"step", "recipe", "made_with", "config", "model", "optimizer"}
        fits = isinstance(state, dict) and parts <= set(state)
        require(fits, f"{self.checkpoint} is not a checkpoint of a training run")
        fits = self.recipe.continues(json.loads(state["recipe"]), state["step"])
        require(fits, f"{self.checkpoint} was made with another recipe than {self.args.recipe}")
        for flag, value in self.made_with.items():
            require(
                state["made_with"].get(flag) == value, f"{self.checkpoint} was made with another {flag}: give the same"
            )
        return state

    def go_on_from(self, state: dict):
        whole = isinstance(state["model"], dict) and state["model"].keys() == self.model.state_dict().keys()
        require(whole, f"{self.checkpoint} has not the weights of its model: start anew, without --resume")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.step = state["step"]
        lines = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        self.losses = [line for line in lines if line["step"] <= self.step]
        stop = self.args.stop_after or self.step
        require(self.step <= stop, f"--stop-after {stop}: the run is at step {self.step} already")

    def export(self):
        """Writes the model as generate.py reads it, in bfloat16."""
        weights, _ = self._state(full=True)
        if self.rank == 0:
            model = FastLlama(self.model.config)
            model.load_state_dict(weights)
            save_pretrained(model.to(torch.bfloat16), self.args.output)
            kept = self.args.output / "tokenizer.model"
            if not (kept.exists() and kept.samefile(self.args.tokenizer)):
                shutil.copyfile(self.args.tokenizer, kept)
            print(f"wrote {self.args.output}")


def main():
    here = Path(__file__).resolve().parent
    parser = parser_for(__doc__)
    parser.add_argument(
        "--recipe", type=Path, default=here / "tiny.json", help="model and phases (default: the tiny model)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder of .txt files, one document each (default: training/data)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=here / "runs" / "tiny",
        help="folder for checkpoint and model, in bfloat16 (default: training/runs/tiny)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="default: the one in the folder of --init, or else the tiny model's"
    )
    parser.add_argument("--init", type=Path, help="start from the weights in this folder instead of random ones")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument(
        "--stop-after",
        type=number(int, 1),
        metavar="STEP",
        help="stop at this step: with a checkpoint, and the model so far",
    )
    parser.add_argument("--contrast", choices=["full", "positives", "none"], default="full",
                        help="for ablations: which contexts besides its own an entry sees")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer or (args.init or TINY) / "tokenizer.model"
    with ending_well(parser):
        try:
            Trainer(args).run()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
