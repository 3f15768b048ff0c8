"""`FastLlama`: the model of longllama.py with everything in this folder plugged in, and its config.

    model = FastLlama.from_pretrained("tiny")

Its weights, its interface and, up to rounding, its logits are those of `LongLlama`. It also checks what it is given before it
computes: configs, caches and files of any make are refused in a line that names what does not fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fast.context import FastContext
from fast.files import Weights, check_fits, find_weights, read_json
from fast.folder import check_folder
from fast.linear import LIMITS, Limits, use_fast_linear
from fast.memory import FastMemory
from fast.quantised import GROUP, KINDS, Int4Linear, quantised_weights, use_quantised
from fast.sampling import RepetitionPenalty
from fast.steps import Steps, captured, compile_blocks, compile_step, compiled, join
from longllama import Cache, LongLlama, LongLlamaConfig, merge, require

MEM_DTYPES = (*LongLlamaConfig.MEM_DTYPES, "float8_e4m3fn")
ROPE = {  # what a rope_type needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LARGEST = 1 << 28  # of any size or length in a config: what is far beyond all use is refused, before it overflows


def is_count(value) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class FastConfig(LongLlamaConfig):
    """With settings of `FastMemory`, float8 for mem_dtype, and every value checked. Impossible ones raise ValueError, by name."""

    mem_topk: int | None = None  # a query attends to this many remembered tokens, those with the best keys; None: all
    mem_device: str | None = None  # "cpu": memory is kept in main memory, and copied to a GPU in pieces, as it is used
    weight_dtype: str | None = None  # "int8" or "int4": matrices are rounded to that; None: they are as the model is

    MEM_DTYPES = MEM_DTYPES

    def __post_init__(self):
        if self.pad_token_id == -1:  # none, in old LLaMA's configs
            vars(self).update(pad_token_id=0)
        for field in fields(self):
            self.check(field.name, field.type, getattr(self, field.name), field.default)
        require(isinstance(self.mem_layers, (list, tuple)), f"mem_layers must be a list, not {self.mem_layers!r}")
        require(
            all(type(i) is int for i in self.mem_layers), f"mem_layers must be whole numbers, not {self.mem_layers}"
        )
        grouping = self.mem_attention_grouping
        fits = grouping is None or (
            isinstance(grouping, (list, tuple)) and len(grouping) == 2 and all(map(is_count, grouping))
        )
        require(fits, f"mem_attention_grouping must be null or [heads, queries] of at least 1, not {grouping!r}")
        vars(self).update(mem_attention_grouping=grouping and tuple(grouping))
        if not isinstance(self.eos_token_id, int):
            vars(self).update(eos_token_id=tuple(self.eos_token_id))
        require(self.mem_device in (None, "cpu"), f'mem_device must be null or "cpu", not {self.mem_device!r}')
        if self.rope_scaling is not None:
            vars(self).update(rope_scaling=self.checked_rope(self.rope_scaling))
        super().__post_init__()
        self.check_weight_dtype()

    def check_weight_dtype(self):
        kind, attended = self.weight_dtype, self.num_attention_heads * self.head_dim
        sizes = self.hidden_size, attended, self.intermediate_size  # of rows
        require(kind in (None, *KINDS), f"weight_dtype must be null, {' or '.join(KINDS)}, not {kind!r}")
        fits = kind != "int4" or all(n % GROUP == 0 for n in sizes)
        require(fits, f"int4 rounds {GROUP} weights together, and rows have {', '.join(map(str, sizes))}: take int8")

    def check(self, name: str, kind, value, default):
        limits = dict.fromkeys(("bos_token_id", "pad_token_id"), "vocab_size")
        limits["keep_local"] = "max_position_embeddings"
        if value is None and default is None:
            return
        if name in limits:
            fits = type(value) is int and 0 <= value < getattr(self, limits[name])
            require(fits, f"{name} must be one whole number, at least 0 and less than {limits[name]}, not {value!r}")
        elif name == "eos_token_id":  # one that the model has not ends nothing
            ids = value if isinstance(value, (list, tuple)) else [value]
            fits = ids and all(type(i) is int and abs(i) <= LARGEST for i in ids)
            require(bool(fits), f"{name} must be one whole number, or several, not {value!r}")
        elif kind in (int, int | None):
            fits = is_count(value) and value <= LARGEST
            require(fits, f"{name} must be a whole number of 1 to {LARGEST}, not {value!r}")
        elif kind is bool:
            require(type(value) is bool, f"{name} must be true or false, not {value!r}")
        elif kind is float:
            fits = type(value) in (int, float) and 0 < value < 1e38
            require(fits, f"{name} must be above 0 and below 1e38, not {value!r}")

    @staticmethod
    def checked_rope(rope: dict) -> dict:
        require(isinstance(rope, dict), f"rope_scaling must be null or a JSON object, not {rope!r}")
        kind = rope.get("rope_type")
        known = isinstance(kind, str) and kind in ROPE
        require(known, f"rope_scaling's rope_type {kind!r} is not supported, only default, {', '.join(ROPE)}")
        numbers = {name: rope.get(name) for name in ROPE[kind]}
        for name, x in numbers.items():
            fits = type(x) in (int, float) and 0 < x < 1e38
            require(fits, f"rope_scaling's {name} must be above 0 and below 1e38, not {x!r}")
        fits = kind != "llama3" or numbers["low_freq_factor"] < numbers["high_freq_factor"]
        require(fits, f"rope_scaling's low_freq_factor must be below its high_freq_factor, not {numbers}")
        return {"rope_type": kind} | numbers

    @classmethod
    def from_json(cls, path: str | Path, **overrides) -> "FastConfig":
        """As LongLlamaConfig's, and what ends a text from the generation_config.json beside it, if it says so."""
        raw, generation = read_json(Path(path)), Path(path).with_name("generation_config.json")
        try:
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            flat = isinstance(rope, dict) and not any(isinstance(x, dict) for x in rope.values())
            require(flat, "rope_parameters or rope_scaling must be a JSON object, the same for all layers")
            slides = raw.get("sliding_window")
            require(slides is None or is_count(slides), f"sliding_window must be null or at least 1, not {slides!r}")
            config = super().from_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        if eos is not None:
            try:
                config = replace(config, eos_token_id=eos)
            except ValueError as error:
                raise ValueError(f"{generation}: {error}") from None
        return replace(config, **overrides)


