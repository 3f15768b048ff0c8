"""A random checkpoint of the size and in the layouts of the released 3B model, to try conversion and generation at real size.

    python benchmarks/random_checkpoint.py --layout bin --tokenizer tiny/tokenizer.model --output random_3b_bin
    python convert.py --input random_3b_bin --output random_3b
    python generate.py --model random_3b --prompt-file tiny/book.txt

Its weights are noise, and so is what it writes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cli.flags import check_new_folder, new_path, parser_for
from cli.loading import copy_tokenizer, read_tokenizer
from convert import write_config
from fast import FastConfig, FastLlama
from fast.folder import replacing_model

CONFIG = {
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "mem_layers": (6, 12, 18),
}
SHARDS = 4


def make(layout: str, tokenizer: Path, output: Path):
    config = FastConfig(**CONFIG)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in FastLlama(config).hf_tensors().items()}
    check_new_folder("--output", output, sum(2 * shape.numel() for shape in shapes.values()))
    if output.exists():
        raise FileExistsError(f"--output {output} is there already: name a new folder")
    read_tokenizer(tokenizer)
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        for name, shape in shapes.items()
    }
    for i in range(config.num_hidden_layers):  # the released files carry these tables, which nobody needs
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(config.head_dim // 2)
    with replacing_model(output) as made:
        try:
            save(layout, tensors, made)
        except (RuntimeError, SafetensorError):  # which is what torch and safetensors make of a failed write
            raise OSError(f"--output {output} cannot be written: is the disk full?") from None
        copy_tokenizer(tokenizer, made)
        write_config(made / "config.json", config, torch.bfloat16)


def save(layout: str, tensors: dict[str, torch.Tensor], folder: Path):
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    index = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::SHARDS]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def main():
    parser = parser_for(__doc__)
    parser.add_argument(
        "--layout", choices=["bin", "safetensors"], required=True, help="one .bin, or sharded safetensors"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer.model or tokenizer.json with at most 32000 ids"
    )
    parser.add_argument("--output", type=new_path, required=True, help="folder to make")
    args = parser.parse_args()
    with ending_well(parser):
        if not args.tokenizer.is_file():
            raise FileNotFoundError(f"--tokenizer {args.tokenizer} is missing: name a tokenizer.model")
        make(args.layout, args.tokenizer, args.output)


if __name__ == "__main__":
    main()
