"""The training loop: steps over some kind of data, with checkpoints, in one process or several.

A kind of data is an object with
    names                      what is reported of a step: "loss", and more
    digest()                   a hash of all of it
    lines(recipe)              what to tell of it first
    loss(model, phase, step, seed) -> the loss of a batch, with gradients, and a number for each of `names`
    validate(model, phase)     -> losses on what is held out: {"with memory": x, "without": y}; {} where nothing is held out
    sample(model) -> prompt and continuation, or None
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import printable, tell, warn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from cli.flags import check_new_folder, new_path, number
from cli.loading import (
    DTYPES,
    TINY,
    check_vocabulary,
    pick_device,
    read_tokenizer,
    tokenizer_in,
    unlike_its_config,
    with_special_ids,
)
from cli.picture import import_pyplot, save_picture
from cli.progress import memory_of
from convert import save_pretrained
from fast import FastConfig, FastLlama
from fast.files import as_weights, replacing
from fast.folder import check_folder
from fast.tuned import fingerprint, write_tuned
from longllama import require
from tokenizer import Tokenizer
from training.checkpoint import check_finite, check_state, digest, read_checkpoint, read_log
from training.lora import PRODUCTS, add_lora, merged
from training.recipe import Recipe
from training.recompute import recompute_layers
from training.stopping import Stop

CLIP = 1.0  # largest norm of the gradient
REPORT = 20  # steps between progress lines
MEANS = 200  # points of a curve, at most
TRAINED, EXPORTED = 12, 2  # bytes of a weight: with AdamW's two averages, all in float32; and in bfloat16
LESS = "--checkpoint-layers, --tune memory, --lora, or a recipe whose batches are smaller"  # where memory is too small
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def parameter_count(config: FastConfig) -> int:
    with torch.device("meta"):
        one = FastLlama(replace(config, num_hidden_layers=1, mem_layers=()))
    layer = sum(p.numel() for p in one.layers.parameters())
    return sum(p.numel() for p in one.parameters()) + (config.num_hidden_layers - 1) * layer


def freeze_but_memory_layers(model: FastLlama):
    """What is trained is the attention of memory layers, in float32; the rest is left as it is. Their norms are, too: what a
    norm's weight could learn, the columns of qkv_proj that it scales can."""
    require(
        bool(model.config.mem_layers),
        "--tune memory trains mem_layers, and the model has none: name some in the recipe",
    )
    model.requires_grad_(False)
    for i in model.config.mem_layers:
        for product in (model.layers[i].qkv_proj, model.layers[i].o_proj):
            product.float().requires_grad_(True)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Trainer:
    def __init__(self, args: argparse.Namespace, stop: Stop, recipe: Recipe, read_data: Callable, settings: dict):
        """read_data(tokenizer): a kind of data. settings: flag -> value, those that a run has to be resumed with, besides data
        and tokenizer."""
        self.args, self.stop, self.recipe = args, stop, recipe
        self.dtype = DTYPES[args.dtype]  # that is computed in; weights that are trained are in float32
        self.freezes = bool(args.lora) or args.tune == "memory"  # weights, which are in that dtype
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(args.device)
        if self.world > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            patience = timedelta(hours=2)  # of the others, while one of them writes a large checkpoint
            dist.init_process_group(backend, timeout=patience)
        for phase in self.recipe.phases:
            if phase.groups % self.world:
                raise ValueError(f"groups {phase.groups} must be a multiple of the {self.world} processes")
        self.checkpoint, self.log = args.output / "checkpoint.pt", args.output / "losses.jsonl"
        self.check_folders()
        tokenizer = read_tokenizer(args.tokenizer)
        state, config = read_checkpoint(self.checkpoint) if args.resume else (None, self.new_config(tokenizer))
        self.check_room(config)
        self.data = read_data(tokenizer)
        self.made_with = {  # besides the recipe
            "--tokenizer": sha256(args.tokenizer.read_bytes()).hexdigest(),
            "--data": self.data.digest(),
            **settings,
        }
        model = self.start(config, fresh=state is None)
        if args.lora:
            self.made_with["--lora"] = f"{args.lora} {' '.join(args.lora_products or PRODUCTS[:2])}"
        if args.tune == "memory":
            self.made_with["--tune"] = args.tune
        if args.dtype != "bfloat16":
            self.made_with["--dtype"] = args.dtype
        if self.freezes:
            self.made_with["--init"] = fingerprint(as_weights(model.hf_tensors()))
        if state:
            self.check_made_with(state)
        self.model = self.prepared(model)
        check_vocabulary(args.tokenizer, tokenizer, config)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        decays = {True: self.recipe.weight_decay, False: 0.0}  # matrices do, vectors do not
        groups = [([p for p in trainable if (p.dim() > 1) == matrix], decay) for matrix, decay in decays.items()]
        groups = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.step, self.saved, self.losses = 0, 0, []
        if state:
            self.go_on_from(state)

    def check_folders(self):
        args = self.args
        if self.checkpoint.exists() and not args.resume:
            raise FileExistsError(f"{args.output} has a run in it: add --resume to go on, or name another --output")
        if (args.output / "config.json").exists() and not args.resume:
            raise FileExistsError(f"{args.output} has a model in it, which is not replaced: name another --output")
        flag = "--lora" if args.lora else "--tune memory"
        require(
            not self.freezes or args.init is not None, f"{flag} needs weights that are there: name them with --init"
        )
        require(not args.lora or args.tune == "all", "--lora and --tune memory exclude each other: leave one out")
        require(args.lora or not args.lora_products, "--lora-products says where --lora RANK adds to: give it, too")
        if args.init:
            check_folder(args.init)

    def new_config(self, tokenizer: Tokenizer) -> FastConfig:
        """The recipe's, and with --init what it changes in that one. Special ids are the tokenizer's."""
        named, bos = self.recipe.model, tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        ids = {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id}
        if tokenizer.pad_id is not None:
            ids["pad_token_id"] = tokenizer.pad_id
        for name, value in ids.items():
            fits = named.get(name, value) == value
            require(fits, f"{self.args.recipe}: {name} is {named.get(name)}, but {value} in {self.args.tokenizer}")
        if not self.args.init:
            missing = [name for name in SHAPE if name not in named]
            told = f"{self.args.recipe} has no {', '.join(missing)}, so it tunes a model that is there"
            require(not missing, f"{told}: name its folder with --init")
            return FastConfig(**named | ids)
        config = FastConfig.from_json(self.args.init / "config.json", **named)
        config = with_special_ids(config, tokenizer, self.args.init)
        return replace(config, pad_token_id=ids.get("pad_token_id", config.pad_token_id))

    def check_room(self, config: FastConfig):
        """Refuses, before the work begins, what cannot be: of the window, the memory and the disk."""
        args, phases = self.args, self.recipe.phases
        for phase in phases:
            try:
                phase.check_fits(config)
            except ValueError as error:
                raise ValueError(f"{args.recipe} has {error}") from None
        weights, has = parameter_count(config), memory_of(self.device)
        logits = 4 * config.vocab_size * max(phase.group_tokens for phase in phases)
        bytes_of_each = EXPORTED if self.freezes else TRAINED + 4  # frozen ones are in bfloat16; and 4 of a gradient
        needs = bytes_of_each * weights / self.world + logits
        told = f"training takes {needs / 1e9:,.0f} GB at the least, and {self.device} has {has / 1e9:,.0f}"
        require(needs <= has, f"{args.recipe}: {told}: make the model, or what a batch holds, smaller")
        if self.rank == 0:
            kept = EXPORTED if self.freezes else 2 * TRAINED + EXPORTED  # a new checkpoint stands beside the one before
            check_new_folder("--output", args.output, kept * weights)

    def check_made_with(self, state: dict):
        fits = self.recipe.continues(state["recipe"], state["step"])
        require(fits, f"{self.checkpoint} was made with another recipe than {self.args.recipe}")
        for flag in [*self.made_with, *(state["made_with"].keys() - self.made_with.keys() - {"config"})]:
            same = str(state["made_with"].get(flag)) == str(self.made_with.get(flag))
            require(same, f"{self.checkpoint} was made with another {flag}: give the same")
        stop = self.args.stop_after or state["step"]
        require(state["step"] <= stop, f"--stop-after {stop}: the run is at step {state['step']} already")

    def start(self, config: FastConfig, fresh: bool) -> FastLlama:
        """The model that training starts from; a run that is resumed brings its own weights, but for frozen ones."""
        torch.manual_seed(self.recipe.seed)
        whole = config.weight_dtype is None
        require(whole, "weights of 8 or 4 bits are not trained: name a model in 16 bits with --init")
        if not self.args.init or not (fresh or self.freezes):
            return FastLlama(config)
        dtype = self.dtype if self.freezes else torch.float32
        model = FastLlama.from_pretrained(self.args.init, dtype=dtype, **asdict(config)).train()
        for text in unlike_its_config(self.args.init, model.config):
            warn(text)
        for name, weight in model.hf_tensors().items():
            check_finite(f"--init {self.args.init}", name, weight)
        return model

    def prepared(self, model: FastLlama) -> FastLlama:
        """On its device, with what flags ask for, and spread over processes."""
        if self.args.lora:
            add_lora(model, self.args.lora, self.args.lora_products or PRODUCTS[:2])
        if self.args.tune == "memory":
            freeze_but_memory_layers(model)
        if self.args.checkpoint_layers:
            recompute_layers(model)
        if self.world == 1:
            return model.to(self.device)
        for layer in model.layers:  # each moves to the device by itself
            fully_shard(layer)
        fully_shard(model)
        register_fsdp_forward_method(model, "forward_cross_batch")
        return model

    def computing(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def train_step(self) -> tuple[list[float], bool]:
        """One optimizer step; each process takes its share of the groups. Returns this step's numbers, and whether any process
        was told to stop. Raises ValueError, before the step is taken, where it is not finite."""
        phase, step = self.recipe.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.learning_rate_at(step)
        total = torch.zeros(len(self.data.names) + 1, device=self.device)
        for group in range(self.rank, phase.groups, self.world):
            with self.computing():
                loss, numbers = self.data.loss(self.model, phase, step, (self.recipe.seed, self.step, group))
            # Sharded gradients are averaged over processes, so a process's own are averaged over its own groups.
            (loss * self.world / phase.groups).backward()
            total[:-1] += torch.stack([x.detach() for x in numbers]) / phase.groups
        total[-1] = self.stop.number
        if self.world > 1:
            dist.all_reduce(total)  # so that all processes decide alike
        norm = whole(clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)).item()
        *numbers, stopped = total.tolist()
        finite = all(map(math.isfinite, (*numbers, norm)))
        told = f"step {self.step + 1} (loss {numbers[0]}, gradient {norm}) is not finite"
        self.require_finite(finite, told)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return numbers, stopped > 0

    def require_finite(self, fits: bool, what: str):
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
        require(fits, f"{what}: {kept}; a smaller learning_rate in {self.args.recipe} may help, in another --output")

    def run(self):
        last = min(self.args.stop_after or self.recipe.steps, self.recipe.steps)
        started, tokens, since = time.monotonic(), 0, []
        self.tell_first()
        self.stop.waits = True
        while self.step < last:
            phase, _ = self.recipe.at(self.step)
            numbers, stopped = self.train_step()
            tokens += phase.step_tokens
            self.losses.append({"step": self.step} | dict(zip(self.data.names, numbers)))
            since.append(numbers)
            if self.step % REPORT == 0 and self.rank == 0:
                self.tell_step(since, tokens, time.monotonic() - started)
                since = []
            stopped = stopped and self.step < last
            if self.step % self.args.validate == 0 or self.step == self.recipe.steps:
                self.validate(phase)
            if self.step % self.args.save_every == 0 or self.step == last or stopped:
                self.save_checkpoint()
            if stopped:
                self.leave()
                if self.rank == 0:
                    tell(f"stopped after step {self.step}, go on with: {self.command()}")
                sys.exit(128 + (self.stop.number or signal.SIGTERM))  # which came to another process
        self.export()
        self.leave()

    def say(self, text: str):
        if self.rank == 0:
            print(printable(text), flush=True)

    def tell_first(self):
        parameters = list(self.model.parameters())
        counts = [sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])]
        counted = f"{counts[0]:,} parameters" + f", {counts[1]:,} of them trained" * (counts[0] > counts[1])
        self.say(f"{counted}; {self.recipe.steps:,} steps, {self.recipe.tokens_after(0):,} tokens")
        for line in self.data.lines(self.recipe):
            self.say(line)
        if self.step:
            self.say(f"resumed at step {self.step}")

    def tell_step(self, since: list[list[float]], tokens: int, seconds: float):
        """since: the numbers of all steps since the last line, whose means are told; 0 is what there was none of."""
        left = self.recipe.tokens_after(self.step) * seconds / tokens / 60
        phase, _ = self.recipe.at(self.step - 1)
        shown = [(name, [x for x in column if x]) for name, column in zip(self.data.names, zip(*since))]
        shown = [(name, column) for name, column in shown if name == "loss" or (phase.asks and column)]
        numbers = "".join(f"  {name.replace('_', ' ')} {np.mean(column):.4f}" for name, column in shown)
        speed = f"{tokens / seconds:,.0f} tokens/s  {left:.0f} min left"
        self.say(f"step {self.step}/{self.recipe.steps}{numbers}  {speed}")

    @torch.no_grad()
    def validate(self, phase):
        """Tells of what is held out, and keeps it beside this step's losses. All processes compute the same."""
        with self.computing():
            found = self.data.validate(self.model, phase)
            sampled = self.data.sample(self.model) if self.world == 1 else None  # sharded weights are not sampled from
        if found:
            self.losses[-1]["held_out"] = found
            told = ", ".join(f"{loss:.4f} {how}" for how, loss in found.items())
            self.say(f"step {self.step}: loss on held-out documents {told}")
        if self.world > 1:
            self.model.reshard()  # which only a backward pass does by itself
        if sampled:
            self.say("  {!r} -> {!r}".format(*sampled))

    def leave(self):
        """No process leaves while another still needs it."""
        if self.world > 1:
            dist.barrier()

    def command(self) -> str:
        """What goes on with this run."""
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if self.world > 1 else ["python"]
        return shlex.join([*start, *sys.argv, *["--resume"] * (not self.args.resume)])

    # Checkpoints hold whole tensors, not shards, so one written by 8 processes resumes on 1; and not what is frozen.

    def _state(self, full: bool) -> tuple[dict, dict]:
        options = StateDictOptions(full_state_dict=full, cpu_offload=full, ignore_frozen_params=self.freezes)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        if self.freezes:  # a frozen matrix that is tied is left in by torch, under its second name
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            model = {name: x for name, x in model.items() if name in trained}
        return model, optimizer

    def save_checkpoint(self):
        norm = whole(get_total_norm([p.detach() for p in self.model.parameters() if p.requires_grad])).item()
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
            options=StateDictOptions(full_state_dict=True, strict=not self.freezes),
        )
        self.step = self.saved = state["step"]
        if self.rank == 0:
            self.losses = read_log(self.log, self.step, self.data.names)

    def export(self):
        """Writes the model as generate.py reads it, in bfloat16."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if self.rank == 0:
            model = FastLlama(self.model.config)
            model.load_state_dict(merged(weights))
            source = self.args.init or self.args.output  # where an earlier export has put what goes with them
            save_pretrained(model.to(torch.bfloat16), self.args.output, self.args.tokenizer, source)
            if self.args.tune == "memory":
                write_tuned(self.args.output / "memory_layers.safetensors", model, self.made_with["--init"])
            if find_spec("matplotlib"):
                self.draw()
            self.say(f"wrote {self.args.output}; next: python generate.py --model {self.args.output} --prompt TEXT")

    def draw(self):
        """curve.png: losses, as means of some steps each, and those on what is held out."""
        pyplot = import_pyplot()
        figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name in self.data.names:
            points = [(x["step"], x[name]) for x in self.losses if x[name]]  # 0: there were none
            if points:
                parts = np.array_split(points, min(len(points), MEANS))
                axis.plot(*np.array([part.mean(axis=0) for part in parts]).T, label=name.replace("_", " "))
        checked = [x for x in self.losses if "held_out" in x]
        for how in dict.fromkeys(how for x in checked for how in x["held_out"]):
            found = [(x["step"], x["held_out"][how]) for x in checked if how in x["held_out"]]
            axis.plot(*zip(*found), marker="o", label=f"held out, {how}")
        axis.set(xlabel="step", title="loss")
        axis.legend()
        save_picture(figure, self.args.output / "curve.png")


def add_training_flags(parser: argparse.ArgumentParser, recipe: Path, output: Path):
    """What `Trainer` reads, but for --tokenizer and --data. recipe, output: the defaults."""
    add = parser.add_argument
    add("--recipe", type=Path, default=recipe, help=f"model and phases (default: training/{recipe.name})")
    add(
        "--output",
        type=new_path,
        default=output,
        help=f"folder for checkpoint and model, in bfloat16 (default: training/runs/{output.name})",
    )
    add("--tokenizer", type=Path, help="default: the one in the folder of --init, or else the tiny model's")
    add("--init", type=Path, metavar="DIR", help="start from the weights in this folder instead of random ones")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add(
        "--stop-after",
        type=number(int, 1),
        metavar="STEP",
        help="stop at this step: with a checkpoint, and the model so far",
    )
    add("--save-every", type=number(int, 1), default=100, metavar="N", help="a checkpoint every N steps (default 100)")
    add("--validate", type=number(int, 1), default=500, metavar="N", help="every N steps (default 500), and at the end")
    add("--checkpoint-layers", action="store_true", help="keep less for the backward pass, and compute it again there")
    add(
        "--lora",
        type=number(int, 1),
        metavar="RANK",
        help="train LoRA's small matrices, and not the weights, for which the recipes' learning rates are",
    )
    tuned = "memory: train the attention of memory layers alone, which is written to a small file, too (default all)"
    add("--tune", choices=["all", "memory"], default="all", help=tuned)
    add("--lora-products", nargs="+", choices=PRODUCTS, help="what they are added to (default: qkv_proj o_proj)")
    computed = "what is computed in (default bfloat16); CPUs without bfloat16 arithmetic may be faster in float32"
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help=computed)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")


def tokenizer_of(args: argparse.Namespace) -> Path:
    return args.tokenizer or tokenizer_in(args.init or TINY)
