"""Texts that end before a stop string, and several prompts that are continued at once."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from fast import FastLlama
from tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Cuts a text that comes in pieces before the first place where one of some strings begins, whatever the pieces are."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = tuple(stops), "", False

    def feed(self, text: str) -> str:
        """What is known to come before any stop string by now. The rest is held back: a stop string may begin in it."""
        if self.found:
            return ""
        held = self.held + text
        places = (at for at in range(len(held)) if self.may_begin(held, at))
        safe = next(places, len(held))
        self.found = any(held.startswith(stop, safe) for stop in self.stops)
        self.held = "" if self.found else held[safe:]
        return held[:safe]

    def may_begin(self, text: str, at: int) -> bool:
        return any(text.startswith(stop, at) or stop.startswith(text[at:]) for stop in self.stops)

    def flush(self) -> str:
        """What was held back, where the text ends."""
        held, self.held = self.held, ""
        return held[: min((held.find(stop) for stop in self.stops if stop in held), default=len(held))]


class Completion:
    """The text of one row of a batch, as its ids come. ended: nothing that comes now belongs to it."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], stops: Sequence[str]):
        self.decoder, self.ends, self.stops = StreamDecoder(tokenizer, continues=True), ends, StopStrings(stops)
        self.text, self.tokens, self.ended = "", 0, False

    def feed(self, i: int):
        if not self.ended:
            self.ended = i in self.ends
            self.tokens += 1
            self.text += self.stops.feed(self.decoder.feed(i))
            self.ended |= self.stops.found

    def whole(self) -> str:
        """The text, when no more ids come."""
        return self.text + self.stops.feed(self.decoder.flush()) + self.stops.flush()


def complete(
    model: FastLlama, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, stops=(), **sampling
) -> list[str]:
    """Continues prompts, ids each, as one batch: up to what ends a text, or before a stop string. sampling: for
    `FastLlama.generate`. Where the longest is longer than last_context_length, windows are cut as its length asks for: a shorter
    one is not read as it would be alone."""
    device, longest = model.norm.weight.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[model.config.pad_token_id] * n + prompt for n, prompt in zip(padding, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device) if any(padding) else None
    ends = np.atleast_1d(model.config.eos_token_id).tolist()
    rows = [Completion(tokenizer, ends, stops) for _ in prompts]
    for tokens in model.generate(ids, max_new_tokens, attention_mask=mask, **sampling):
        for row, i in zip(rows, tokens.tolist()):
            row.feed(i)
        if all(row.ended for row in rows):
            break
    return [row.whole() for row in rows]


def batches(prompts: Sequence[list[int]], size: int, last: int) -> Iterator[list[list[int]]]:
    """Prompts in their order, in batches whose rows are read as each would be alone: those of more than `last` ids are alone."""
    batch = []
    for prompt in chain(prompts, [None]):
        full = len(batch) == size or prompt is None or any(len(x) > last for x in (*batch, prompt))
        if batch and full:
            yield batch
            batch = []
        if prompt is not None:
            batch.append(prompt)
