"""Completions end where they should, whatever the pieces are that their text comes in, and whatever stands beside them."""

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.completions import Completion, StopStrings, batches, complete, find_stop
from cli.loading import TINY, load
from cli.test_tokenizer import OURS
from fast import FastLlama
from tokenizer import Tokenizer


def naive(text: str, stops: list[str]) -> str:
    """Up to the first place where any of them begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    """The text, cut at random places; some pieces are empty."""
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(len(text) + 2)))
    return (text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)]))


def random_texts(n: int) -> Iterator[tuple[str, list[str], random.Random]]:
    """Of few letters, so that stop strings begin often, overlap and contain each other."""
    rng = random.Random(0)
    for _ in range(n):
        letters = "ab\n"[: rng.choice((2, 2, 3))]
        text = "".join(rng.choices(letters, k=rng.randrange(25)))
        yield text, ["".join(rng.choices(letters, k=rng.randrange(1, 7))) for _ in range(rng.randrange(4))], rng


def test_text_ends_before_the_first_stop_string_whatever_the_pieces_are():
    cut = 0
    for text, stops, rng in random_texts(20000):
        cutter, right = StopStrings(stops), naive(text, stops)
        printed = "".join(map(cutter.feed, pieces(text, rng))) + cutter.feed("", whole=True)
        assert (printed, cutter.found) == (right, right != text), (text, stops)
        assert not cutter.found or cutter.feed("more") == cutter.feed("more", whole=True) == ""
        cut += cutter.found
    assert 5000 < cut < 15000


def test_text_is_held_back_only_while_a_stop_string_may_begin_in_it():
    """What may still be followed by anything is what no continuation could make a part of a stop string."""
    for text, stops, _ in random_texts(3000):
        possible = [stop[:n] for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        right = len(naive(text, stops))
        right = min(right, len(text) - max(map(len, possible), default=0))
        assert find_stop(text, stops)[0] == right, (text, stops)
        assert find_stop(text, stops, whole=True) == (len(naive(text, stops)), naive(text, stops) != text)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
@pytest.mark.parametrize("prompt", ["The sea", ""])
def test_a_completion_is_the_text_of_its_ids_up_to_an_end_or_a_stop_string(path, prompt):
    tokenizer, rng, ended = Tokenizer(path), random.Random(0), 0
    nasty = [tokenizer.sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x82\xac\xc3\n"]
    before = tokenizer.encode(prompt)
    for _ in range(2000):
        ids = [rng.choice([rng.randrange(3, tokenizer.vocab_size), *nasty]) for _ in range(8)]
        ends = rng.choices(range(3, tokenizer.vocab_size), k=2)  # each of which is some text
        ids[rng.randrange(8)] = rng.choice([1, 2, *ends])
        text = tokenizer.decode([*before, *ids])[len(prompt) :]
        at = rng.randrange(len(text))
        stops = [text[at : at + rng.randrange(1, 5)]] * rng.randrange(2)
        row = Completion(tokenizer, before, [2, *ends], stops)
        printed = "".join(map(row.feed, ids))
        ended += row.ended
        printed += row.flush()
        last = next((n for n, i in enumerate(ids) if i in (2, *ends)), len(ids))
        right = tokenizer.decode([*before, *ids[: last + 1]])[len(prompt) :]
        assert printed == naive(right, stops), (ids, ends, stops)
        assert row.ended and row.feed(ids[0]) == ""
    assert 500 < ended < 2000


def test_prompts_in_batches_are_in_order_no_more_than_fit_and_as_many_as_do():
    rng = random.Random(0)

    def fits(batch: list[list[int]], size: int, last: int) -> bool:
        alike = all(len(x) == len(batch[0]) for x in batch)
        return len(batch) <= size and (alike or all(len(x) <= last for x in batch))

    for _ in range(2000):
        prompts = [[n] * rng.choice((1, 2, 3, 7, 7, 9)) for n in range(rng.randrange(12))]
        size, last = rng.randrange(1, 5), rng.choice((-3, 0, 2, 3, 8, 20))
        found = list(batches(prompts, size, last))
        assert sum(found, []) == prompts and all(found)
        assert all(fits(batch, size, last) for batch in found)
        assert not any(fits([*batch, after[0]], size, last) for batch, after in zip(found, found[1:]))


@pytest.fixture(scope="module")
def tiny() -> tuple[FastLlama, Tokenizer]:
    torch.set_num_threads(1)
    return load(TINY, torch.device("cpu"))


def from_book(tokenizer: Tokenizer, *lengths: int) -> list[list[int]]:
    """Prompts of so many ids."""
    book = tokenizer.encode((TINY / "book.txt").read_text(encoding="utf-8")[5000:9000], bos=False)
    return [[1, *book[100 * n : 100 * n + length - 1]] for n, length in enumerate(lengths)]


def alone(tiny, prompt: list[int], new: int, **options) -> str:
    """The text after a prompt, from ids that come and are decoded at once."""
    ids = [i.item() for i in tiny[0].generate(torch.tensor([prompt]), new, **options)]
    return tiny[1].decode(prompt + ids).removeprefix(tiny[1].decode(prompt))


@pytest.mark.parametrize("lengths, new", [((90, 3, 41, 66, 128, 17), 60), ((150,) * 3, 40), ((250,) * 3, 20)])
def test_each_row_of_a_batch_is_what_it_would_be_alone_also_where_others_have_ended(lengths, new, tiny):
    """The window is of 256 tokens, 128 of which stay local."""
    prompts = from_book(tiny[1], *lengths)
    [batch] = batches(prompts, 6, 128)
    texts = [alone(tiny, prompt, new, temperature=0) for prompt in prompts]
    assert len(set(texts)) == len(texts)
    for stops in ([], [texts[0][9:12]], [texts[1][5:9], texts[-1][20:22], "\n"]):
        right = [naive(text, stops) for text in texts]
        assert complete(*tiny, batch, new, stops, temperature=0) == right
        assert not stops or any(map(str.__ne__, right, texts))


def test_a_row_that_ends_does_not_change_what_is_drawn_for_the_others(tiny):
    prompts, sampling = from_book(tiny[1], 30, 20, 10, 30), {"temperature": 1.0, "seed": 3}
    texts = complete(*tiny, prompts, 40, **sampling)
    assert texts != complete(*tiny, prompts, 40, **sampling | {"seed": 4})
    for row in range(4):
        stops = [texts[row][4:9]]
        assert complete(*tiny, prompts, 40, stops, **sampling) == [naive(text, stops) for text in texts]


class Scripted(FastLlama):
    """It reads, but writes what it is given: the next ids of each row."""

    script: Iterator[list[int]] = iter(())

    def logits(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.tensor(next(self.script)), self.config.vocab_size)[:, None].float()


def test_generation_ends_when_all_rows_have_ended_each_in_its_way():
    model, tokenizer = Scripted.from_pretrained(TINY), Tokenizer(TINY / "tokenizer.model")
    stops, more = ["\nUSER:", " it"], tokenizer.encode(" and more" * 20, bos=False)
    written = ["Fine, thank you.", "Yes.\nUSER: and you", "A USA, an USE\nUS of it, if so"]
    ids = [tokenizer.encode(text, bos=False) for text in written]
    rows = [[*ids[0], 2, *more], [*ids[1], *more], [*ids[2], *more]]
    ends = [len(ids[0]) + 1]  # how many ids each takes
    for row in rows[1:]:
        ends.append(next(n for n in range(len(row)) if any(stop in tokenizer.decode(row[:n]) for stop in stops)))
    asked = iter(zip(*rows))
    model.script = asked
    texts = complete(model, tokenizer, [[1], [1, 1], [1]], 50, stops, temperature=0)
    assert texts == ["Fine, thank you.", "Yes.", "A USA, an USE\nUS of"]
    assert len(list(asked)) == min(map(len, rows)) - max(ends) and len(set(ends)) == 3
