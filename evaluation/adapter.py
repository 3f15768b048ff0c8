"""A model as lm-evaluation-harness asks for one. Imported where that package is there."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice

from cli.ending import warn

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cli.completions import batches, complete
from fast import FastLlama
from longllama import require
from tokenizer import Tokenizer

POSITIONS = 1024  # of all rows of a batch, whose logits exist at a time
NEW = 256  # tokens that a task gets which does not say how many, as lm_eval's own adapters have it
SETTINGS = (
    "do_sample",
    "max_gen_toks",
    "temperature",
    "top_k",
    "top_p",
    "until",
)  # of generation, which are known here
IGNORED = -100  # a target that does not count


class LongLlamaLM(TemplateLM):
    """Memory layers read a context of any length, window by window. Without them a context is cut on the left, as lm_eval's own
    adapters do. last_context_length: how many tokens at its end stay local; None: as many as the window holds."""

    def __init__(self, model: FastLlama, tokenizer: Tokenizer, batch_size: int, last_context_length: int | None = None):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.last = model, tokenizer, batch_size, last_context_length
        self.window, self.remembers = model.config.max_position_embeddings, bool(model.config.mem_layers)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that is scored as a whole: `<s>`, or for want of it what ends the text before."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, bos=add_special_tokens is not False)

    def get_model_info(self) -> dict:
        """What lm_eval writes beside the results."""
        config = replace(self.model.config, last_context_length=self.stay_local(0))
        return {"model_config": asdict(config), "model_dtype": str(self.model.norm.weight.dtype)}

    def stay_local(self, new: int) -> int:
        """How many tokens of a context stay local where `new` ones follow. All that fit the window with them, but half of it at
        least: few tasks need all the room that they ask for."""
        return self.last or max(self.window - new, self.window // 2)

    def readable(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """What the model can read of prompts, with `new` tokens after each."""
        if self.remembers:
            return prompts
        room = self.window - new
        require(room > 0, f"{new} new tokens leave no room for a context in a window of {self.window}")
        if cut := sum(len(prompt) > room for prompt in prompts):
            warn(f"without memory layers {cut} of {len(prompts)} contexts are cut on the left, to {room} tokens")
        return [prompt[-room:] for prompt in prompts]

    def in_batches(self, prompts: list[list[int]], new: int, read: Callable, quiet: bool) -> list:
        """read(some prompts, their places) for all of them, the longest first: what does not fit is known at once."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        places, results = iter(order), {}
        with tqdm(total=len(prompts), disable=quiet, desc="Reading") as progress:
            for batch in batches([prompts[i] for i in order], self.batch_size, self.stay_local(new)):
                at = list(islice(places, len(batch)))
                results |= zip(at, read(batch, at))
                progress.update(len(batch))
        return [results[i] for i in range(len(prompts))]

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding gives it. requests: texts, the context's ids, the
        continuation's."""
        continuations = [continuation for _, _, continuation in requests]
        longest = max(map(len, continuations), default=0)
        fits = self.remembers or longest <= self.window
        require(fits, f"a continuation of {longest} tokens exceeds the window of {self.window}, without memory layers")
        apart = "a continuation adds no token to its context: the task's target_delimiter has to keep them apart"
        require(all(continuations), apart)
        prompts = self.readable([(context + continuation)[:-1] for _, context, continuation in requests], 0)

        def read(batch: list[list[int]], at: list[int]) -> list[tuple[float, bool]]:
            return self.score(batch, [continuations[i] for i in at])

        return self.in_batches(prompts, 0, read, disable_tqdm)

    @torch.no_grad()
    def score(self, prompts: list[list[int]], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Each prompt ends before its continuation does, so that its last positions are those that the continuation is
        predicted at."""
        device = self.model.norm.weight.device

        def padded(rows: list[list[int]], padding: int) -> torch.Tensor:  # on the left: all rows end together
            rows = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
            return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")

        ids = padded(prompts, self.model.config.pad_token_id)  # (B, T)
        mask = padded([[1] * len(prompt) for prompt in prompts], 0)
        targets = padded(continuations, IGNORED)  # (B, n)
        B, n = targets.shape
        hidden, _ = self.model.hidden_states(ids, None, mask, self.stay_local(0), n)  # (B, n, C)
        scores, greedy, at_once = [], [], max(POSITIONS // B, 1)
        for x, right in zip(hidden.split(at_once, dim=1), targets.split(at_once, dim=1)):
            logits = self.model.logits(x).float()  # (B, at_once, V)
            scores.append(-F.cross_entropy(logits.mT, right, reduction="none", ignore_index=IGNORED))
            greedy.append((logits.argmax(dim=-1) == right) | (right == IGNORED))
        scores, greedy = torch.cat(scores, dim=1).double().sum(dim=1), torch.cat(greedy, dim=1).all(dim=1)  # (B,)
        return list(zip(scores.tolist(), greedy.tolist()))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm=False) -> list[float]:
        """The log-probability of each text after `<s>`: with memory as a whole, without it in lm_eval's windows."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = []
        for ids in texts:
            length = max(len(ids), 1) if self.remembers else self.window
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in rolling])
        scores = iter(self._loglikelihood_tokens([pair for pairs in windows for pair in pairs], disable_tqdm))
        return [sum(score for score, _ in islice(scores, len(pairs))) for pairs in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm=False) -> list[str]:
        """What each context goes on with, up to what its task says ends it."""
        alike, results = defaultdict(list), {}
        for i, request in enumerate(requests):
            alike[repr(request.args[1])].append(i)
        for places in alike.values():
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in places]
            results |= zip(places, self.generate(contexts, requests[places[0]].args[1], disable_tqdm))
        return [results[i] for i in range(len(requests))]

    def generate(self, contexts: list[list[int]], settings: dict, quiet: bool) -> list[str]:
        settings = normalize_gen_kwargs(settings, NEW)
        unknown = sorted(settings.keys() - {*SETTINGS})
        require(not unknown, f"generation_kwargs {', '.join(unknown)}: only {', '.join(SETTINGS)} are known here")
        new, stops = settings["max_gen_toks"], [text for text in settings["until"] if text]
        sampling = {"top_k": settings.get("top_k"), "top_p": settings.get("top_p")}
        sampling["last_context_length"] = self.stay_local(new)
        sampling["temperature"] = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0

        def read(batch: list[list[int]], at: list[int]) -> list[str]:
            return [self.alone(x) for x in complete(self.model, self.tokenizer, batch, new, stops, **sampling)]

        return self.in_batches(self.readable(contexts, new), new, read, quiet)

    def alone(self, text: str) -> str:
        """A continuation as the tokenizer decodes its ids alone, which is what lm_eval's own adapters give: without the space
        that it begins with, or all of them."""
        if self.tokenizer.drops_all_spaces:
            return text.lstrip(" ")
        return text.removeprefix(" ") if self.tokenizer.drops_one_space else text
