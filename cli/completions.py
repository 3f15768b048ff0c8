"""Texts that end before a stop string, and several prompts that are continued at once."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fast import FastLlama
from tokenizer import StreamDecoder, Tokenizer


def find_stop(text: str, stops: Sequence[str], whole: bool = False) -> tuple[int, bool]:
    """The first place where one of some stop strings begins, or may begin: the text may end inside of it, if it is not whole.
    And whether one begins there. Nowhere: the text's length."""

    def fits(at: int) -> bool:
        return any(text.startswith(stop, at) or (stop.startswith(text[at:]) and not whole) for stop in stops)

    at = next(filter(fits, range(len(text))), len(text))
    return at, any(text.startswith(stop, at) for stop in stops)


class StopStrings:
    """Cuts a text before the first place where a stop string begins, in whatever pieces it comes. found: it was cut."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = tuple(stops), "", False

    def feed(self, text: str, whole: bool = False) -> str:
        """What is known by now to come before any stop string. The rest is held back, if the text is not whole."""
        held = "" if self.found else self.held + text
        at, found = find_stop(held, self.stops, whole)
        self.held, self.found = held[at:], self.found or found
        return held[:at]


class Completion:
    """What follows a prompt, as its ids come: up to an id that ends a text, or before a stop string. ended: it is whole."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], ends: int | Sequence[int], stops: Sequence[str] = ()
    ):
        self.decoder = StreamDecoder(tokenizer, continues=any(map(tokenizer.is_text, prompt)))
        self.ends, self.stops, self.ended = np.atleast_1d(ends), StopStrings(stops), False

    def feed(self, i: int) -> str:
        """The text that is certain with this id."""
        if self.ended:
            return ""
        text = self.stops.feed(self.decoder.feed(i))
        self.ended = i in self.ends or self.stops.found
        return text

    def flush(self) -> str:
        """What was held back, when no more ids come."""
        self.ended = True
        return self.stops.feed(self.decoder.flush(), whole=True)


def complete(
    model: FastLlama, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, stops=(), **options
) -> list[str]:
    """Continues prompts, ids each, as one batch. options: sampling and a cache, for `FastLlama.generate`. Where the longest is
    longer than last_context_length, windows are cut as its length asks for: others are not read as they would be alone."""
    device, longest = model.norm.weight.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[model.config.pad_token_id] * n + prompt for n, prompt in zip(padding, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device) if any(padding) else None
    rows = [Completion(tokenizer, prompt, model.config.eos_token_id, stops) for prompt in prompts]
    texts = [""] * len(rows)
    for new in model.generate(ids, max_new_tokens, attention_mask=mask, **options):
        texts = [text + row.feed(i) for text, row, i in zip(texts, rows, new.tolist())]
        if all(row.ended for row in rows):
            break
    return [text + row.flush() for text, row in zip(texts, rows)]


def batches(prompts: Sequence[list[int]], size: int, last: int) -> Iterator[list[list[int]]]:
    """Prompts in their order, in batches of at most `size` in which each is continued as it would be alone: all of one length, or
    of at most `last` ids each, so many that they and what follows stay in one local context."""
    batch = []
    for prompt in prompts:
        lengths = {len(x) for x in (*batch, prompt)}
        if batch and (len(batch) == size or (len(lengths) > 1 and max(lengths) > last)):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
