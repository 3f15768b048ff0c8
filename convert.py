"""Turns Hugging Face folders of LLaMA and LongLLaMA, or GGUF files, into ours, and back.

    python convert.py --input HF_DIR --output DIR --dtype bfloat16      # pytorch_model.bin or safetensors, whole or sharded
    python convert.py --input model.gguf --output DIR                   # llama.cpp's, dequantised
    python convert.py --input DIR --output HF_DIR --to-hf               # for LlamaForCausalLM.from_pretrained
    python convert.py --input DIR --over memory_layers.safetensors --output TUNED       # what train.py --tune memory wrote
    python convert.py --input DIR --output SMALLER --weights int8       # half the bytes, to be read as it is

Our folder is config.json, one model.safetensors under Hugging Face's tensor names, and tokenizer.model, or for want of it
tokenizer.json. Going back, the weights are the same and config.json says LlamaForCausalLM: a plain LLaMA to others, with its
memory settings kept. Small files that transformers keeps beside them, as a chat template, come along both ways. Only we read
weights in int8 or int4: --to-hf and --dtype make of them matrices of the rounded numbers.

A GGUF file holds settings and a tokenizer, too. What it quantised is stored as float16, as the scales of its blocks are, if
--dtype does not say otherwise.

Tensors are read and written one by one, so memory holds about one at a time. Weights are untrusted: nothing is unpickled but
tensors, and no file outside the input folder is opened.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from cli.ending import ending_well, first_line, out_of_memory, tell, warn

import torch
from torch import Tensor

from cli.flags import WINDOW_FLAGS, add_window_flags, check_new_folder, given, new_path, parser_for
from cli.loading import (
    DTYPES,
    copy_tokenizer,
    read_tokenizer,
    tokenizer_in,
    unlike_its_config,
    with_special_ids,
    with_window,
)
from fast import FastConfig
from fast.files import (
    WEIGHT_DTYPES,
    Weights,
    as_weights,
    find_weights,
    gathered,
    instead,
    is_finite,
    read_json,
    replacing,
    weight_files,
    write_safetensors,
)
from fast.folder import BESIDE, check_folder, files_of, replacing_model
from fast.gguf import is_gguf, unpack
from fast.model import check_weights, untied
from fast.quantised import KINDS, dequantised_weights, quantised_weights
from fast.tuned import laid_over
from longllama import LongLlama, LongLlamaConfig, require
from tokenizer import SentencePieceTokenizer, Tokenizer, content

GENERATION, TOKENIZER, SPECIAL = "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"
DROPPED = object()  # in place of a value that goes
LARGEST_TEXT = 1 << 24  # bytes of a file that goes with a model: a config or a template


def read_weights(folder: Path) -> Weights:
    """The tensors of a Hugging Face folder, of safetensors files if there are any. None is in memory until it is read."""
    index, files = folder / "model.safetensors.index.json", weight_files(folder, "model.safetensors")
    if index.is_file() or any(path.is_file() for path in files):
        return find_weights(folder)
    load = lru_cache(maxsize=1)(load_bin)  # one shard at a time

    def bin_weights(path: Path) -> Weights:
        def read(name: str) -> Tensor:
            return load(path)[name]

        return {name: (list(x.shape), x.dtype, partial(read, name)) for name, x in load(path).items()}

    return gathered(weight_files(folder, "pytorch_model.bin"), bin_weights)


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped rather than read."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --input needs model.safetensors or pytorch_model.bin, or their shards"
        )
    tensors = load_pickled(path)
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and is_weight(x) for name, x in tensors.items()):
        raise ValueError(f"{path} is not a dictionary of tensors of floating-point numbers")
    return {name: x.detach() for name, x in tensors.items()}


def is_weight(x) -> bool:
    """Whether x is a tensor of numbers that lie in memory as they are, each at a place of its own."""
    plain = isinstance(x, Tensor) and x.dtype in WEIGHT_DTYPES.values() and x.layout == torch.strided
    if not plain or x.is_meta or x.is_neg() or x.is_nested:
        return False
    return x.numel() <= 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))


def load_pickled(path: Path):
    """What torch.save wrote, tensors mapped rather than read. Raises OSError, or ValueError for what could be code."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # which is how torch tells
    try:
        fits = not zipped or is_stored(path)
        with warnings.catch_warnings():  # of torch, about what is refused here anyway
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped) if fits else None
    except Exception as error:  # of many kinds, and torch advises to switch its guard off
        if (isinstance(error, OSError) and error.filename) or out_of_memory(error):  # a file cut short has no name
            raise
        said = "broken, or holds more than tensors, which is not loaded: get it again"
        raise ValueError(f"{path} is {instead(path, said)}") from None
    require(fits, f"{path} is compressed, or its parts overlap: get it again, or write it again with torch.save")
    return loaded


