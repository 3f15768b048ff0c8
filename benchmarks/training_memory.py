"""Peak memory of a training step, with gradient checkpointing and with LoRA: on a CPU, each in a process of its own.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py > table.md      # keeps the table

A model of 0.2 billion random weights takes two steps of FoT's training on 4 entries of 512 tokens, and two on 4 samples of 512
tokens of which half go through memory. What is told is what the process took at the most beyond what importing takes.
"""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import torch

from cli.flags import parser_for
from cli.progress import process_peak
from fast import FastConfig, FastLlama
from training.instruct import mean_loss
from training.lora import add_lora
from training.recompute import recompute_layers

SHAPE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16}
ROWS, TOKENS, STEPS = 4, 512, 2
RANK, PRODUCTS = 16, ["qkv_proj", "o_proj"]


def peak(kind: str, lora: bool, recompute: bool) -> int:
    """Bytes."""
    before = process_peak()
    model = FastLlama(FastConfig(max_position_embeddings=TOKENS, mem_layers=(4, 8), **SHAPE))
    if lora:
        add_lora(model.to(torch.bfloat16), RANK, PRODUCTS)
    if recompute:
        recompute_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(3, model.config.vocab_size, (ROWS, TOKENS))
    for _ in range(STEPS):
        if kind == "FoT":
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.forward_cross_batch(ids, list(range(ROWS)))
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = mean_loss(model, (ids, ids, torch.ones_like(ids)), TOKENS // 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return process_peak() - before


def main():
    parser = parser_for(__doc__)
    parser.parse_args()
    with ending_well(parser):
        print("| GB | FoT | instructions |\n| --- | --- | --- |")
        ways = [("all weights", False, False), ("`--checkpoint-layers`", False, True)]
        ways += [(f"`--lora {RANK}`", True, False), ("both", True, True)]
        for name, lora, recompute in ways:
            cells = []
            for kind in ("FoT", "instructions"):
                # spawned, one after the other: what the one before took is not counted
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    cells.append(f"{pool.apply(peak, (kind, lora, recompute)) / 1e9:.2f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
