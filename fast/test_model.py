"""FastLlama computes what the original code computed, and refuses by name what it cannot compute.

What all tests of this folder share stands here: a small model, the formula in float64, the recorded cases, and modes that watch
which tensors torch makes.
"""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fast import FastConfig, FastLlama, FastMemory
from fast.context import FastContext
from fast.linear import LIMITS, FastLinear, Limits
from longllama import Cache, LocalCache, LongLlama, LongLlamaConfig, Memory

TESTDATA = Path(__file__).resolve().parents[1] / "testdata"
CASES = json.loads((TESTDATA / "cases.json").read_text())
EXPECTED = load_file(TESTDATA / "expected.safetensors")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
MKL = {"fast MKL": {"slow_mkl": False, "amx": True}, "slow MKL": {"slow_mkl": True, "amx": False}}  # Intel's, AMD's

each_mkl = pytest.mark.parametrize("mkl", MKL.values(), ids=MKL)  # whatever this processor is


def small_config(**changes) -> FastConfig:
    """4 layers, 2 of them with memory, a window of 16."""
    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mem_layers": (1, 2), "max_position_embeddings": 16, "last_context_length": 8, "mem_dtype": "float32",
    }  # fmt: skip
    return FastConfig(**settings | changes)


def small_model(**changes) -> FastLlama:
    torch.manual_seed(0)
    return FastLlama(small_config(**changes)).eval()


def with_limits(**changes) -> type[FastLlama]:
    return type("LimitedLlama", (FastLlama,), {"limits": Limits(**changes)})


def small_blocks(block: int, used_limits: Limits = LIMITS) -> type[FastMemory]:
    """A memory whose blocks have at most this many tokens."""

    class SmallBlocks(FastMemory):
        BLOCK = block

        def __init__(self, config: LongLlamaConfig):
            super().__init__(config, limits=used_limits)

    return SmallBlocks


@torch.no_grad()
def read(model: LongLlama, ids: Tensor, segments: list[int], **options) -> Tensor:
    """Logits of ids fed in segments, one cache carried along: (B, T, V)."""
    cache, logits = None, []
    for part in ids.split(segments, dim=1):
        out, cache = model(part, cache, **options)
        logits.append(out)
    return torch.cat(logits, dim=1)


def naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The formula: q (B, H, T, D), k and v (B, G, S, D), seen broadcast to (B, H, T, S)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v


def all_of(x: Tensor) -> Tensor:
    """A mask for `naive`: everything is seen."""
    return torch.tensor(True, device=x.device)


def error_of(model: LongLlama, name: str) -> Tensor:
    """How far the logits of a recorded case are from the original's at most, the segments fed one after another."""
    case, device = CASES[name], model.norm.weight.device
    ids, mask = EXPECTED[f"{name}.input_ids"], EXPECTED.get(f"{name}.attention_mask")
    cache, logits, start = None, [], 0
    for n in case["segments"]:
        part = slice(start, start + n)
        real = mask[:, part].to(device) if case["padded"] else None
        out, cache = model(ids[:, part].to(device), cache, real, case["last_context_length"])
        logits.append(out.detach().float().cpu())
        start += n
    error = (torch.cat(logits, dim=1) - EXPECTED[f"{name}.logits"]).abs()
    return (error[mask[:, :start].bool()] if case["padded"] else error).max()