def is_stored(path: Path) -> bool:
    """Whether the members of a zip file are bytes of it as they are, each its own. Packed ones that are mapped would be taken for
    numbers, and unpacked, those of a small file can fill the memory. Raises an error for a broken file."""
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        for member in members:
            file.open(member).close()  # which refuses what is encrypted, or has another name where it lies
    plain = all(x.compress_type == zipfile.ZIP_STORED and x.compress_size == x.file_size for x in members)
    apart = sum(x.file_size for x in members) <= path.stat().st_size and len({x.filename for x in members}) == len(
        members
    )
    return plain and apart


def write_config(path: Path, config: LongLlamaConfig, dtype: torch.dtype, to_hf: bool = False):
    """config.json; to_hf: as LlamaForCausalLM reads it, which ignores the memory settings, and convert.py finds them again."""
    names = ("LlamaForCausalLM", "llama") if to_hf else ("LongLlamaForCausalLM", "longllama")
    extra = {"architectures": names[:1], "model_type": names[1], "hidden_act": "silu"}
    text = json.dumps(extra | asdict(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}, indent=2)
    with replacing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def texts_beside(source: Path, config: LongLlamaConfig, to_hf: bool = False) -> dict[str, str]:
    """The small files that go with the model in a folder, name -> text, those that are sound, with the config's ids of
    what begins and ends a text. to_hf: so that transformers gives our ids."""
    texts, tokenizer = {}, tokenizer_in(source)
    for path in files_of(source, BESIDE) if source.is_dir() else ():
        try:
            require(path.stat().st_size <= LARGEST_TEXT, f"{path} is larger than {LARGEST_TEXT >> 20} MiB")
            if path.suffix == ".json":
                read_json(path)
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            warn(f"{path.name} is left out: {first_line(error)}")
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    changes = {GENERATION: ids}  # which transformers, and we, believe more than config.json
    if to_hf and tokenizer.exists():
        change = special_tokens if tokenizer.suffix == ".model" else special_tokens_of_json
        changes |= {name: change(texts, name, read_tokenizer(tokenizer)) for name in (TOKENIZER, SPECIAL)}
        texts.setdefault(TOKENIZER, "{}")
    for name in changes.keys() & texts.keys():
        before = json.loads(texts[name])
        after = {key: value for key, value in (before | changes[name]).items() if value is not DROPPED}
        texts[name] = texts[name] if before == after else json.dumps(after, indent=2) + "\n"
    return texts


def special_tokens(texts: dict[str, str], name: str, tokenizer: SentencePieceTokenizer) -> dict:
    """What has to change in a file of transformers, so that it gives the ids that `Tokenizer` gives, `<s>` in front. Without a
    tokenizer_class it takes spaces as tokenizer.model says; other classes do not."""
    raw, sp = json.loads(texts.get(name, "{}")), tokenizer.sp
    listed = [json.loads(texts.get(file, "{}")) for file in ("added_tokens.json", TOKENIZER)]
    decoder = listed[1].get("added_tokens_decoder")
    added = {*listed[0], *(content(token) for token in (decoder.values() if isinstance(decoder, dict) else ()))}
    pieces = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": sp.unk_id(), "pad_token": -1}
    changes = dict.fromkeys(("tokenizer_class", "auto_map", "add_prefix_space"), DROPPED)
    changes |= {"legacy": True, "add_bos_token": True, "add_eos_token": False}
    changes = changes if name == TOKENIZER else {}
    for token, i in pieces.items():
        said = content(raw.get(token))
        known = said in added or sp.id_to_piece(sp.piece_to_id(said)) == said
        if (token in raw or name == TOKENIZER) and (token == "bos_token" or not known):
            changes[token] = sp.id_to_piece(i) if i >= 0 else DROPPED
    return changes


