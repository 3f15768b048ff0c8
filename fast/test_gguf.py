"""fast/gguf.py: files written on the spot by gguf's own writer, held to what transformers makes of them."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

from fast import FastConfig, FastLlama
from fast.files import write_safetensors
from fast.gguf import FACTORS, IN_LAYER, LLAMA3, NAMES, TEKKEN, is_gguf, unpack
from fast.model import check_weights

ROOT = Path(__file__).resolve().parents[1]
BOOK = (ROOT / "tiny" / "book.txt").read_text(encoding="utf-8")
TEXTS = [
    *BOOK[:20000].split("\n\n"), "", " ", "  two", "tail  ", "\n\n x\t\r\n", "1234567 and 3.14", "don't I'LL 'Tis", "Ünïcödé",
    "日本語 и русский", "🙂👨‍👩‍👧", "a\u0301 \u00a0\u3000", "x = [i**2 for i in range(10)]\n\treturn x", "HTTPServer camelCase",
    "/a//b/\n/",
]  # fmt: skip


def random_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    settings = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Under llama.cpp's names, rows of q and k as its convert_hf_to_gguf.py turns them."""
    theirs = {hf: name for name, hf in NAMES.items()} | {hf: name for name, hf in IN_LAYER.items()}
    config, found = model.config, {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        start, part = ("", stem) if stem in theirs else (f"blk.{stem.split('.')[2]}.", stem.split(".", 3)[3])
        x = x.numpy()
        if part.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if part.endswith("q_proj") else config.num_key_value_heads
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        found[f"{start}{theirs[part]}.weight"] = np.ascontiguousarray(x)
    return found


def spm_metadata(vocabulary: int = 0) -> dict:
    """Of tiny's tokenizer, or of its first tokens."""
    model = pb.ModelProto()
    model.ParseFromString((ROOT / "tiny" / "tokenizer.model").read_bytes())
    pieces = list(model.pieces)[: vocabulary or None]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [x.piece for x in pieces],
        "tokenizer.ggml.scores": [x.score for x in pieces], "tokenizer.ggml.token_type": [x.type for x in pieces],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def metadata_of(model: LlamaForCausalLM) -> dict:
    config = model.config
    return {
        "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads, "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count_kv": config.num_key_value_heads, "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"], "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
    }  # fmt: skip


def write_gguf(path: Path, tensors: dict, metadata: dict, kind: str = "F32", architecture="llama", **settings) -> Path:
    """kind: of matrices; vectors are float32, as llama.cpp keeps them."""
    writer = gguf.GGUFWriter(path, architecture, **settings)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](name, value)
    for name, x in tensors.items():
        as_it_is = x.ndim == 1 or kind == "F32"
        quantised = gguf.GGMLQuantizationType.F32 if as_it_is else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, x if as_it_is else gguf.quantize(x, quantised), raw_dtype=quantised)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def whole(folder: Path, changes: dict | None = None, drop: tuple = (), vocabulary=96, **settings) -> Path:
    """A GGUF file that is right but for changes to its metadata."""
    model = random_llama(vocab_size=vocabulary)
    metadata = metadata_of(model) | spm_metadata(vocabulary) | (changes or {})
    metadata = {name: value for name, value in metadata.items() if name not in drop}
    return write_gguf(folder / "model.gguf", tensors_of(model), metadata, **settings)