class Watching(TorchDispatchMode):
    """numel: of the largest tensor that an operation gave; `only`: of these operations. copied: of all that were copied."""

    COPIES = (torch.ops.aten.cat.default, torch.ops.aten.copy_.default, torch.ops.aten.clone.default)

    def __init__(self, *only):
        super().__init__()
        self.only, self.numel, self.copied = only, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in self.COPIES:
            self.copied += out.numel()
        if not self.only or function in self.only:
            numbers = [x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
            self.numel = max(self.numel, *numbers, 0)
        return out


# ------------------------------------------------------------------------------------------- Against the original code


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_original(name, device, mkl):
    changes = CASES[name]["config"]
    error = error_of(with_limits(**mkl).from_pretrained(TESTDATA, device, **changes), name)
    assert error < (5e-4 if changes.get("mem_dtype") == "bfloat16" else 1e-4)


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, {"mem_topk": 1000}, {"mem_device": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["many_windows", "left_padded_batch_decode_past_overflow", "chunked_continuation"])
def test_memory_in_small_blocks_searched_or_kept_elsewhere_gives_the_originals_logits(name, changes, device, mkl):
    """As many best keys as there are make all of attention. Small blocks: the search, and the copies, are of many."""
    few = {"gathered": 10000}  # a few queries at once
    model = with_limits(**mkl, **few).from_pretrained(TESTDATA, device, **changes)
    model.use_memory(small_blocks(5, model.limits))
    assert error_of(model, name) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["many_windows", "left_padded_batch_decode_past_overflow", "chunked_continuation"])
def test_the_plain_formula_and_small_memory_blocks_give_the_originals_logits_too(name):
    """Other ways to the same numbers: no fused kernel, as on devices that have none, and a memory of many small blocks."""
    model = with_limits(rows=7).from_pretrained(TESTDATA)
    model.use_memory(small_blocks(20, model.limits))
    with torch.enable_grad():  # kernels are not used where gradients may be wanted
        assert error_of(model, name) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["many_windows", "chunked_continuation", "left_padded_batch", "no_memory_positionals"])
def test_a_memory_that_chooses_all_its_tokens_gives_the_originals_logits(name):
    class AllByName(FastMemory):
        def choose(self, k, real):
            return torch.arange(k.shape[2], device=k.device).flip(0).expand(*k.shape[:3])  # in any order

    model = FastLlama.from_pretrained(TESTDATA, **CASES[name]["config"])
    model.use_memory(AllByName)
    assert error_of(model, name) < 1e-4


@each_mkl
def test_greedy_generation_is_that_of_the_original(mkl):
    model, ids = with_limits(**mkl).from_pretrained(TESTDATA), EXPECTED["greedy_generation.input_ids"]
    generated = torch.stack(list(model.generate(ids, CASES["greedy_generation"]["generate"], temperature=0)), dim=1)
    assert generated.tolist() == EXPECTED["greedy_generation.generated"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, 40])
@pytest.mark.parametrize("name", ["many_windows", "chunked_continuation", "left_padded_batch"])
def test_logits_to_keep_gives_the_same_last_logits(name, keep):
    case, ids = CASES[name], EXPECTED[f"{name}.input_ids"]
    model, cache, start = FastLlama.from_pretrained(TESTDATA, **case["config"]), None, 0
    mask = EXPECTED.get(f"{name}.attention_mask")
    for n in case["segments"]:
        part = slice(start, start + n)
        logits, cache = model(ids[:, part], cache, None if mask is None else mask[:, part], logits_to_keep=keep)
        kept = min(keep, n)
        assert logits.shape[1] == kept
        right = EXPECTED[f"{name}.logits"][:, start + n - kept : start + n]
        real = torch.ones_like(right[..., 0]).bool() if mask is None else mask[:, start + n - kept : start + n].bool()
        assert (logits - right)[real].abs().max() < 1e-4
        start += n


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_memory_stays_near_float32(dtype, device):
    ids = EXPECTED["many_windows.input_ids"].to(device)
    logits, _ = FastLlama.from_pretrained(TESTDATA, device, dtype)(ids)
    right = EXPECTED["many_windows.logits"]
    assert logits.dtype == dtype
    assert (logits.float().cpu() - right).norm() / right.norm() < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_float8_memory_stays_near_the_original():
    ids, right = EXPECTED["many_windows.input_ids"], EXPECTED["many_windows.logits"]
    logits, cache = FastLlama.from_pretrained(TESTDATA, mem_dtype="float8_e4m3fn")(ids)
    assert 1e-3 < (logits - right).norm() / right.norm() < 1e-1
    whole = FastLlama.from_pretrained(TESTDATA, mem_dtype="float32")(ids)[1]
    assert whole.memory_bytes == 4 * cache.memory_bytes > 0


