"""The pass-key task (Mohtashami and Jaggi 2023; the paper's figure 1): five digits hidden in a long text, then asked for."""

import torch

from cli.texts import KEY, QUESTION
from tokenizer import SPACE, Tokenizer

__all__ = ["GRASS", "INTRO", "KEY", "QUESTION", "prompt_ids"]

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def prompt_ids(
    tokenizer: Tokenizer, length: int, depth: float, key: str, filler: list[int], rng: torch.Generator
) -> list[int]:
    """`length` token ids: intro, filler with the key at `depth` of it, question. The filler starts anywhere in the list."""
    start, needle, question = (tokenizer.encode(t, bos=t is INTRO) for t in (INTRO, KEY.format(key=key), QUESTION))
    n = length - len(start) - len(needle) - len(question)
    if not filler:
        raise ValueError("the text around the pass key is empty: name another file")
    if n < 0:
        raise ValueError(f"a prompt with a pass key takes at least {length - n} tokens, {length} are too few")
    offset = int(torch.randint(len(filler), (1,), generator=rng))
    text = [filler[(offset + i) % len(filler)] for i in range(n)]
    place = round(depth * n)
    while 0 < place < n and not tokenizer.sp.id_to_piece(text[place]).startswith(SPACE):
        place -= 1  # not inside a word
    return start + text[:place] + needle + text[place:] + question
