"""What changes logits before an id is drawn from them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longllama import require


class RepetitionPenalty:
    """A `logits_processor` for `generate`: logits of ids that were there are divided by the penalty where they are above 0, and
    multiplied by it where they are below (Keskar et al. 2019): above 1 it makes them less likely, below 1 likelier. How often
    an id was there does not matter.

    As in transformers, ids of the prompt count too. Padding does not count: a row gets the logits that it would get alone.
    """

    def __init__(self, penalty: float, attention_mask: Tensor | None = None, then: Callable | None = None):
        """attention_mask (B, T): of the prompt; 0 is padding, on the left. then: another processor, that comes next."""
        require(0 < penalty < 1e38, f"repetition_penalty must be above 0 and below 1e38, not {penalty}")
        self.penalty, self.mask, self.then = penalty, attention_mask, then

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids (B, n), logits (B, V) -> (B, V)."""
        seen = ids
        if self.mask is not None:
            mask = F.pad(self.mask, (0, ids.shape[1] - self.mask.shape[1]), value=1)
            seen = torch.where(mask.bool(), ids, ids[:, -1:])  # the newest is no padding, and counts once
        scores = logits.gather(1, seen)
        logits = logits.scatter(1, seen, torch.where(scores > 0, scores / self.penalty, scores * self.penalty))
        return logits if self.then is None else self.then(ids, logits)
