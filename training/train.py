"""FoT training: cross-batch attention over packed documents (Tworkowski et al. 2023, sections 3.2 and A).

    python training/fetch_data.py && python training/train.py              # makes the tiny model, from nothing
    python training/train.py --resume                                      # goes on from the last checkpoint
    python training/train.py --recipe training/text.json --data my_texts   # a small model of texts of your own
    torchrun --nproc-per-node 8 training/train.py --recipe R --init DIR    # FoT-tunes a converted checkpoint on 8 GPUs

A recipe (training/tiny.json, training/tune.json) is the model's config and a list of phases; each phase says how long, at
which learning rate, on what mix of documents, and with which cross-batch ranges it trains. The output folder gets
losses.jsonl and checkpoint.pt while training runs, and at the end config.json, model.safetensors and tokenizer.model, and
curve.png where matplotlib is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cli.flags import number, parser_for
from fast import FastLlama
from tokenizer import Tokenizer
from training.data import DATA, Source, read_corpora
from training.recipe import PackedPhase, Recipe
from training.stopping import Stop
from training.trainer import LESS, Trainer, add_training_flags, tokenizer_of

CHECKED = 4  # batches of held-out documents
SAMPLE = 40  # tokens that a sample continues


class PackedDocuments:
    """The kind of data that FoT trains on: batches of chunks of documents, and how many of them each one sees."""

    names = (
        "loss",
        "answer_loss",
    )  # the mean over all tokens, and over the digits of pass keys asked for (0 without any)

    def __init__(self, sources: list[Source], tokenizer: Tokenizer, recipe: Recipe, contrast: str, **reading):
        """reading: for `read_corpora`."""
        self.corpus, self.held = read_corpora(sources, tokenizer, **reading)
        self.contrast, self.answer_weight = contrast, recipe.answer_weight
        for phase in recipe.phases:
            if phase.asks:  # a key for which windows are too small is told now
                self.corpus.passkey(np.random.default_rng(0), phase.window, phase.window, dense=True)

    def digest(self) -> str:
        return self.corpus.digest()

    def lines(self, recipe: Recipe) -> list[str]:
        told = f"{len(self.corpus.documents):,} documents of {self.corpus.tokens:,} tokens"
        lines = [f"{told}, and {len(self.held.documents):,} held out, of {self.held.tokens:,}"]
        for i, phase in enumerate(recipe.phases, 1):
            size = f"{phase.documents} documents x {phase.packing} entries of {phase.window} tokens"
            seen = {contexts(phase, draw, self.contrast): None for draw in range(len(phase.ranges or [0]))}
            lines.append(f"phase {i}: {phase.steps:,} steps of {phase.groups} x {size}; the entries of a document see")
            lines += [f"  (positives, negatives) {one}" for one in seen]
        return lines

    def loss(
        self, model: FastLlama, phase: PackedPhase, step: int, seed: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        mix, draw = phase.mix_at(step / phase.steps), sum(seed)
        hard = {"cut": phase.cut, "repeated": phase.repeated, "single": phase.single}
        batch = self.corpus.batch(seed, phase.documents, phase.window, mix, phase.extra(draw), **hard)
        extra, detached = phase.extra(draw, self.contrast), self.contrast == "detached"
        loss, answer_loss = losses(model, batch, extra, detached)
        return loss + self.answer_weight * answer_loss, [loss, answer_loss]

    def validate(self, model: FastLlama, phase: PackedPhase) -> dict[str, float]:
        """Of text, each chunk with its document's past in memory, and alone."""
        found = {}
        for how, contrast in (("with memory", "positives"), ("without", "none")) if self.held.documents else ():
            extra, each = phase.extra(0, contrast), []
            for seed in range(CHECKED):
                batch = self.held.batch((seed,), phase.documents, phase.window, {"text": 1.0}, extra)
                each.append(losses(model, batch, extra)[0].item())
            found[how] = sum(each) / CHECKED
        return found

    def sample(self, model: FastLlama) -> tuple[str, str] | None:
        """How a held-out document goes on after its first tokens, half a window of them."""
        if not self.held.documents:
            return None
        tokenizer, device = self.held.tokenizer, model.norm.weight.device
        prompt = self.held.documents[0][: model.config.max_position_embeddings // 2].tolist()
        ids = model.generate(torch.tensor([prompt], device=device), SAMPLE, temperature=0.8, seed=0)
        new = [i.item() for i in ids]
        return tokenizer.decode(prompt[-SAMPLE:]), tokenizer.decode(new)


def contexts(phase: PackedPhase, draw: int, contrast: str) -> str:
    """(positives, negatives) of each entry of the last document of a batch, which has the most before it."""
    seen = phase.extra(draw, contrast)[-phase.packing :]
    return " ".join(f"({min(i, n)},{max(n - i, 0)})" for i, n in enumerate(seen))


def losses(model: FastLlama, batch, extra: list[int], detached: bool = False) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all tokens, and over the digits of pass keys asked for (0 without any)."""
    device = model.norm.weight.device
    inputs, targets, answers = (torch.from_numpy(x).to(device) for x in (batch.inputs, batch.targets, batch.answers))
    logits = model.forward_cross_batch(inputs, extra, detached)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    answers = answers.flatten()
    return loss.mean(), (loss * answers).sum() / answers.sum().clamp(min=1)


def main():
    here = Path(__file__).resolve().parent
    parser = parser_for(__doc__)
    add_training_flags(parser, here / "tiny.json", here / "runs" / "tiny")
    add = parser.add_argument
    add(
        "--data",
        type=Source.parse,
        nargs="+",
        default=[Source(DATA)],
        metavar="PATH[=WEIGHT]",
        help="folders of .txt files, or .jsonl files, also .jsonl.gz, whose rows have a text (default: training/data)",
    )
    add("--text-field", default="text", metavar="NAME", help="under which name rows have it (default text)")
    add("--shortest", type=number(int, 0), default=0, metavar="N", help="leave texts of fewer letters out")
    add(
        "--contrast",
        choices=["full", "positives", "none", "detached"],
        default="full",
        help="for ablations: which contexts besides its own an entry sees; detached: all, without gradients into them",
    )
    args = parser.parse_args()
    args.tokenizer = tokenizer_of(args)
    with ending_well(parser, LESS), Stop() as stop:
        recipe = Recipe(args.recipe)

        def read_data(tokenizer: Tokenizer) -> PackedDocuments:
            reading = {"field": args.text_field, "shortest": args.shortest}
            return PackedDocuments(args.data, tokenizer, recipe, args.contrast, **reading)

        try:
            Trainer(args, stop, recipe, read_data, {"--contrast": args.contrast}).run()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