class FastLlama(LongLlama):
    config_class = FastConfig
    limits: Limits = LIMITS

    def __init__(self, config: LongLlamaConfig):
        super().__init__(config if isinstance(config, FastConfig) else FastConfig(**asdict(config)))
        if self.config.weight_dtype is None:
            use_fast_linear(self, self.limits)
        else:
            use_quantised(self, self.config.weight_dtype)
            self.tie_weights()
        self.compiled_logits: Callable | None = None
        self.steps: Steps | None = None
        self.merge_step, self.new_memory = merge, None

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            for name, parameter in self.embed_tokens.named_parameters():  # rounded ones have their scales, too
                setattr(self.lm_head, name, parameter)

    def new_cache(self, new_memory: Callable | None = None, new_context: Callable | None = None, **settings) -> Cache:
        """new_memory, new_context: see `Cache`; None: the model's, that is the fast ones, if `use_memory` named no other.
        settings: of the config, for this cache alone."""
        memory = partial(FastMemory, merge_step=self.merge_step, limits=self.limits)
        context = partial(FastContext, limits=self.limits)
        config = replace(self.config, **settings)
        return Cache(config, new_memory or self.new_memory or memory, new_context or context)

    def use_memory(self, new_memory: Callable):
        """Caches made from now on have memories of this class. Raises ValueError for settings that it does not know."""
        name, config = new_memory.__name__, self.config
        asked = (
            config.mem_topk is not None
            or config.mem_device is not None
            or config.mem_dtype not in LongLlamaConfig.MEM_DTYPES
        )
        fits = issubclass(new_memory, FastMemory) or not asked
        require(fits, f"{name} knows no mem_topk, mem_device or float8: make it a subclass of fast.FastMemory")
        self.new_memory = new_memory

    def compile_layers(self):
        """Compiles the layers as they are first used; on a GPU, single tokens are read by captured steps then."""
        compile_blocks(self.layers)
        self.compiled_logits = compiled(LongLlama.logits)
        if self.norm.weight.is_cuda:
            self.capture_steps(captured, compile_step(join), compile_step(merge))

    def capture_steps(self, capture: Callable, join: Callable = join, merge: Callable = merge):
        """Single tokens are read by `Steps`. The memory of caches made from now on merges their blocks by `merge`, too."""
        self.steps, self.merge_step = Steps(self, capture, join, merge), merge

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) if self.compiled_logits is None else self.compiled_logits(self, x)

    def forward(
        self, input_ids, cache=None, attention_mask=None, last_context_length=None, logits_to_keep=0, labels=None
    ) -> tuple[Tensor, Cache]:
        plain = cache is not None and attention_mask is None and labels is None
        if plain and self.steps is not None and self.steps.can_replay(input_ids, cache):
            return self.steps.read(input_ids, cache)
        given = input_ids, cache, attention_mask, last_context_length, logits_to_keep, labels
        if logits_to_keep != 1 or labels is not None or torch.is_grad_enabled():
            return super().forward(*given)
        with torch.inference_mode():  # a token of a small model takes a tenth less time than under no_grad
            logits, cache = super().forward(*given)
        return logits.clone(), cache  # an ordinary tensor

    def hidden_states(
        self, input_ids, cache=None, attention_mask=None, last_context_length=None, logits_to_keep=0
    ) -> tuple[Tensor, Cache]:
        T, last, config = input_ids.shape[1], last_context_length, self.config
        require(T > 0, "input_ids must hold at least one token; an empty text starts from the bos token")
        require(last is None or is_count(last), f"last_context_length must be at least 1, not {last!r}")
        require(logits_to_keep >= 0, f"logits_to_keep must be at least 0, not {logits_to_keep}")
        float8 = config.mem_layers and config.mem_dtype == "float8_e4m3fn"
        require(not (float8 and torch.is_grad_enabled()), "float8 memory has no gradients: read under torch.no_grad()")
        if cache is not None:
            configs = config, cache.config
            shapes = {(c.num_hidden_layers, c.mem_layers, c.num_key_value_heads, c.head_dim) for c in configs}
            require(len(shapes) == 1, "the cache was made for a model of another shape")
        return super().hidden_states(input_ids, cache, attention_mask, last, logits_to_keep)

    def forward_cross_batch(self, input_ids: Tensor, extra: list[int], detached=False) -> Tensor:
        rows = len(input_ids)
        fits = len(extra) == rows and all(0 <= n <= b for b, n in enumerate(extra))
        require(fits, f"extra must say how many of the entries before it each of {rows} entries sees, not {extra}")
        return super().forward_cross_batch(input_ids, extra, detached)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature=1.0,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=None,
        attention_mask=None,
        **more,
    ) -> Iterator[Tensor]:
        """As LongLlama's, and repetition_penalty: see `RepetitionPenalty`."""
        require(temperature == 0 or temperature >= 1e-5, f"temperature must be 0, or at least 1e-5, not {temperature}")
        require(top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}")
        require(top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
        require(min_p is None or 0 <= min_p <= 1, f"min_p must be at least 0 and at most 1, not {min_p}")
        ends = attention_mask is None or attention_mask[..., -1:].all()
        require(ends, "attention_mask has padding at the end of a row: padding stands on the left")
        if repetition_penalty is not None:
            more["logits_processor"] = RepetitionPenalty(
                repetition_penalty, attention_mask, more.get("logits_processor")
            )
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        return super().generate(input_ids, max_new_tokens, attention_mask=attention_mask, **sampling, **more)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu", dtype=torch.float32, **config_overrides) -> "FastLlama":
        """As LongLlama's; the weights may be Hugging Face's shards, and what config.json ties may be `untied`. Raises
        FileNotFoundError or ValueError, naming the file, the field or the tensor, before it takes memory for them."""
        folder = Path(folder)
        check_folder(folder)
        config = cls.config_class.from_json(folder / "config.json", **config_overrides)
        config = untied(config, find_weights(folder))
        model_weights(config, folder)
        tied = {"tie_word_embeddings": config.tie_word_embeddings}
        return super().from_pretrained(folder, device, dtype, **config_overrides | tied)

    def load(self, folder: Path):
        self.take(model_weights(self.config, folder))

    @torch.no_grad()
    def take(self, weights: Weights):
        """Reads all weights, by the names in `hf_tensors`."""
        self.tie_weights()
        tensors = self.hf_tensors()
        for name, (_, _, read) in weights.items():
            stored = read()
            check_fits(name, stored, tensors[name].dtype)
            tensors[name].copy_(stored)
        for module in self.modules():
            if isinstance(module, Int4Linear):
                module.pack()


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def untied(config: LongLlamaConfig, found: Weights) -> LongLlamaConfig:
    """The config of a model with these weights. Where it ties the head to the embedding, and they are two different matrices,
    both are the model's, as in transformers. Reads the two."""
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= found.keys():
        (*shape, read), (*head_shape, read_head) = found[EMBEDDING], found[HEAD]
        if shape != head_shape or not torch.equal(read(), read_head()):
            return replace(config, tie_word_embeddings=False)
    return config


def model_weights(config: LongLlamaConfig, folder: Path) -> Weights:
    """The weights in a model's folder, as config.weight_dtype has them; none is read. Raises ValueError."""
    stored = FastConfig.from_json(folder / "config.json").weight_dtype
    rounded = f"{folder} has weights rounded to {stored} already"
    require(stored in (None, config.weight_dtype), f"{rounded}: give no --weights, or convert the model in 16 bits")
    weights = check_weights(replace(config, weight_dtype=stored), find_weights(folder), folder)
    return weights if stored == config.weight_dtype else quantised_weights(weights, config.weight_dtype)


def check_weights(config: LongLlamaConfig, found: Weights, where: Path) -> Weights:
    """A model's weights by their names; a tied matrix may have either name, or both. Raises ValueError where the tensors found
    are not those of the model."""
    if config.tie_word_embeddings and HEAD in found:
        found = {EMBEDDING: found[HEAD]} | {name: weight for name, weight in found.items() if name != HEAD}
    layers, shapes = config.num_hidden_layers, {name: shape for name, (shape, _, _) in found.items()}
    require(
        layers <= len(found), f"{where}: config.json has {layers} layers, and there are {len(found)} tensors in all"
    )
    with torch.device("meta"):
        right = {name: list(tensor.shape) for name, tensor in FastLlama(config).hf_tensors().items()}
    wrong = sorted(name for name in shapes.keys() | right if shapes.get(name) != right.get(name))
    listed = [f"{name} is {shapes.get(name, 'missing')}, not {right.get(name, 'expected')}" for name in wrong[:3]]
    require(not wrong, f"{where}: weights and config.json differ in {len(wrong)} tensors: {'; '.join(listed)}")
    return found
