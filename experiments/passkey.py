"""Pass-key retrieval (Mohtashami and Jaggi 2023; the paper's figure 1): five digits hidden in a long text, asked for at its end.

    python experiments/passkey.py                                             # the tiny model, up to 16k tokens
    python experiments/passkey.py --lengths 1k,64k,1M --trials 20 --picture passkey.png
    python experiments/passkey.py --model DIR OTHER_DIR --device cuda         # models side by side
    python experiments/passkey.py --model DIR --filler original --lengths 2k,100k,256k    # LongLLaMA's own prompt

Prompts have exactly the length asked for, in tokens. Keys lie at random depths, spread evenly from the start of the prompt
(0%) to its end. A trial counts when greedy decoding gives all five digits, and no sixth. The filler is real text (--text), or the
sentences about green grass that such tests are usually made of, or each in half of the trials. With --filler original it is the
prompt of LongLLaMA's own test, for comparison with its figure: keys are numbers of 1 to 50000, so of one to five digits; filler,
key and question stand on lines of their own; grass is counted and cut in characters, so that prompts are a few tokens shorter or
longer than asked for.

Beside each model stands the same without memory: of the same prompts it reads the end alone, as many tokens as its window holds
with the answer. All of them are local, so nothing is remembered, and the rest of the prompt need not be read.
"""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import torch

from cli.flags import (
    add_model_flags,
    add_own_memory_flag,
    number,
    parse_lengths,
    parser_for,
    short,
)
from cli.loading import TINY, load, pick_device
from cli.picture import import_pyplot, save_picture
from cli.texts import read_text
from experiments.output import add_output_flags, by_name, check_outputs, save_table
from fast import FastLlama
from tokenizer import Tokenizer
from training.tasks import GRASS, INTRO, KEY, MOST_TRIALS, QUESTION, STEPS, answers, prompt_ids, random_key

TOKENS_AT_ONCE = 1 << 17  # short prompts are read as batches of about this size


@dataclass(frozen=True)
class Trial:
    model: str
    filler: str
    length: int
    depth: float  # where the key is: 0 at the start of the prompt, 1 at its end
    found: bool


def original_key(rng: torch.Generator) -> str:
    return str(int(torch.randint(1, 50001, (1,), generator=rng)))