# --------------------------------------------------------------------------------------------- What is plugged in where


def test_every_product_with_a_weight_is_a_fast_one_with_the_models_limits():
    limited = with_limits(cast=3)
    for tied in (False, True):
        model = limited(small_config(tie_word_embeddings=tied))
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linears) == 4 * 4 + 1 and all(type(x) is FastLinear and x.limits is limited.limits for x in linears)
        assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert FastLlama.from_pretrained(TESTDATA).limits is LIMITS


def test_caches_of_a_fast_model_are_fast_and_have_its_limits():
    model = with_limits(cast=3)(small_config())
    for layer in model.new_cache().layers:
        assert type(layer) is FastContext and layer.limits is model.limits
        assert layer.memory is None or (type(layer.memory) is FastMemory and layer.memory.limits is model.limits)
    _, cache = model(torch.ones(1, 40, dtype=torch.long), logits_to_keep=1)
    assert all(type(layer) is FastContext for layer in cache.layers)


@torch.no_grad()
def test_weights_are_exchanged_with_the_model_of_longllama_py_and_logits_are_its_own():
    fast = small_model(num_key_value_heads=2)
    core = {name: value for name, value in asdict(fast.config).items() if name in LongLlamaConfig.__dataclass_fields__}
    plain = LongLlama(LongLlamaConfig(**core)).eval()
    plain.load_state_dict(fast.state_dict())
    assert isinstance(FastLlama(plain.config).config, FastConfig)
    ids, segments = torch.randint(61, (2, 80)), [45, 5, 1, 1, 1, 20, 7]
    assert (read(fast, ids, segments) - read(plain, ids, segments)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("context", [LocalCache, FastContext])
@pytest.mark.parametrize("memory", [Memory, FastMemory])
def test_a_fast_model_computes_with_any_kinds_of_memory_and_context(memory, context):
    model, ids = small_model(), torch.randint(61, (2, 60))
    cache = model.new_cache(memory, context)
    assert {type(layer) for layer in cache.layers} == {context} and type(cache.layers[1].memory) is memory
    logits = torch.cat([model(part, cache)[0] for part in ids.split([40, 5, 1, 14], dim=1)], dim=1)
    assert (logits - read(model, ids, [40, 5, 1, 14])).abs().max() < 1e-5


@torch.no_grad()
def test_a_model_uses_the_memory_that_it_is_told_to_use_in_all_its_caches():
    class OwnMemory(FastMemory):
        pass

    model, ids = small_model(), torch.ones(1, 40, dtype=torch.long)
    model.use_memory(OwnMemory)
    cache = model.new_cache()
    next(model.generate(ids, 1, cache=cache))
    for made in (cache, model(ids)[1]):
        assert [type(layer.memory) for layer in made.layers] == [type(None), OwnMemory, OwnMemory, type(None)]
        assert made.layers[1].memory.length == 32
    assert type(model.new_cache(Memory).layers[1].memory) is Memory


@pytest.mark.parametrize("changes", [{"mem_topk": 3}, {"mem_device": "cpu"}, {"mem_dtype": "float8_e4m3fn"}], ids=str)
def test_a_memory_that_does_not_know_a_setting_is_refused(changes):
    class OwnMemory(Memory):
        pass

    model = small_model(**changes)
    with pytest.raises(ValueError, match="OwnMemory knows no mem_topk, mem_device or float8"):
        model.use_memory(OwnMemory)
    assert type(model.new_cache().layers[1].memory) is FastMemory  # as before
    model.use_memory(small_blocks(5))
    small_model().use_memory(OwnMemory)


# ---------------------------------------------------------------------------------------------- Padded heads, gradients


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_heads_that_are_stored_padded_are_computed_with_in_half_precision_too(device):
    model, ids = small_model(hidden_size=48), torch.randint(61, (2, 60))  # heads of 12 numbers, stored as 16
    right = read(model, ids, [45, 5, 10])
    logits = read(model.to(device, torch.bfloat16), ids.to(device), [45, 5, 10])
    assert (logits.float().cpu() - right).norm() / right.norm() < 2e-2


@each_mkl
def test_gradients_reach_all_weights(mkl):
    torch.manual_seed(0)
    model = with_limits(**mkl)(small_config())
    model(torch.randint(61, (1, 60)))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_float8_memory_refuses_gradients():
    model = small_model(mem_dtype="float8_e4m3fn")
    for T in (60, 3):  # also where nothing would be remembered yet: it would be later
        with pytest.raises(ValueError, match="no gradients"):
            model(torch.randint(61, (1, T)))
    with torch.no_grad():
        model(torch.randint(61, (1, 60)))


def test_float8_memory_of_a_model_without_memory_layers_does_not_hinder_training():
    model = small_model(mem_layers=(), mem_dtype="float8_e4m3fn")
    model(torch.ones(1, 8, dtype=torch.long))[0].sum().backward()
    assert model.lm_head.weight.grad is not None


def test_losses_with_labels_are_those_of_the_logits():
    model, ids = small_model(), torch.randint(61, (2, 40))
    logits, _ = model(ids)
    right = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (model(ids, labels=ids)[0] - right).abs() < 1e-5


def test_a_cache_read_in_inference_mode_is_gone_on_from_outside_of_it():
    model = small_model()
    with torch.inference_mode():
        _, cache = model(torch.randint(61, (1, 60)))
    assert len(list(model.generate(torch.ones(1, 1, dtype=torch.long), 20, cache=cache, eos_token_id=None))) == 20


# ------------------------------------------------------------------------------------------------------- What is refused


def test_settings_out_of_range_are_refused_by_name():
    model, ids = small_model(), torch.ones(1, 4, dtype=torch.long)
    for setting in (
        {"temperature": -1}, {"temperature": 1e-6}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.7},
        {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(setting))):
            next(model.generate(ids, 1, **setting))
    for setting in (
        {"logits_to_keep": -1}, {"last_context_length": 0}, {"last_context_length": 2.5}, {"last_context_length": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(setting))):
            model(ids, **setting)


