"""Many prompts, from a file of JSON lines, continued in batches: what `generate.py --prompts` does."""

import argparse
import json
import random
import time
from collections.abc import Iterator

from cli.ending import say, tell, warn

from cli.completions import batches, complete
from cli.flags import BATCH, SAMPLING_FLAGS, given
from cli.loading import encode_prompt, overflow_warnings
from cli.texts import is_utf8, read_json_lines
from fast import FastLlama
from longllama import Cache
from tokenizer import Tokenizer


def read_prompts(file: str) -> dict[str, dict]:
    """The objects in the file of --prompts, by what to call each. Raises ValueError where one has no "prompt"."""
    rows = dict(read_json_lines(file, "--prompts"))
    for name, row in rows.items():
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not is_utf8(prompt):
            raise ValueError(f'{name} has no text as its "prompt"')
    if not rows:
        raise ValueError(f'--prompts {file} has no prompts: write objects {{"prompt": "..."}}, one a line')
    return rows


def check_longest(prompts: dict[str, list[int]], new: int, model: FastLlama, cache: Cache) -> Iterator[str]:
    """What may surprise about `new` ids after the longest prompt. Raises ValueError where the window ends before they do."""
    config, (name, longest) = model.config, max(prompts.items(), key=lambda item: len(item[1]))
    T, window = cache.local_length + len(longest), config.max_position_embeddings
    if not config.mem_layers and T + max(new, 1) - 1 > window:  # the last one is not read
        raise ValueError(f"{name}: {T} tokens and {new} new ones exceed the window of {window}, without --mem-layers")
    for text in overflow_warnings(len(longest), new, model, cache):
        yield f"{name}: {text}"


def completions(
    args: argparse.Namespace, prompts: list[list[int]], model: FastLlama, tokenizer: Tokenizer, cache: Cache
) -> Iterator[str]:
    """What follows each prompt after what the cache holds, as batches are done."""
    config, sampling, seeds = model.config, given(args, SAMPLING_FLAGS), random.Random(args.seed)
    window, last = config.max_position_embeddings, config.last_context_length
    local = min(last if config.mem_layers else window, window - args.max_new_tokens)
    if args.load_memory:  # padding would stand between what was read before and a prompt
        local = 0
    for batch in batches(prompts, args.batch or BATCH, local):
        if args.seed is not None:  # batches that drew alike would continue a prompt that is in both of them alike
            sampling["seed"] = seeds.getrandbits(63)
        options = {"cache": cache.expand(len(batch)), **sampling}
        yield from complete(model, tokenizer, batch, args.max_new_tokens, args.stop, **options)


def continue_prompts(
    args: argparse.Namespace, rows: dict[str, dict], model: FastLlama, tokenizer: Tokenizer, cache: Cache
):
    """Writes each object with its "completion", and says what it took."""
    memory = bool(args.load_memory)
    prompts = {name: encode_prompt(tokenizer, row["prompt"], memory, f"{name}: ") for name, row in rows.items()}
    for text in check_longest(prompts, args.max_new_tokens, model, cache):
        if not args.quiet:
            warn(text)
    ids, start = list(prompts.values()), time.perf_counter()
    for row, text in zip(rows.values(), completions(args, ids, model, tokenizer, cache)):
        say(json.dumps(row | {"completion": text}) + "\n")
    if not args.quiet:
        tokens, seconds = sum(map(len, ids)), time.perf_counter() - start
        tell(f"{len(rows):,} prompts, {tokens:,} tokens, continued in {seconds:,.1f} s")