def load(path: Path, folder: Path) -> FastLlama:
    folder.mkdir()
    weights = unpack(path, folder)
    weights = check_weights(FastConfig.from_json(folder / "config.json"), weights, path)
    write_safetensors(folder / "model.safetensors", weights, {})
    return FastLlama.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_logits_are_those_of_transformers_from_the_same_file(kind, tied, tmp_path):
    model, ids = random_llama(tie_word_embeddings=tied), torch.randint(96, (2, 50))
    metadata = metadata_of(model) | spm_metadata(96)
    path = write_gguf(tmp_path / "model.gguf", tensors_of(model), metadata, kind)
    assert is_gguf(path) and not is_gguf(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load(path, tmp_path / "ours")
    assert ours.config.tie_word_embeddings == tied
    right, scale = theirs(ids).logits, {"Q8_0": 2**-10, "Q4_1": 2**-10}.get(kind, 1e-6)  # the quantised, as float16
    assert (ours(ids)[0] - right).norm() / right.norm() < scale * 4
    weights = unpack(path, tmp_path)
    for name, x in theirs.state_dict().items():  # as they are read, all are exact
        if name in weights:
            assert torch.equal(weights[name][2](), x), name
    stored = {name: dtype for name, (_, dtype, _) in weights.items()}
    right = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
    assert stored["model.norm.weight"] == torch.float32 and stored["model.embed_tokens.weight"] == right


@torch.no_grad()
def test_heads_of_their_own_size_and_a_linear_scale_are_kept(tmp_path):
    """transformers' own loading takes no scale from a GGUF file."""
    rope = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
    model, ids = random_llama(head_dim=24, rope_parameters=rope), torch.randint(96, (2, 50))
    scale = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    path = write_gguf(tmp_path / "model.gguf", tensors_of(model), metadata_of(model) | spm_metadata(96) | scale)
    ours = load(path, tmp_path / "ours")
    assert ours.config.rope_scaling == {"rope_type": "linear", "factor": 2.5} and ours.config.rms_norm_eps == 1e-5
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.5}  # which llama.cpp does not scale
    assert load(whole(tmp_path, none), tmp_path / "unscaled").config.rope_scaling is None
    assert (ours(ids)[0] - model(ids).logits).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_factors_become_its_settings_or_are_refused(factor, tmp_path):
    """They are computed as convert_hf_to_gguf.py does."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model, ids = random_llama(head_dim=32, rope_parameters=rope), torch.randint(96, (2, 50))
    factors = []
    for frequency in (1 / (5e5 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32))).tolist():
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    tensors = tensors_of(model) | {FACTORS: np.array(factors, dtype=np.float32)}
    metadata = metadata_of(model) | spm_metadata(96)
    ours = load(write_gguf(tmp_path / "model.gguf", tensors, metadata), tmp_path / "ours")
    del rope["rope_theta"]
    assert ours.config.rope_scaling == rope
    assert (ours(ids)[0] - model(ids).logits).abs().max() < 1e-4
    for wrong in (np.array(factors, dtype=np.float32) ** 0.9, np.ones(5, dtype=np.float32)):
        write_gguf(tmp_path / "model.gguf", tensors | {FACTORS: wrong}, metadata)
        with pytest.raises(ValueError, match=FACTORS):
            unpack(tmp_path / "model.gguf", tmp_path)


def test_a_sentencepiece_tokenizer_gives_the_ids_of_the_one_it_was_made_from(tmp_path):
    model = random_llama(vocab_size=2048)
    path = write_gguf(tmp_path / "model.gguf", tensors_of(model), metadata_of(model) | spm_metadata())
    unpack(path, tmp_path)
    ours, right = (SentencePieceProcessor(str(folder / "tokenizer.model")) for folder in (tmp_path, ROOT / "tiny"))
    for text in TEXTS:
        assert ours.encode(text) == right.encode(text)
        assert ours.decode(ours.encode(text)) == right.decode(right.encode(text))
    assert (ours.bos_id(), ours.eos_id(), ours.unk_id(), ours.pad_id()) == (1, 2, 0, -1)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


CUTS = {  # as the tokenizer.json of these models says it
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "tekken": [
        pre_tokenizers.Split(Regex(TEKKEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def trained_bpe(name: str) -> tuple[Tokenizer, dict]:
    """A small byte-level BPE, and a GGUF file's metadata of it."""
    made = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(CUTS[name]), decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(BOOK[:200000].split("\n"), trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    raw, vocabulary = json.loads(made.to_str()), made.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [3 if token in special else 4 if token == "<tool>" else 1 for token in tokens]
    return made, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(x) for x in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{ 1 }}",
    }  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_a_bpe_tokenizer_gives_the_ids_of_the_one_it_was_made_from(name, tmp_path):
    right, metadata = trained_bpe(name)
    model = random_llama(vocab_size=601)
    path = write_gguf(tmp_path / "model.gguf", tensors_of(model), metadata_of(model) | metadata)
    unpack(path, tmp_path)
    ours, said = (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        json.loads((tmp_path / "tokenizer_config.json").read_text()),
    )
    assert said["chat_template"] == "{{ 1 }}" and (said["bos_token"], said["eos_token"]) == ("<|begin|>", "<|end|>")
    assert said["add_bos_token"] == (name in ("llama-bpe", "tekken"))
    for text in (*TEXTS, "<|begin|>a <tool>b<|end|>"):
        ids = right.encode(text).ids
        assert ours.encode(text).ids == [0] * said["add_bos_token"] + ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == right.decode(ids, skip_special_tokens=skip)
    pairs = ours.encode("a", "b").ids
    assert pairs == ours.encode("a").ids + ours.encode("b").ids


