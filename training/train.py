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
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, say, tell, warn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from cli.flags import check_new_folder, new_path, number, parser_for
from cli.loading import TINY, check_vocabulary, pick_device, read_tokenizer, unlike_its_config, with_special_ids
from convert import save_pretrained
from fast import FastConfig, FastLlama
from fast.files import replacing
from fast.folder import check_folder
from longllama import cross_batch_extra, require
from tokenizer import Tokenizer
from training.checkpoint import check_finite, check_state, digest, read_checkpoint, read_log
from training.data import DATA, KEYED, Corpus
from training.recipe import Phase, Recipe
from training.stopping import Stop

CLIP = 1.0  # largest norm of the gradient
REPORT, CHECKPOINT = 20, 100  # steps between progress lines, and between checkpoints
TRAINED, EXPORTED = 12, 2  # bytes of a weight: with AdamW's two averages, all in float32; and in bfloat16


def extra_contexts(phase: Phase, seed: tuple[int, ...], contrast: str = "full") -> list[int]:
    """How many entries before it each entry sees. contrast: "full", or "detached", which sees the same; or for ablations only
    "positives", or "none"."""
    entries = phase.documents * phase.packing
    if contrast == "none":
        return [0] * entries
    if contrast == "positives" or phase.ranges is None:
        return [b % phase.packing for b in range(entries)]
    return cross_batch_extra(entries, phase.ranges[sum(seed) % len(phase.ranges)], phase.packing)