def special_tokens_of_json(texts: dict[str, str], name: str, tokenizer: Tokenizer) -> dict:
    """The same for a tokenizer.json, which says itself what stands in front. Other classes than this one make it anew."""
    if name != TOKENIZER:
        return {}
    changes = dict.fromkeys(("auto_map", "add_bos_token", "add_eos_token"), DROPPED)
    return changes | {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.piece(tokenizer.eos_id)}


def texts_of_tokenizer(tokenizer: Path, config: LongLlamaConfig) -> dict[str, str]:
    """`texts_beside` of a tokenizer.json from elsewhere than the model: they say what its special tokens are."""
    texts = texts_beside(tokenizer.parent, config) if tokenizer.suffix == ".json" else {}
    return {name: text for name, text in texts.items() if name != GENERATION}


def write_beside(folder: Path, texts: dict[str, str], tokenizer: Path):
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if tokenizer.is_file():
        copy_tokenizer(tokenizer, folder)


def save_pretrained(model: LongLlama, folder: str | Path, tokenizer: Path | None = None, source: Path | None = None):
    """Writes config.json and model.safetensors, in the parameters' dtype, and a copy of that tokenizer, in the place of the
    model that is there, if any; None: its tokenizer stays. source: a folder whose small files go with the model, too. Raises
    OSError, and ValueError for rounded weights."""
    folder = Path(folder)
    whole = all(p.is_floating_point() for p in model.parameters())
    require(whole, "rounded weights are stored by convert.py --weights, from the model in 16 bits")
    tokenizer = tokenizer or tokenizer_in(folder)
    texts = (texts_beside(source, model.config) if source else {}) | texts_of_tokenizer(tokenizer, model.config)
    with replacing_model(folder) as made:
        write_safetensors(made / "model.safetensors", as_weights(model.hf_tensors()), {"format": "pt"})
        write_config(made / "config.json", model.config, model.norm.weight.dtype)
        write_beside(made, texts, tokenizer)


def watched(name: str, read: Callable[[], Tensor]) -> Tensor:
    x = read()
    if not is_finite(x):
        warn(f"{name} has numbers that are not finite (NaN or infinity): logits will not be numbers either")
    return x


def check_folders(source: Path, target: Path, force: bool):
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"--output {target} is a file: name a folder")
    if target.exists() and any(target.iterdir()) and not force:
        raise FileExistsError(f"--output {target} is not empty: name another folder, or add --force")
    if target.exists() and target.samefile(source):
        raise ValueError("--output is the --input folder: name another one")


def as_asked(
    config: FastConfig, weights: Weights, dtype: torch.dtype | None, kind: str | None, to_hf: bool
) -> tuple[FastConfig, Weights]:
    """The config and weights, rounded, or matrices of that dtype again. Raises ValueError."""
    stored = config.weight_dtype
    plain = config.mem_positionals or not config.mem_layers
    require(plain or not to_hf, "mem_positionals false is no LLaMA: transformers would rotate the memory layers, too")
    if kind:
        require(
            not to_hf, "--to-hf makes a folder for transformers, which does not read --weights: leave one of them out"
        )
        require(not dtype, "--weights says what matrices are stored as: leave out --dtype")
        require(stored in (None, kind), f"--input has weights rounded to {stored} already: take the model in 16 bits")
    if stored and (dtype or to_hf):
        return replace(config, weight_dtype=None), dequantised_weights(weights, dtype or torch.bfloat16)
    if kind and not stored:
        return replace(config, weight_dtype=kind), quantised_weights(weights, kind)
    return config, weights


