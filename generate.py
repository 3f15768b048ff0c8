"""Continues a text with a LongLLaMA model. Without any flag it shows that the tiny model finds a pass key 160 windows back.

    python generate.py --prompt "The sea" --max-new-tokens 50 --seed 1
    python generate.py --prompt-file tiny/book.txt --max-new-tokens 50 --keep-local 64
    python generate.py --prompts FILE.jsonl --stop "." --seed 1        # a file of {"prompt": "..."}, one a line

The continuation, and nothing else, goes to standard output. Warnings, progress and statistics go to standard error.
"""

import argparse
import sys
import time
from pathlib import Path

from cli.ending import ending_well, say, tell, warn

import torch

from cli.completions import Completion
from cli.flags import (
    MEMORY_FLAGS,
    SAMPLING_FLAGS,
    add_memory_flags,
    add_model_flags,
    add_prompt_flags,
    add_sampling_flags,
    check_new_file,
    demonstration,
    given,
    new_path,
    number,
    parser_for,
)
from cli.loading import encode_prompt, load, pick_device, warnings
from cli.progress import Compiling, Progress, room_for, statistics
from cli.prompts import continue_prompts, read_prompts
from cli.texts import read_prompt
from fast import FastLlama, load_memory, save_memory
from fast.saved import check_kept, memory_nbytes
from longllama import Cache
from tokenizer import Tokenizer

DEMONSTRATION = """\
A book of 51,000 tokens was read in windows of 256, with a pass key, 71428, in the fifteenth of them, asked for at the end. Next:
  python generate.py --prompt "The sea"        python examples/look_at_memory.py        python generate.py --help"""


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_prompt_flags(parser, many=True)
    add_model_flags(parser)
    add("--max-new-tokens", type=number(int, 0), default=100, metavar="N", help="default 100")
    add_sampling_flags(parser)
    add_memory_flags(parser)
    add("--mem-attention-grouping", type=number(int, 1), nargs=2, metavar=("H", "Q"),
        help="attend to memory with at most H heads x Q queries at once: less memory, more time")  # fmt: skip
    add("--save-memory", type=new_path, metavar="FILE", help="write what the prompt left in memory")
    add("--load-memory", type=Path, metavar="FILE", help="continue what --save-memory wrote")
    add("--compile", action="store_true", help="compile the layers as they are first used: for GPUs and long texts")
    add("--quiet", action="store_true", help="no progress, no statistics, no warnings about the prompt")
    return parser


def run(args: argparse.Namespace):
    if args.prompts and args.save_memory:
        raise ValueError("--save-memory keeps what one text left in memory, and --prompts are many: give --prompt TEXT")
    if args.batch and not args.prompts:
        raise ValueError("--batch says how many of --prompts FILE are continued at once: give them, or leave it out")
    device = pick_device(args.device)
    if args.save_memory:
        check_new_file("--save-memory", args.save_memory)
    given_text = read_prompts(args.prompts) if args.prompts else read_prompt(args)
    if args.load_memory and not given_text:
        raise ValueError("--load-memory goes on from a text that was read: the prompt must not be empty")
    config = given(args, (*MEMORY_FLAGS, "mem_attention_grouping"))
    model, tokenizer = load(args.model, device, args.dtype, args.memory, args.weights, **config)
    if args.compile:
        model.compile_layers()
    cache = load_memory(args.load_memory, model, tokenizer=tokenizer.digest) if args.load_memory else model.new_cache()
    if cache.batch_size not in (None, 1):
        raise ValueError(
            f"--load-memory {args.load_memory} is a memory of {cache.batch_size} texts, and a prompt follows one"
        )
    if args.prompts:
        continue_prompts(args, given_text, model, tokenizer, cache)
    else:
        continue_prompt(args, given_text, model, tokenizer, cache)


def continue_prompt(args: argparse.Namespace, prompt: str, model: FastLlama, tokenizer: Tokenizer, cache: Cache):
    """Writes what follows a prompt, as it comes, and says what it took."""
    device, digest = model.norm.weight.device, tokenizer.digest
    ids = encode_prompt(tokenizer, prompt, bool(args.load_memory))
    T, text, new, unsaved = len(ids), Completion(tokenizer, ids, model.config.eos_token_id, args.stop), 0, None
    if args.save_memory:  # before a long prompt is read
        check_kept(cache)
        check_new_file("--save-memory", args.save_memory, memory_nbytes(cache, model, T))
    if not args.quiet:
        for warning in warnings(prompt, ids, args.max_new_tokens, model, tokenizer, cache):
            warn(warning)
    takes = room_for(T, model, cache)
    progress = Progress(model, T, not args.quiet and sys.stderr.isatty(), takes)
    compiling = Compiling(args.compile, shown=not args.quiet)
    times = [time.perf_counter()]
    most = max(args.max_new_tokens, 1) if args.save_memory else args.max_new_tokens  # the first comes when all is read
    try:
        read = torch.tensor([ids], dtype=torch.long, device=device)
        for token in model.generate(read, most, cache=cache, **given(args, SAMPLING_FLAGS)):
            token = token.item()
            times.append(time.perf_counter())
            if new == 0:
                progress.close()
                if args.save_memory:  # the cache holds the prompt and not yet this token
                    try:
                        save_memory(args.save_memory, cache, model, digest)
                    except Exception as error:
                        unsaved = error  # the text comes all the same
            if new == args.max_new_tokens:
                break
            new += 1
            say(text.feed(token))
            if text.ended:
                break
    finally:  # after Ctrl-C too
        progress.close()
        compiling.close()
        if new:
            say(text.flush() + "\n")
        if len(times) > 1 and not args.quiet:
            tell(statistics(cache, progress, T, times, device, compiling.seconds))
        if unsaved:
            raise unsaved from None


def main():
    parser, flags = make_parser(), sys.argv[1:]
    with ending_well(parser):
        run(parser.parse_args(flags or demonstration()))
        if not flags:
            tell(*DEMONSTRATION.splitlines())


if __name__ == "__main__":
    main()