@torch.no_grad()
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "at least one token"),
        (lambda m: m(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 5)), "attention_mask"),
        (lambda m: m(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.zeros(2, 4)), "attention_mask"),
        (lambda m: m(torch.ones(2, 4).long(), m(torch.ones(1, 4).long())[1]), "2 rows"),
        (lambda m: next(m.generate(torch.ones(1, 2).long(), 1, attention_mask=torch.tensor([[1, 0]]))), "on the left"),
        (
            lambda m: next(m.generate(torch.ones(2, 2).long(), 1, attention_mask=torch.tensor([[1, 0], [1, 1]]))),
            "on the left",
        ),
        (
            lambda m: next(m.generate(torch.ones(2, 0).long(), 1, attention_mask=torch.ones(2, 0))),
            "at least one token",
        ),
        (lambda m: FastLlama(small_config(mem_layers=()))(torch.zeros(1, 17, dtype=torch.long)), "window of 16"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model())


@pytest.mark.parametrize("extra", [[0], [0, 1, 2], [1, 0], [0, -1]], ids=str)
def test_extra_contexts_that_there_are_not_are_refused(extra):
    with pytest.raises(ValueError, match="extra must say"):
        small_model().forward_cross_batch(torch.randint(61, (2, 8)), extra)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"mem_layers": (1,)}, {"num_key_value_heads": 2}, {"hidden_size": 64}],
    ids=str,
)
def test_a_cache_of_another_model_is_refused(changes):
    ids = torch.randint(61, (1, 60))
    cache = small_model(**changes)(ids)[1]
    with pytest.raises(ValueError, match="cache was made for a model of another shape"):
        small_model()(ids, cache)
    other_settings = small_model(mem_topk=1000)
    assert other_settings(ids, small_model()(ids)[1])[1].memory_length > 60


