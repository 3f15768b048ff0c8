"""What a GPU would be asked to do, found out without one: bytes allocated, and operations of a decoded token.

    python benchmarks/dry_run.py --shape 3b --prompt-tokens 2k,16k,256k,1M

The model runs on fake tensors, which have a shape, a dtype and a device, but no numbers: the very code that runs on a GPU with
FlashAttention, in bfloat16, and the step that --compile captures as a CUDA graph. So it also shows that this code fits together,
and that it never waits for a number from the GPU. It needs torch with CUDA (what pip installs on Linux), no GPU. It measures no
time. The rest is what is allocated besides weights and memory when most is; operations are those of a step that is not compiled.
"""

import argparse
import sys
import weakref
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import FIELDS, SHAPES, model_bytes

from convert import ending_well
from examples.passkey import parse_lengths
from generate import Steps, number
from longllama import LongLlama, LongLlamaConfig

VIEWS = {  # operations that launch nothing
    "device", "view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "transpose", "t", "expand", "unsqueeze",
    "squeeze", "detach", "alias", "empty", "new_empty",
}  # fmt: skip
COLUMNS = (
    "prompt",
    "weights GiB",
    "memory GiB",
    "rest at the most GiB",
    "operations of a step",
    "of them FlashAttention",
)


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of all storage on the GPU that is alive."""

    def __init__(self):
        super().__init__()
        self.operations, self.alive, self.now, self.peak = Counter(), set(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.operations[operation.overloadpacket.__name__] += 1
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_cuda:
                self.note(x.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int):
        self.alive.discard(key)
        self.now -= size


def fake_model(shape: str) -> LongLlama:
    """In FakeTensorMode: a model on a GPU that need not be there."""
    with torch.device("meta"):
        model = LongLlama(LongLlamaConfig(**dict(zip(FIELDS, SHAPES[shape]))))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            weight = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda")
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return model


@torch.no_grad()  # in inference mode operations would come as one that are several
def dry_run(shape: str, B: int, T: int) -> list[str]:
    """One line of the table."""
    with FakeTensorMode(), patch("torch.cuda.get_device_capability", lambda device: (9, 0)):
        model = fake_model(shape)
        ids = torch.empty(B, T, dtype=torch.long, device="cuda")
        with Watch() as watch:
            for p in model.parameters():
                watch.note(p.untyped_storage())
            _, cache = model(ids, logits_to_keep=1)
            for _ in range(2):  # the first makes room for more
                watch.operations.clear()
                _, cache = model(ids[:, :1], cache, logits_to_keep=1)
        work = {name: n for name, n in watch.operations.items() if name not in VIEWS}
        flash = watch.operations["_scaled_dot_product_flash_attention"]
        model.forward = Steps(model)
        with patch("generate.captured", lambda step, device: step() or step):
            model(ids[:, :1], cache, logits_to_keep=1)
        sizes = (model_bytes(model), cache.memory_bytes, watch.peak - model_bytes(model) - cache.memory_bytes)
    return [f"{T:,}", *(f"{n / 2**30:.2f}" for n in sizes), f"{sum(work.values()):,}", f"{flash:,}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument(
        "--shape",
        choices=[name for name, sizes in SHAPES.items() if sizes],
        default="3b",
        help="of which model (default 3b)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=parse_lengths,
        default="2k,16k",
        metavar="1k,16k,1M",
        help="prompt lengths (default 2k,16k)",
    )
    parser.add_argument("--batch", type=number(int, 1), default=1, metavar="N", help="prompts at once")
    args = parser.parse_args()
    if torch.version.cuda is None:
        parser.error("this torch is built without CUDA: install the one from pypi.org, no GPU is needed")
    with ending_well(parser):
        print(f"torch {torch.__version__}, shape {args.shape}, batch {args.batch}, bfloat16\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for T in args.prompt_tokens:
            print("|", " | ".join(dry_run(args.shape, args.batch, T)), "|", flush=True)


if __name__ == "__main__":
    main()
