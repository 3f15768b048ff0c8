"""Where the time of one decoded token goes: its kernels, the longest first, and what lies between them.

    python benchmarks/profile_step.py --shape 3b --prompt-tokens 2k         # on a GPU: compiled and captured
    python benchmarks/profile_step.py --shape tiny --device cpu

Weights are random. Eight steps are profiled, after as many that are not.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import SHAPES, random_ids, random_model
from cli.flags import number, parse_length, parser_for
from cli.loading import DTYPES, pick_device

STEPS = 8  # that are profiled, after as many that are not


@torch.inference_mode()
def run(args: argparse.Namespace):
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    model = random_model(args.shape, device, DTYPES["bfloat16" if on_gpu else "float32"])
    if on_gpu:
        model.compile_layers()
    _, cache = model(random_ids(model, 1, args.prompt_tokens), logits_to_keep=1)
    token = random_ids(model, 1, 1)
    for _ in range(STEPS):
        model(token, cache, logits_to_keep=1)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            model(token, cache, logits_to_keep=1)
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = "device" if on_gpu else "cpu"
    print(
        profiled.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=args.rows, max_name_column_width=60)
    )
    if on_gpu:
        spans = sorted(
            (e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type.name == "CUDA"
        )
        busy, end = 0.0, spans[0][0]
        for start, stop in spans:
            busy, end = busy + max(stop - max(start, end), 0), max(end, stop)
        whole = end - spans[0][0]
        print(
            f"a step: {whole / STEPS:,.0f} us, of which kernels run {busy / STEPS:,.0f} us, {len(spans) // STEPS} of them"
        )


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="default 3b")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one")
    parser.add_argument("--prompt-tokens", type=parse_length, default=2048, metavar="N", help="default 2k")
    parser.add_argument("--rows", type=number(int, 1), default=25, metavar="N", help="kernels shown (default 25)")
    args = parser.parse_args()
    with ending_well(parser):
        run(args)


if __name__ == "__main__":
    main()
