"""Continues a text with a LongLLaMA model. Without any flag it shows that the tiny model finds a pass key 160 windows back.

    python generate.py --prompt "The sea" --max-new-tokens 50 --seed 1
    python generate.py --prompt-file tiny/book.txt --max-new-tokens 50 --keep-local 64

The continuation, and nothing else, goes to standard output. Warnings, progress and statistics go to standard error.
"""

import argparse
import sys
import time
from pathlib import Path

from cli.ending import ending_well, say, tell, warn

import torch

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
from cli.loading import load, pick_device, warnings
from cli.progress import Progress, statistics
from cli.texts import read_prompt
from fast import load_memory, save_memory
from fast.saved import check_kept, memory_nbytes
from tokenizer import StreamDecoder

DEMONSTRATION = """\
A book of 51,000 tokens was read in windows of 256, with a pass key, 71428, in the fifteenth of them, asked for at the end. Next:
  python generate.py --prompt "The sea"        python examples/look_at_memory.py        python generate.py --help"""


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_prompt_flags(parser)
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
    device = pick_device(args.device)
    if args.save_memory:
        check_new_file("--save-memory", args.save_memory)
    prompt = read_prompt(args)
    if args.load_memory and not prompt:
        raise ValueError("--load-memory goes on from a text that was read: the prompt must not be empty")
    config = given(args, (*MEMORY_FLAGS, "mem_attention_grouping"))
    model, tokenizer = load(args.model, device, args.dtype, args.memory, **config)
    if args.compile:
        model.compile_layers()
    digest = tokenizer.digest
    cache = load_memory(args.load_memory, model, tokenizer=digest) if args.load_memory else model.new_cache()
    ids = torch.tensor([tokenizer.encode(prompt, bos=not args.load_memory)], dtype=torch.long, device=device)
    T, decoder, new, unsaved = ids.shape[1], StreamDecoder(tokenizer, continues=bool(prompt)), 0, None
    if args.save_memory:  # before a long prompt is read
        check_kept(cache)
        check_new_file("--save-memory", args.save_memory, memory_nbytes(cache, model, T))
    if not args.quiet:
        for warning in warnings(prompt, T, args.max_new_tokens, model, cache):
            warn(warning)
    progress = Progress(model, T, shown=not args.quiet and sys.stderr.isatty())
    times = [time.perf_counter()]
    most = max(args.max_new_tokens, 1) if args.save_memory else args.max_new_tokens  # the first comes when all is read
    try:
        for token in model.generate(ids, most, cache=cache, **given(args, SAMPLING_FLAGS)):
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
            say(decoder.feed(token))
    finally:  # after Ctrl-C too
        progress.close()
        if new:
            say(decoder.flush() + "\n")
        if len(times) > 1 and not args.quiet:
            tell(statistics(cache, progress, T, times, device))
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