@contextmanager
def opened(path: Path) -> Iterator[tuple[Path, Weights]]:
    """The folder of a model in Hugging Face's layout, and its weights. A GGUF file becomes one, for the time."""
    if is_gguf(path):
        with TemporaryDirectory(prefix=f"{path.name}.") as folder:
            weights = unpack(path, Path(folder))
            yield Path(folder), weights
    else:
        yield path, read_weights(path)


def checked(source: Path, weights: Weights, over: Path | None, changes: dict) -> tuple[FastConfig, Weights]:
    """The config of a folder, and its weights. See `convert`."""
    config, tokenizer = FastConfig.from_json(source / "config.json"), tokenizer_in(source)
    changes = {name: value for name, value in changes.items() if value is not None}
    config = untied(replace(config, **with_window(config, changes)), weights)
    weights = check_weights(config, weights, source)
    if over is not None:
        require(not changes, "--over brings its own layers and window: leave out --mem-layers and --window")
        config, weights = laid_over(over, weights, source)
    for text in unlike_its_config(source, config):
        warn(text)
    if tokenizer.exists():
        pieces = read_tokenizer(tokenizer)
        try:
            config = with_special_ids(config, pieces, source)
        except ValueError as error:  # one that the model was not made with; generate.py refuses it
            warn(str(error))
    return config, weights


def convert(
    path: Path, target: Path, *, dtype: torch.dtype | None = None, kind: str | None = None, to_hf=False, force=False,
    over: Path | None = None, **changes,
):  # fmt: skip
    """Makes a folder of a folder or a GGUF file. dtype: to store weights as, None: as they are; kind: "int8" or "int4", to round
    matrices to; over: a file of tuned memory layers; changes: of the config, None is none. Raises OSError or ValueError."""
    if not is_gguf(path):
        check_folder(path)
    check_folders(path, target, force)
    with opened(path) as (source, weights):
        config, weights = checked(source, weights, over, changes)
        texts = texts_beside(source, config, to_hf)
        saved = dtype or next(stored for _, stored, _ in weights.values() if stored.is_floating_point)
        config, weights = as_asked(config, weights, dtype, kind, to_hf)
        weights = {name: (shape, x, partial(watched, name, read)) for name, (shape, x, read) in weights.items()}
        nbytes = sum(torch.Size(shape).numel() * (dtype or stored).itemsize for shape, stored, _ in weights.values())
        check_new_folder("--output", target, nbytes)
        with replacing_model(target) as made:
            write_safetensors(made / "model.safetensors", weights, {"format": "pt"}, dtype)
            write_config(made / "config.json", config, saved, to_hf)
            write_beside(made, texts, tokenizer_in(source))
        if not tokenizer_in(source).exists():
            warn(f"{path} has no tokenizer.model and no tokenizer.json; generate.py will need one")


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder to read, or GGUF file")
    parser.add_argument("--output", type=new_path, required=True, help="folder to make")
    parser.add_argument(
        "--over", type=Path, metavar="FILE", help="memory layers tuned from --input, to take their place"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="what to store weights as (default: as they are)")
    parser.add_argument("--weights", choices=KINDS, help="round matrices to 8 or 4 bits")
    parser.add_argument("--to-hf", action="store_true", help="make a folder for transformers' LlamaForCausalLM")
    parser.add_argument("--force", action="store_true", help="write into --output though it is not empty")
    add_window_flags(parser)
    args = parser.parse_args()
    with ending_well(parser):
        asked = given(args, ("to_hf", "force", "over", *WINDOW_FLAGS))
        convert(args.input, args.output, dtype=DTYPES.get(args.dtype), kind=args.weights, **asked)
        tell(f"wrote {args.output}")


if __name__ == "__main__":
    main()
