"""The pass-key task (Mohtashami and Jaggi 2023; the paper's figure 1): five digits hidden in a long text, then asked for."""

import re
from itertools import accumulate, pairwise

import torch

from cli.texts import KEY, QUESTION
from longllama import require
from tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "GRASS",
    "INTRO",
    "KEY",
    "MOST_TRIALS",
    "QUESTION",
    "STEPS",
    "answers",
    "prompt_ids",
    "question_and_answer",
    "random_key",
]

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MOST_TRIALS = 1 << 20
STEPS = 7  # tokens that say a key, by any tokenizer: at most a space, five digits, and what shows that no sixth follows


def random_key(rng: torch.Generator) -> str:
    return "".join(map(str, torch.randint(10, (5,), generator=rng).tolist()))


def answers(text: str, key: str) -> bool:
    """Whether the number that a text begins with is the key."""
    return re.match(r"\s*([0-9]*)", text)[1] == key


def question_and_answer(tokenizer: Tokenizer, key: str) -> tuple[list[int], list[bool]]:
    """The ids of the question with its answer, and which of them have digits of the key in them. A tokenizer may have one id for
    the whole number, or for a part of it with the space before it or the full stop."""
    ids = tokenizer.encode(f"{QUESTION} {key}.", bos=False)
    text, decoder = tokenizer.decode(ids), StreamDecoder(tokenizer)
    start = text.rfind(key)
    require(start >= 0, "the tokenizer cannot write digits, which pass keys are made of")
    ends = accumulate((len(decoder.feed(i)) for i in ids), initial=0)
    return ids, [end > start and begin < start + len(key) for begin, end in pairwise(ends)]


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
    while 0 < place < n and not tokenizer.begins_word(text[place]):
        place -= 1  # not inside a word
    return start + text[:place] + needle + text[place:] + question