@torch.no_grad()
def test_a_cache_of_longllama_py_is_taken():
    model, ids = small_model(), torch.randint(61, (1, 60))
    _, cache = model(ids[:, :40], Cache(model.config))
    assert type(cache.layers[1].memory) is Memory
    assert (model(ids[:, 40:], cache)[0] - read(model, ids, [40, 20])[:, 40:]).abs().max() < 1e-5


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
IMPOSSIBLE = [
    {"mem_layers": [99]}, {"mem_layers": ["a"]}, {"mem_layers": 3}, {"mem_dtype": "int8"}, {"hidden_size": 30, "head_dim": None},
    {"mem_attention_grouping": [0, 4]}, {"mem_attention_grouping": [4]}, {"mem_attention_grouping": 4},
    {"num_key_value_heads": 3}, {"vocab_size": 0}, {"last_context_length": 0},
    {"rms_norm_eps": -1.0}, {"rms_norm_eps": math.inf}, {"eos_token_id": 2**70},
    {"intermediate_size": 2**40}, {"rms_norm_eps": 10**400},
    {"intermediate_size": True}, {"rms_norm_eps": True}, {"mem_layers": [True]}, {"mem_positionals": "false"},
    {"eos_token_id": 1.0}, {"hidden_size": 36, "head_dim": None}, {"mlp_bias": True},
    {"hidden_act": "gelu"}, {"attention_bias": True},
    {"head_dim": 5}, {"head_dim": 0}, {"head_dim": 8.0}, {"model_type": "mixtral"}, {"eos_token_id": []},
    {"eos_token_id": [2, 2**70]}, {"eos_token_id": [2, None]}, {"bos_token_id": [1]},
    {"mem_topk": 0}, {"mem_device": "tape"}, {"keep_local": 16}, {"keep_local": -1},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_parameters": {"rope_type": "llama3"}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0}}, {"rope_scaling": {"rope_type": [], "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
    {"rope_scaling": "linear"}, {"rope_parameters": [1]}, {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    {"partial_rotary_factor": 0.5}, {"sliding_window": "4096"}, {"sliding_window": 8, "model_type": "mistral"},
]  # fmt: skip


def write_config(path: Path, config: FastConfig, **changes):
    path.write_text(json.dumps(asdict(config) | changes))


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_impossible_configs_are_refused_by_name_with_the_files_path(changes, tmp_path):
    path = tmp_path / "config.json"
    write_config(path, small_config())
    assert FastConfig.from_json(path) == small_config()
    write_config(path, small_config(), **changes)
    name, value = next(iter(changes.items()))
    name = "rope_scaling|rope_parameters" if "rope" in name else name
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*({name})") as raised:
        FastConfig.from_json(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("changes", [x for x in IMPOSSIBLE if next(iter(x)) in asdict(small_config())], ids=str)
def test_impossible_overrides_are_refused_by_name(changes, tmp_path):
    write_config(tmp_path / "config.json", small_config())
    with pytest.raises(ValueError, match=next(iter(changes))):
        FastConfig.from_json(tmp_path / "config.json", **changes)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, '{"a": ' * 100_000], ids=lambda text: text[:9])
def test_json_that_is_broken_or_no_object_or_nested_too_deep_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="config.json is broken: "):
        FastConfig.from_json(path)


def test_settings_of_fast_are_read_from_json_and_refused_by_the_core(tmp_path):
    path, fast = tmp_path / "config.json", {"mem_topk": 7, "mem_device": "cpu", "mem_dtype": "float8_e4m3fn"}
    write_config(path, small_config(), **fast)
    config = FastConfig.from_json(path)
    assert {name: getattr(config, name) for name in fast} == fast
    for name in fast:
        write_config(path, small_config(), **{name: fast[name]})
        if name != "mem_device":  # where memory lies changes no number
            with pytest.raises(ValueError, match=name):
                LongLlamaConfig.from_json(path)