def losses(
    model: FastLlama, batch, extra: list[int], detached: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over all tokens, and over the digits of pass keys asked for (0 without any)."""
    inputs, targets, answers = (torch.from_numpy(x).to(device) for x in (batch.inputs, batch.targets, batch.answers))
    with torch.autocast(device.type, torch.bfloat16):
        logits = model.forward_cross_batch(inputs, extra, detached)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    answers = answers.flatten()
    return loss.mean(), (loss * answers).sum() / answers.sum().clamp(min=1)


def parameter_count(config: FastConfig) -> int:
    with torch.device("meta"):
        one = FastLlama(replace(config, num_hidden_layers=1, mem_layers=()))
    layer = sum(p.numel() for p in one.layers.parameters())
    return sum(p.numel() for p in one.parameters()) + (config.num_hidden_layers - 1) * layer


def memory_of(device: torch.device) -> float:
    """Bytes; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Trainer:
    def __init__(self, args: argparse.Namespace, stop: Stop):
        self.args, self.stop, self.recipe = args, stop, Recipe(args.recipe)
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
        if args.init:
            check_folder(args.init)
        tokenizer = read_tokenizer(args.tokenizer)
        state, config = read_checkpoint(self.checkpoint) if args.resume else (None, self.new_config(tokenizer))
        self.check_room(config)
        self.corpus = Corpus(args.data, tokenizer)
        for phase in self.recipe.phases:
            if any(kind in KEYED for kind in phase.mix):  # a key for which windows are too small is told now
                self.corpus.passkey(np.random.default_rng(0), phase.window, phase.window, dense=True)
        self.made_with = {  # besides the recipe; a run is resumed with the same
            "--tokenizer": sha256(args.tokenizer.read_bytes()).hexdigest(),
            "--data": self.corpus.digest(),
            "--contrast": args.contrast,
        }
        if state:
            self.check_made_with(state)
        self.model = self._model(config, state)
        check_vocabulary(args.tokenizer, tokenizer, config)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        self.step, self.saved, self.losses = 0, 0, []
        if state:
            self.go_on_from(state)

    def new_config(self, tokenizer: Tokenizer) -> FastConfig:
        """The recipe's, and with --init what it changes in that one. Special ids are the tokenizer's."""
        named, ids = self.recipe.model, {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if tokenizer.sp.pad_id() >= 0:
            ids["pad_token_id"] = tokenizer.sp.pad_id()
        for name, value in ids.items():
            fits = named.get(name, value) == value
            require(fits, f"{self.args.recipe}: {name} is {named.get(name)}, but {value} in {self.args.tokenizer}")
        if not self.args.init:
            return FastConfig(**named | ids)
        config = FastConfig.from_json(self.args.init / "config.json", **named)
        config = with_special_ids(config, tokenizer, self.args.init)
        return replace(config, pad_token_id=ids.get("pad_token_id", config.pad_token_id))

    def check_room(self, config: FastConfig):
        """Refuses, before the work begins, what cannot be: of the window, the memory and the disk."""
        recipe, phases, window = self.args.recipe, self.recipe.phases, config.max_position_embeddings
        widest = max(phase.window for phase in phases)
        require(widest <= window, f"{recipe} has a window of {widest}, but max_position_embeddings is {window}")
        weights, has = parameter_count(config), memory_of(self.device)
        logits = 4 * config.vocab_size * max(phase.group_tokens for phase in phases)
        needs = (TRAINED + 4) * weights / self.world + logits  # and 4 bytes of a gradient
        told = f"training takes {needs / 1e9:,.0f} GB at the least, and {self.device} has {has / 1e9:,.0f}"
        require(needs <= has, f"{recipe}: {told}: make the model, or documents x packing x window, smaller")
        if self.rank == 0:
            check_new_folder("--output", self.args.output, (TRAINED + EXPORTED) * weights)

    def check_made_with(self, state: dict):
        fits = self.recipe.continues(state["recipe"], state["step"])
        require(fits, f"{self.checkpoint} was made with another recipe than {self.args.recipe}")
        for flag, value in self.made_with.items():
            same = str(state["made_with"].get(flag)) == value
            require(same, f"{self.checkpoint} was made with another {flag}: give the same")
        stop = self.args.stop_after or state["step"]
        require(state["step"] <= stop, f"--stop-after {stop}: the run is at step {state['step']} already")

    def _model(self, config: FastConfig, state: dict | None) -> FastLlama:
        torch.manual_seed(self.recipe.seed)
        if self.args.init and not state:
            model = FastLlama.from_pretrained(self.args.init, **asdict(config)).train()
            for text in unlike_its_config(self.args.init, model.config):
                warn(text)
            for name, weight in model.hf_tensors().items():
                check_finite(f"--init {self.args.init}", name, weight)
        else:
            model = FastLlama(config)
        model = model.to(self.device)
        if self.world > 1:
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
            register_fsdp_forward_method(model, "forward_cross_batch")
        return model

    def train_step(self) -> tuple[float, float, bool]:
        """One optimizer step; each process takes its share of the groups. Returns this step's two losses, and whether any process
        was told to stop. Raises ValueError, before the step is taken, where it is not finite."""
        phase, step = self.recipe.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.learning_rate_at(step)
        total = torch.zeros(3, device=self.device)
        for group in range(self.rank, phase.groups, self.world):
            seed = (self.recipe.seed, self.step, group)
            mix = phase.mix_at(step / phase.steps)
            hard = {"cut": phase.cut, "repeated": phase.repeated, "single": phase.single}
            batch = self.corpus.batch(seed, phase.documents, phase.window, mix, extra_contexts(phase, seed), **hard)
            extra, detached = extra_contexts(phase, seed, self.args.contrast), self.args.contrast == "detached"
            loss, answer_loss = losses(self.model, batch, extra, detached, self.device)
            # Sharded gradients are averaged over processes, so a process's own are averaged over its own groups.
            ((loss + self.recipe.answer_weight * answer_loss) * self.world / phase.groups).backward()
            total[:2] += torch.stack((loss.detach(), answer_loss.detach())) / phase.groups
        total[2] = self.stop.number
        if self.world > 1:
            dist.all_reduce(total)  # so that all processes decide alike
        norm = whole(clip_grad_norm_(self.model.parameters(), CLIP)).item()
        loss, answer_loss, stopped = total.tolist()
        finite = all(map(math.isfinite, (loss, answer_loss, norm)))
        self.require_finite(finite, f"step {self.step + 1} (loss {loss}, gradient {norm}) is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, answer_loss, stopped > 0

    def require_finite(self, fits: bool, what: str):
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
        require(fits, f"{what}: {kept}; a smaller learning_rate in {self.args.recipe} may help, in another --output")

    def run(self):
        last = min(self.args.stop_after or self.recipe.steps, self.recipe.steps)
        started, tokens = time.monotonic(), 0
        self.stop.waits = True
        while self.step < last:
            phase, _ = self.recipe.at(self.step)
            loss, answer_loss, stopped = self.train_step()
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
            stopped = stopped and self.step < last
            if self.step % CHECKPOINT == 0 or self.step == last or stopped:
                self.save_checkpoint()
            if stopped:
                self.leave()
                if self.rank == 0:
                    tell(f"stopped after step {self.step}, go on with: {self.command()}")
                sys.exit(128 + (self.stop.number or signal.SIGTERM))  # which came to another process
        self.export()
        self.leave()

    def leave(self):
        """No process leaves while another still needs it."""
        if self.world > 1:
            dist.barrier()

    def command(self) -> str:
        """What goes on with this run."""
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if self.world > 1 else ["python"]
        return shlex.join([*start, *sys.argv, *["--resume"] * (not self.args.resume)])

    # Checkpoints hold whole tensors, not shards, so one written by 8 processes resumes on 1.

    def _state(self, full: bool) -> tuple[dict, dict]:
        return get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(full_state_dict=full, cpu_offload=full)
        )

    def save_checkpoint(self):
        norm = whole(get_total_norm([p.detach() for p in self.model.parameters()])).item()
        self.require_finite(math.isfinite(norm), f"the weights of step {self.step} are not finite")
        model, optimizer = self._state(full=True)
        if self.rank == 0:
            config = asdict(self.model.config)
            made_with = self.made_with | {"config": digest(config)}
            state = {"step": self.step, "recipe": json.dumps(self.recipe.raw), "made_with": made_with}
            state |= {"config": config, "model": model, "optimizer": optimizer}
            self.args.output.mkdir(parents=True, exist_ok=True)
            # The log first: steps in it that no checkpoint has are left out when the run is resumed.
            with replacing(self.log) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.losses), encoding="utf-8")
            with replacing(self.checkpoint) as unfinished:
                try:
                    torch.save(state, unfinished)
                except RuntimeError:  # which is what torch makes of a failed write
                    raise OSError("is the disk full?") from None
        self.saved = self.step

    def go_on_from(self, state: dict):
        check_state(self.checkpoint, state, self.model, self.recipe.model)
        _, own = self._state(full=False)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict={"state": state["optimizer"]["state"], "param_groups": own["param_groups"]},
            options=StateDictOptions(full_state_dict=True),
        )
        self.step = self.saved = state["step"]
        if self.rank == 0:
            self.losses = read_log(self.log, self.step)

    def export(self):
        """Writes the model as generate.py reads it, in bfloat16."""
        weights, _ = self._state(full=True)
        if self.rank == 0:
            model = FastLlama(self.model.config)
            model.load_state_dict(weights)
            source = self.args.init or self.args.output  # where an earlier export has put what goes with them
            save_pretrained(model.to(torch.bfloat16), self.args.output, self.args.tokenizer, source)
            say(f"wrote {self.args.output}\n")


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
        type=new_path,
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
    parser.add_argument("--contrast", choices=["full", "positives", "none", "detached"], default="full",
                        help="for ablations: which contexts besides its own an entry sees; "
                        "detached: all, without gradients into them")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer or (args.init or TINY) / "tokenizer.model"
    with ending_well(parser), Stop() as stop:
        try:
            Trainer(args, stop).run()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