def test_llama_3s_pattern_is_that_of_transformers():
    assert TikTokenConverter(vocab_file="").pattern == LLAMA3


WRONG = [
    ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
    ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8"),
    ({"llama.attention.head_count": 0}, "head_count"), ({"llama.attention.head_count": [4, 2]}, "head_count"),
    ({"llama.attention.head_count_kv": [2, 1]}, "heads of even size"),
    ({"llama.attention.head_count_kv": 0}, "heads of even size"),
    ({"llama.context_length": "long"}, "max_position_embeddings"), ({"llama.attention.key_length": "x"}, "rope.dimension_count"),
    ({"llama.rope.freq_base": "x"}, "rope_theta"), ({"llama.rope.scaling.factor": "x"}, "rope_scaling's factor"),
    ({"tokenizer.ggml.eos_token_id": [1, 2]}, "eos_token_id"), ({"llama.embedding_length": [64]}, "embedding_length"),
    ({"split.count": 3}, "is one of 3 parts.*--merge"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5' is not supported"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new", "tokenizer.ggml.merges": ["a b"]}, "pre 'new' is not"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a qq"]}, "merges"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [1]}, "merges"),
    ({"tokenizer.ggml.bos_token_id": 96}, "bos_token_id 96"), ({"tokenizer.ggml.scores": [1.0]}, "scores"),
    ({"tokenizer.ggml.token_type": [1]}, "of one length"), ({"tokenizer.ggml.token_type": [9] * 96}, "token_type"),
    ({"tokenizer.ggml.tokens": ["a"] * 96}, "a text twice"), ({"tokenizer.ggml.tokens": [1] * 96}, "texts"),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", WRONG, ids=lambda x: str(x)[:60])
def test_what_is_not_computed_or_broken_is_refused_by_name(changes, said, tmp_path):
    path = whole(tmp_path, changes)
    with pytest.raises(ValueError, match=said) as raised:
        unpack(path, tmp_path)
        FastConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["llama.embedding_length", "tokenizer.ggml.tokens", "llama.block_count"])
def test_metadata_that_is_missing_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=f"has no {name}"):
        unpack(whole(tmp_path, drop=(name,)), tmp_path)


def test_other_models_and_another_order_of_bytes_are_refused(tmp_path):
    for settings, said in (
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"endianess": gguf.GGUFEndian.BIG}, "big-endian"),
    ):
        with pytest.raises(ValueError, match=said):
            unpack(whole(tmp_path, **settings), tmp_path)
    model = random_llama()
    tensors = tensors_of(model) | {"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}
    with pytest.raises(ValueError, match="tensor blk.0.attn_q.bias is not supported"):
        unpack(write_gguf(tmp_path / "m.gguf", tensors, metadata_of(model) | spm_metadata(96)), tmp_path)


def test_a_file_that_was_cut_short_or_is_broken_anywhere_is_one_line(tmp_path):
    content = bytearray(whole(tmp_path).read_bytes())
    path, said = tmp_path / "broken.gguf", []
    for n in (4, 8, 20, 24, 40, 100, 1000, 3000, 5000, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="broken or cut short.*get it again") as raised:
            unpack(path, tmp_path)
        said.append(str(raised.value))
    rng = np.random.default_rng(0)
    for at in rng.integers(4, 6000, 60):
        wrong = bytearray(content)
        wrong[at] ^= 0x80
        path.write_bytes(wrong)
        try:
            unpack(path, tmp_path)
        except ValueError as error:  # and no other kind
            said.append(str(error))
    assert len(said) > 30 and not any("\n" in line for line in said)