def test_configs_of_transformers_5_and_of_older_releases_are_read(tmp_path):
    path = tmp_path / "config.json"
    new = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 128, "pad_token_id": None,
        "dtype": "float16", "model_type": "llama",
    }  # fmt: skip
    path.write_text(json.dumps(new))
    assert FastConfig.from_json(path).rope_theta == 5e5
    old = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "unknown": 1, "pad_token_id": -1}
    path.write_text(json.dumps(old | {"model_type": "longllama"}))
    config = FastConfig.from_json(path)
    assert (config.rope_theta, config.pad_token_id, config.last_context_length) == (1e6, 0, 1024)


# ------------------------------------------------------------------------------------------------------- From files


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(TESTDATA, tmp_path / "model")


def shard(folder: Path) -> list[str]:
    """Cuts a folder's weights in two files with an index, and names them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sorted(set(weight_map.values()))


@torch.no_grad()
def test_a_model_in_shards_is_read_and_a_lost_shard_is_named(folder):
    shards = shard(folder)
    assert error_of(FastLlama.from_pretrained(folder), "two_windows") < 1e-4
    (folder / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]} is missing"):
        FastLlama.from_pretrained(folder)


@torch.no_grad()
def test_a_whole_file_is_read_where_an_old_index_lies_beside_it(folder):
    """As transformers does: the index is what is left of an earlier, sharded model."""
    shard(folder)
    shutil.copyfile(TESTDATA / "model.safetensors", folder / "model.safetensors")
    for old in folder.glob("model-*"):
        save_file({name: x + 1 for name, x in load_file(old).items()}, old)
    assert error_of(FastLlama.from_pretrained(folder), "two_windows") < 1e-4


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_missing_unexpected_and_misshapen_tensors_are_named(damage, folder):
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.self_attn.k_proj.weight"
    assert name in tensors
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*in 1 tensors: {name}"):
        FastLlama.from_pretrained(folder)


def test_more_layers_than_there_are_tensors_are_refused_before_they_are_made(folder):
    write_config(folder / "config.json", FastConfig.from_json(folder / "config.json"), num_hidden_layers=10**8)
    with pytest.raises(ValueError, match="100000000 layers"):
        FastLlama.from_pretrained(folder)


def test_tied_weights_may_come_with_a_copy_and_stay_tied(tmp_path):
    model = small_model(tie_word_embeddings=True)
    write_config(tmp_path / "config.json", model.config)
    tensors = {name: x.clone() for name, x in model.hf_tensors().items()}
    for copy in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        save_file(tensors | copy, tmp_path / "model.safetensors")
        again = FastLlama.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.embed_tokens.weight
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("other", ["other numbers", "another dtype"])
def test_two_different_matrices_are_not_tied_whatever_the_config_says(other, tmp_path):
    model = small_model()
    write_config(tmp_path / "config.json", model.config, tie_word_embeddings=True)
    tensors = {name: x.clone() for name, x in model.hf_tensors().items()}
    if other == "another dtype":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors")
    again, ids = FastLlama.from_pretrained(tmp_path), torch.arange(20)[None]
    assert not again.config.tie_word_embeddings
    model.lm_head.weight.copy_(tensors["lm_head.weight"])
    assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_one_tied_matrix_may_have_the_name_of_the_head(sharded, tmp_path):
    model = small_model(tie_word_embeddings=True)
    write_config(tmp_path / "config.json", model.config)
    tensors = {name: x.clone() for name, x in model.hf_tensors().items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    if sharded:
        shard(tmp_path)
    again = FastLlama.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.embed_tokens.weight
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_too_large_for_the_dtype_they_are_read_in_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 90_000
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight has numbers too large for torch.float16: choose --dtype"):
        FastLlama.from_pretrained(folder, dtype=torch.float16)
    assert FastLlama.from_pretrained(folder, dtype=torch.bfloat16).norm.weight[3] == torch.tensor(90_000.0).bfloat16()


def test_overrides_and_dtypes_are_taken():
    model = FastLlama.from_pretrained(TESTDATA, dtype=torch.bfloat16, mem_topk=5, last_context_length=3)
    assert (model.config.mem_topk, model.config.last_context_length) == (5, 3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
