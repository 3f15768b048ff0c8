"""What changes logits, and what is drawn from them, held to transformers' own processors."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fast import FastLlama
from fast.sampling import RepetitionPenalty
from fast.test_model import small_config, small_model
from longllama import sample


def random_logits(*shape: int) -> Tensor:
    return torch.randn(shape) * 4


class Drawn(TorchDispatchMode):
    """Notes what is drawn from, and what is drawn."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "multinomial":
            self.probs = args[0] / args[0].sum(dim=-1, keepdim=True)
        return out


@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [0, 7, 29, 1]], ids=["none", "some"])
@pytest.mark.parametrize("penalty", [0.01, 0.7, 1.0, 1.3, 50.0])
def test_the_penalty_is_that_of_transformers_and_padding_is_not_an_id_that_was_there(penalty, padding):
    """Their processor leaves out as many ids of each row as it is told to."""
    torch.manual_seed(0)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=torch.tensor(padding))
    mask = (torch.arange(30) >= torch.tensor(padding)[:, None]).long()
    for V, new in product((7, 50, 500), (0, 1, 40)):
        for _ in range(20):
            ids, logits = torch.randint(V, (4, 30 + new)), random_logits(4, V)
            before = logits.clone()
            for processor in (RepetitionPenalty(penalty, mask), *[RepetitionPenalty(penalty)] * (not any(padding))):
                torch.testing.assert_close(processor(ids, logits), theirs(ids, logits.clone()), rtol=0, atol=0)
            assert torch.equal(logits, before)


KEPT = [*product((0.3, 1.0, 2.5), (None, 1, 5, 1000), (None, 0.05, 0.6, 0.97), (None, 0.0, 0.02, 0.3, 1.0))]


@pytest.mark.parametrize("V", [3, 60])
def test_ids_are_drawn_from_what_transformers_leaves_of_them_in_its_order(V):
    torch.manual_seed(0)
    for temperature, top_k, top_p, min_p in KEPT:
        logits = random_logits(20, V)
        right = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k is not None:
            right = transformers.TopKLogitsWarper(top_k)(None, right)
        if top_p is not None:
            right = transformers.TopPLogitsWarper(top_p)(None, right)
        if min_p is not None:
            right = transformers.MinPLogitsWarper(min_p)(None, right)
        right = right.softmax(dim=-1)
        with Drawn() as drawn:
            ids = sample(logits, temperature, top_k, top_p, min_p)
        likeliest = right.sort(dim=-1, descending=True).values[:, : drawn.probs.shape[1]]
        torch.testing.assert_close(drawn.probs, likeliest, rtol=1e-4, atol=1e-6)
        assert torch.equal(drawn.probs > 0, likeliest > 0)
        assert (right.gather(1, ids[:, None]) > 0).all()


@torch.no_grad()
def test_generation_penalises_ids_of_the_prompt_and_new_ones_and_no_others():
    model, ids = small_model(), torch.randint(61, (2, 20))
    text, right = ids, []
    penalise = transformers.RepetitionPenaltyLogitsProcessor(1.8)
    _, before = model(torch.randint(61, (2, 9)))  # which another call has read
    cache = before.fork()
    new = ids
    for _ in range(12):
        logits, cache = model(new, cache)
        new = penalise(text, logits[:, -1]).argmax(dim=-1, keepdim=True)
        text, right = torch.cat((text, new), dim=1), [*right, new[:, 0].tolist()]

    def generated(**options) -> list[list[int]]:
        options |= {"temperature": 0, "eos_token_id": None}
        return [new.tolist() for new in model.generate(ids, 12, cache=before.fork(), **options)]

    assert generated(repetition_penalty=1.8) == right == generated(logits_processor=penalise)
    assert generated() == generated(repetition_penalty=1.0) != right


class FavoursPadding(FastLlama):
    """By far the likeliest id is that of padding."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + 20 * F.one_hot(torch.tensor(self.config.pad_token_id), self.config.vocab_size)


@torch.no_grad()
def test_a_row_beside_padding_is_penalised_as_it_would_be_alone():
    torch.manual_seed(0)
    model = FavoursPadding(small_config(pad_token_id=5)).eval()
    ids = torch.randint(6, 61, (2, 8))
    ids[0, :3] = 5
    mask = (torch.arange(8) >= torch.tensor([[3], [0]])).long()

    def first(ids: Tensor, mask: Tensor | None, penalty: float | None) -> list[int]:
        options = {"temperature": 0, "eos_token_id": None, "repetition_penalty": penalty, "attention_mask": mask}
        return [new[0].item() for new in model.generate(ids, 7, **options)]

    alone = first(ids[:1, 3:], None, 1e6)
    assert alone[0] == 5 and 5 not in alone[1:]
    assert first(ids, mask, 1e6) == alone
    assert first(ids, mask, None) == [5] * 7


@torch.no_grad()
def test_another_processor_comes_after_the_penalty_and_gets_all_ids_of_the_call():
    model, ids, seen = small_model(), torch.randint(61, (2, 8)), []

    def repeat(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return torch.full_like(logits, -torch.inf).scatter(1, ids[:, :1], 0.0)

    options = {"eos_token_id": None, "repetition_penalty": 1e6, "logits_processor": repeat}
    new = torch.stack(list(model.generate(ids, 3, **options)), dim=1)
    assert torch.equal(new, ids[:, :1].expand(2, 3))
    assert seen == [torch.cat((ids, new[:, :n]), dim=1).tolist() for n in range(3)]
