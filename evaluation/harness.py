"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), its own or yours, and its own tables.

    python evaluation/harness.py --tasks sea_endings,sea_keys,sea_prose --include-path evaluation/tasks
    python evaluation/harness.py --model long_llama_3b --tasks boolq,hellaswag,winogrande --output results.json

It needs the package lm-eval, and a network where a task's data are on the Hugging Face Hub, as those of its own tasks are.

As much of a context stays local as fits the window, whatever config.json says, and the beginning of a longer one goes through
memory; --last-context-length sets another number.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

from cli.flags import (
    MEMORY_FLAGS,
    add_memory_flags,
    add_model_flags,
    check_new_file,
    given,
    listed,
    new_path,
    number,
    parser_for,
)
from cli.loading import load, pick_device
from fast.files import replacing

SETTINGS = ("model", "dtype", "memory", *MEMORY_FLAGS)  # that results depend on


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--tasks", type=listed(str), required=True, metavar="A,B", help="tasks, groups or tags; * and ? match any text")
    add(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="tasks of your own: a folder of YAML files, as lm_eval has them",
    )
    add(
        "--num-fewshot",
        type=number(int, 0),
        metavar="N",
        help="examples before each question (default: as a task says)",
    )
    add("--limit", type=number(int, 1), metavar="N", help="only the first N of each task's documents")
    add("--batch", type=number(int, 1), default=8, metavar="N", help="contexts read at once (default 8)")
    add("--output", type=new_path, metavar="FILE", help="write the results here too, as JSON")
    add_model_flags(parser)
    add_memory_flags(parser)
    return parser


def find_tasks(names: list[str], include: Path | None):
    """A TaskManager that knows the tasks of these names, and the names of them all. lm_eval's own 15,000 are listed, which takes
    seconds, only where one is not in the folder of yours."""
    from lm_eval.tasks import TaskManager

    if include and not include.is_dir():
        raise ValueError(f"--include-path {include} is no folder: name one with the YAML files of tasks")
    for include_defaults in (False, True):
        manager = TaskManager(include_path=include, include_defaults=include_defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager, manager.match_tasks(names)
    where = f"nor in {include}" if include else "and --include-path names no folder of your own"
    raise ValueError(f"--tasks {unknown[0]}: there is none of this name in lm-evaluation-harness, {where}")


def run(args: argparse.Namespace):
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable, make_table

        from evaluation.adapter import LongLlamaLM
    except ImportError:
        raise ValueError("this program needs lm-evaluation-harness 0.4.13 or newer: pip install -U lm-eval") from None
    if args.output:
        check_new_file("--output", args.output)
    manager, tasks = find_tasks(args.tasks, args.include_path)
    model, tokenizer = load(
        args.model, pick_device(args.device), args.dtype, args.memory, args.weights, **given(args, MEMORY_FLAGS)
    )
    results = simple_evaluate(
        LongLlamaLM(model, tokenizer, args.batch, args.last_context_length),
        model_args=given(args, SETTINGS),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch,
        limit=args.limit,
        log_samples=False,
    )
    for kind in ("results", "groups"):
        if kind in results:
            print(make_table(results, kind))
    if args.output:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        with replacing(args.output) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")


def main():
    parser = make_parser()
    with ending_well(parser):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
