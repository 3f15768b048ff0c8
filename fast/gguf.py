"""GGUF files, as llama.cpp has them: settings, tokenizer and weights of a model in one file, most often quantised.

    weights = unpack(Path("model.gguf"), folder)  # config.json and the tokenizer's files are in the folder then

What is in there is turned into what Hugging Face's layout has: names of tensors and of settings, the order of rows in q and k,
and a tokenizer.json, or a tokenizer.model for SentencePiece. The package gguf reads the file and dequantises; tokenizers, or
protobuf, writes the tokenizer. Files are untrusted: what is broken, or not computed here, is refused in a line that names it.
"""

import importlib
import json
import math
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fast.files import Weights
from longllama import require

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
FACTORS = "rope_freqs.weight"  # what Llama 3's frequencies are divided by
SETTINGS = {  # of metadata, and of config.json
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.key_length": "head_dim",
}  # fmt: skip
OTHERWISE = (  # settings that ask for another computation, if they are there and not 0
    "expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.scale", "attention.max_alibi_bias",
    "logit_scale", "residual_scale", "embedding_scale",
)  # fmt: skip
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = torch.float16  # stored as this, unless convert.py is told: scales of quantised blocks are float16, too
CONTROL, USER_DEFINED = 3, 4  # types of tokens, numbered as SentencePiece does


def optional(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"GGUF files like this one need {package}: pip install {package}") from None


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def unpack(path: Path, folder: Path) -> Weights:
    """The weights in a GGUF file of a LLaMA, under Hugging Face's names; none is read. Its config.json, and the files of its
    tokenizer, are written into the folder. Raises OSError or ValueError."""
    tensors, metadata = read(path)
    try:
        check(metadata)
        factors = tensors.pop(FACTORS, None)
        config = read_config(metadata, factors)
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 0
        config["tie_word_embeddings"] = "output.weight" not in tensors
        weights = {hf_name(name): as_weight(tensor, config) for name, tensor in tensors.items()}
        files = tokenizer_files(metadata, config)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]} in its metadata") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, content in ({"config.json": json.dumps(config).encode()} | files).items():
        (folder / name).write_bytes(content)
    return weights