def original_prompt(tokenizer: Tokenizer, length: int, depth: float, key: str) -> list[int]:
    """The ids of LongLLaMA's own prompt, about `length` of them. Its filler begins anew behind the key."""

    def ids(characters: int) -> list[int]:
        grass, before = " ".join([GRASS] * (characters // len(GRASS) + 1)), round(depth * characters)
        lines = INTRO, grass[:before], KEY.format(key=key), grass[: characters - before], QUESTION
        return tokenizer.encode("\n".join(lines))

    none, some, more = (len(ids(n * (len(GRASS) + 1))) for n in (0, 10, 20))
    if length < none:
        raise ValueError(f"a prompt with a pass key takes at least {none} tokens, {length} are too few")
    repetitions = 10 + 10 * (length - some) / (more - some)
    return ids(max(round(repetitions * (len(GRASS) + 1)), 0))


def measure(
    model: FastLlama,
    tokenizer: Tokenizer,
    name: str,
    fillers: dict[str, list[int] | None],
    length: int,
    trials: int,
    seed: int,
    remembers: bool = True,
) -> list[Trial]:
    """`trials` trials of one length for each filler: ids, or None, the original's. remembers: False is without memory."""
    rng, results = torch.Generator().manual_seed(seed), []
    room = model.config.max_position_embeddings - STEPS + 1  # the last token said is not read
    device = model.norm.weight.device
    for filler, text in fillers.items():
        original = text is None
        at_once = 1 if original else max(1, TOKENS_AT_ONCE // length)  # the original's differ in length
        keys = [original_key(rng) if original else random_key(rng) for _ in range(trials)]
        depths = ((torch.arange(trials) + torch.rand(trials, generator=rng)) / trials).tolist()
        for i in range(0, trials, at_once):
            batch = list(zip(keys, depths))[i : i + at_once]
            prompts = [
                original_prompt(tokenizer, length, depth, key)
                if original
                else prompt_ids(tokenizer, length, depth, key, text, rng)
                for key, depth in batch
            ]
            ids = torch.tensor(prompts, device=device)
            ids, last = (ids, None) if remembers else (ids[:, -room:], room)
            said = model.generate(ids, STEPS, temperature=0, eos_token_id=None, last_context_length=last)
            said = torch.stack(list(said), dim=1).tolist()
            for (key, depth), answer in zip(batch, said):
                results.append(Trial(name, filler, length, depth, answers(tokenizer.decode(answer), key)))
    return results


def share(trials: list[Trial]) -> float:
    return sum(trial.found for trial in trials) / len(trials)


def report(label: str, trials: list[Trial], started: float):
    """While a table is in the making."""
    seconds = (time.perf_counter() - started) / len(trials)
    tell(f"{label}: {100 * share(trials):.0f}% of {len(trials)}, {seconds:.2f} s each")


def group(trials: list[Trial], key) -> dict:
    groups = defaultdict(list)
    for trial in trials:
        groups[key(trial)].append(trial)
    return groups


def table(trials: list[Trial]) -> str:
    """Markdown: a row for each model and filler, a column for each length: found / asked."""
    lengths = sorted({trial.length for trial in trials})
    lines = ["| model | filler | " + " | ".join(map(short, lengths)) + " |", "| --- " * (len(lengths) + 2) + "|"]
    for (model, filler), row in group(trials, lambda t: (t.model, t.filler)).items():
        cells = group(row, lambda t: t.length)
        found = [f"{100 * share(cells[n]):.0f}% ({len(cells[n])})" if n in cells else "" for n in lengths]
        lines.append(f"| {model} | {filler} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def picture(trials: list[Trial], path: Path, bins: int):
    """A heat map for each model, with memory and without: prompt length across, depth of the key down, colour the share found."""
    pyplot = import_pyplot()
    models, lengths = group(trials, lambda t: t.model), sorted({trial.length for trial in trials})
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(1.5 + 3.2 * len(models), 3.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], models.items()):
        cells = group(rows, lambda t: (min(int(t.depth * bins), bins - 1), lengths.index(t.length)))
        grid = [
            [share(cells[d, n]) if (d, n) in cells else float("nan") for n in range(len(lengths))] for d in range(bins)
        ]
        image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for d, row in enumerate(grid):
            for n, value in enumerate(row):
                axis.text(n, d, f"{100 * value:.0f}" if value == value else "", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(lengths)), map(short, lengths))
        axis.set_yticks(range(bins), [f"{100 * d // bins}-{100 * (d + 1) // bins}%" for d in range(bins)])
        axis.set(title=name, xlabel="prompt length, tokens")
    axes[0][0].set_ylabel("depth of the pass key")
    figure.colorbar(image, ax=axes, label="found")
    save_picture(figure, path)


def main():
    parser = parser_for(__doc__)
    add_model_flags(parser, several=True)
    add_own_memory_flag(parser)
    parser.add_argument("--lengths", type=parse_lengths, default=[1 << 10, 1 << 12, 1 << 14], help="default 1k,4k,16k")
    parser.add_argument(
        "--trials", type=number(int, 1, MOST_TRIALS), default=10, help="for each length and filler (default 10)"
    )
    parser.add_argument(
        "--filler",
        choices=["text", "grass", "both", "original"],
        default="both",
        help="what the key is hidden in (default both); original: LongLLaMA's own prompt",
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[TINY / "book.txt"], metavar="FILE", help="repeated where too short"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="draw the same keys every time (default 0)"
    )
    add_output_flags(parser, "length x depth")
    parser.add_argument("--depth-bins", type=number(int, 1, 100), default=5, help="rows of the picture (default 5)")
    args = parser.parse_args()
    with ending_well(parser):
        check_outputs(args)
        text = " ".join(read_text(path, "--text") for path in args.text)
        trials = []
        try:
            for name, path in by_name(args.model).items():
                model, tokenizer = load(path, pick_device(args.device), args.dtype, args.memory, args.weights)
                ids = {filler: tokenizer.encode(x, bos=False) for filler, x in (("text", text), ("grass", GRASS))}
                fillers = ids if args.filler == "both" else {args.filler: ids.get(args.filler)}
                for length in dict.fromkeys(args.lengths):
                    for label, remembers in ((name, True), (f"{name}, no memory", False)):
                        started = time.perf_counter()
                        new = measure(model, tokenizer, label, fillers, length, args.trials, args.seed, remembers)
                        trials += new
                        report(f"{label} {short(length)}", new, started)
        finally:  # what was measured is told, also where one model cannot read so much
            if trials:
                print(table(trials), flush=True)
        if args.table:
            save_table(table(trials), args.table)
        if args.picture:
            picture(trials, args.picture, args.depth_bins)


if __name__ == "__main__":
    main()