def read(path: Path) -> tuple[dict, dict]:
    """gguf's tensors, mapped and not read, and the metadata."""
    gguf = optional("gguf", "gguf")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is a GGUF file, broken or cut short ({error}): get it again") from None
    little = reader.endianess == gguf.GGUFEndian.LITTLE
    require(little, f"{path} is a big-endian GGUF file, which is not read: get it in little-endian order")
    parts = metadata.get("split.count", 1)
    require(parts in (0, 1), f"{path} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    return {tensor.name: tensor for tensor in reader.tensors}, metadata


def check(metadata: dict):
    """Raises ValueError for a model that is no LLaMA."""
    architecture = metadata["general.architecture"]
    require(architecture == "llama", f"the architecture {architecture!r} is not supported, only 'llama'")
    for name in OTHERWISE:
        value = metadata.get(f"llama.{name}")
        require(not value, f"llama.{name} {value!r} is not supported")


def read_config(metadata: dict, factors) -> dict:
    """Of config.json, but what the weights tell. factors: gguf's tensor of Llama 3's."""
    found = {hf: metadata.get(f"llama.{name}") for name, hf in SETTINGS.items()}
    config = {name: plain(value) for name, value in found.items() if value is not None}
    for name in ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"):
        ggufs = next(theirs for theirs, hf in SETTINGS.items() if hf == name)
        require(name in config, f"it has no llama.{ggufs} in its metadata")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    fits = all(type(n) is int and n > 0 for n in (hidden, heads))
    require(fits, "llama.embedding_length and attention.head_count must be one number each, at least 1")
    head = config.setdefault("head_dim", hidden // heads)
    config = {"num_key_value_heads": heads, "rope_theta": 10000.0} | config
    for name in ("rope.dimension_count", "attention.value_length"):
        value = metadata.get(f"llama.{name}", head)
        require(value == head, f"llama.{name} {value!r} is not supported, only the size of a head, {head}")
    config["rope_scaling"] = rope_scaling(metadata, config, factors)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(i for i in ends if type(i) is int)) or [2]
    config |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    config |= {"bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 1)}
    return config | {"model_type": "llama", "hidden_act": "silu"}


def plain(value):
    """A number of metadata as it was meant: 1e-05, which float32 makes 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rope_scaling(metadata: dict, config: dict, factors) -> dict | None:
    """As config.json has it. Instead of Llama 3's settings GGUF has the factors that follow from them: so they are checked."""
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = plain(metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0)))
    require(kind in ("none", "linear"), f"llama.rope.scaling.type {kind!r} is not supported, only 'linear'")
    scales = kind == "linear" and factor not in (0.0, 1.0)
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if scales else None
    require(not scales, f"{FACTORS} and linear scaling, which are there both, are not supported")
    given, D = torch.from_numpy(np.array(factors.data)).flatten().double(), config["head_dim"]
    original = metadata.get("llama.rope.scaling.original_context_length", 8192)
    numbers = type(original) is int and type(D) is int and type(config["rope_theta"]) in (int, float)
    require(numbers and len(given) == D // 2, f"{FACTORS} has {len(given)} numbers, and a head is of size {D!r}")
    scaling = {"rope_type": "llama3", "factor": round(given.max().item(), 4), "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    turns = original / (2 * math.pi) * config["rope_theta"] ** -(torch.arange(0, D, 2).double() / D)  # (D/2,)
    smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
    right = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    fits = torch.allclose(given, right, rtol=1e-4)
    require(fits, f"{FACTORS} is not supported: its numbers are not those of Llama 3, whose settings config.json needs")
    return scaling


def hf_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.([0-9]{1,9})\.(\w+)\.weight", name)
    if layer and layer[2] in IN_LAYER:
        return f"model.layers.{int(layer[1])}.{IN_LAYER[layer[2]]}.weight"
    known = name.removesuffix(".weight") in NAMES and name.endswith(".weight")
    require(known, f"tensor {name} is not supported, which a LLaMA has not")
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def as_weight(tensor, config: dict) -> tuple:
    """gguf's tensor, as `Weights` has it. It is read in float32, whatever it is to be stored as."""
    part = re.search(r"\.attn_([qk])\.", tensor.name)
    heads = config["num_attention_heads" if part and part[1] == "q" else "num_key_value_heads"] if part else None
    shape = [int(n) for n in reversed(tensor.shape.tolist())]
    fits = heads is None or (type(heads) is int and heads > 0 and shape and shape[0] % (2 * heads) == 0)
    require(bool(fits), f"tensor {tensor.name} is not {heads!r} heads of even size")
    return shape, STORED.get(tensor.tensor_type.name, QUANTISED), partial(dequantised, tensor, shape, heads)


def dequantised(tensor, shape: list[int], heads: int | None) -> Tensor:
    """Rows of a q or k stand as GGUF turns pairs of numbers, neighbours; Hugging Face's are half a head apart."""
    gguf = optional("gguf", "gguf")
    try:
        x = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError:
        raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, which gguf does not dequantise") from None
    x = torch.from_numpy(x).reshape(shape)
    if heads is not None:
        x = x.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(shape)
    return x


# What a BPE tokenizer cuts a text into first, by llama.cpp's names, as the tokenizer.json of these models says it: a pattern, or
# None for GPT-2's; whether digits stand alone; and whether a piece that is a token needs no merges.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (LLAMA3, False, True))
CUTS |= {"tekken": (TEKKEN, False, True), "gpt-2": (None, False, False), "smollm": (None, True, False)}


def tokenizer_files(metadata: dict, config: dict) -> dict[str, bytes]:
    """The files of the tokenizer, by name."""
    kind = metadata["tokenizer.ggml.model"]
    require(kind in ("gpt2", "llama"), f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' and 'llama'")
    tokens, types, special = tokens_of(metadata, config["vocab_size"])
    begins = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") not in ("gpt-2", "smollm"))
    bos = special.get("bos") if begins else None
    said = {f"{name}_token": text for name, text in special.items()} | {"add_bos_token": bos is not None}
    said |= {"add_eos_token": False, "clean_up_tokenization_spaces": False}
    said |= {"model_max_length": config["max_position_embeddings"]}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        said["chat_template"] = metadata["tokenizer.chat_template"]
    if kind == "gpt2":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"  # which takes tokenizer.json as it is
        files = {"tokenizer.json": bpe(metadata, tokens, types, bos)}
    else:
        files = {"tokenizer.model": sentencepiece(metadata, tokens, types, special)}
    return files | {"tokenizer_config.json": json.dumps(said, indent=2).encode()}


def tokens_of(metadata: dict, most: int) -> tuple[list[str], list[int], dict[str, str]]:
    """The tokens, their types, and those that are bos, eos, unk and pad."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    lists = isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types) > 0
    fits = lists and all(isinstance(x, str) for x in tokens) and all(isinstance(i, int) for i in types)
    require(fits, "tokenizer.ggml.tokens and token_type must be lists of one length, of texts and of numbers")
    require(len({*tokens}) == len(tokens), "tokenizer.ggml.tokens has a text twice")
    require(len(tokens) <= most, f"there are {len(tokens)} tokens, and {most} embeddings")
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        fits = i is None or (type(i) is int and 0 <= i < len(tokens))
        require(fits, f"tokenizer.ggml.{name}_token_id {i!r} is none of {len(tokens)} tokens")
        special |= {} if i is None else {name[:3]: tokens[i]}
    return tokens, types, special


def bpe(metadata: dict, tokens: list[str], types: list[int], bos: str | None) -> bytes:
    """A tokenizer.json. bos: what a text begins with."""
    hf = optional("tokenizers", "tokenizers")
    name, merges = metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.merges"]
    known = isinstance(name, str) and name in CUTS
    require(known, f"tokenizer.ggml.pre {name!r} is not supported, only {', '.join(CUTS)}")
    pairs = [tuple(x.split(" ")) if isinstance(x, str) else () for x in merges] if isinstance(merges, list) else [()]
    require(all(len(pair) == 2 for pair in pairs), "tokenizer.ggml.merges must be a list of pairs")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    known = all(x in vocabulary for a, b in pairs for x in (a, b, a + b))
    require(known, "tokenizer.ggml.merges has a pair of which one, or both together, are no token")
    (pattern, digits, whole), cut = CUTS[name], hf.pre_tokenizers
    made = hf.Tokenizer(hf.models.BPE(vocabulary, pairs, ignore_merges=whole))
    steps = [cut.Split(hf.Regex(pattern), "isolated")] if pattern else [cut.Digits(True)] if digits else []
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    made.pre_tokenizer = cut.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = hf.decoders.ByteLevel()
    if bos is not None:
        template = {"single": [bos, "$A"], "pair": [bos, "$A", f"{bos}:1", "$B:1"]}
        made.post_processor = hf.processors.TemplateProcessing(**template, special_tokens=[(bos, vocabulary[bos])])
    for token, kind in zip(tokens, types):
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([hf.AddedToken(token, special=kind == CONTROL, normalized=False)])
    return made.to_str(pretty=True).encode()


def sentencepiece(metadata: dict, tokens: list[str], types: list[int], special: dict[str, str]) -> bytes:
    """A tokenizer.model. GGUF tells nothing of how its text is normalised but for spaces: it is not, as in llama.cpp."""
    pb, scores = optional("sentencepiece.sentencepiece_model_pb2", "protobuf"), metadata["tokenizer.ggml.scores"]
    fits = isinstance(scores, list) and len(scores) == len(tokens) and all(isinstance(x, float) for x in scores)
    require(fits, "tokenizer.ggml.scores must be a list of numbers, as many as tokens")
    require(all(1 <= kind <= 6 for kind in types), "tokenizer.ggml.token_type has a type that there is not")
    model = pb.ModelProto()
    for token, score, kind in zip(tokens, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = pb.TrainerSpec.BPE, len(tokens)
    trainer.byte_fallback = 6 in types
    for name, text in special.items():
        setattr(trainer, f"{name}_piece", text)
        setattr(trainer, f"{name}_id", tokens.index(text))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    return model.SerializeToString()
