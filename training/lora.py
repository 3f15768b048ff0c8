"""LoRA (Hu et al. 2021): weights stay as they are, and a product of two small matrices, which is trained, is added to each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import FastLlama
from longllama import require

PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PAIR = ("lora_a", "lora_b")


class LoraLinear(nn.Linear):
    """x W^T + (x A^T) B^T, with A (rank, in) random and B (out, rank) 0 at first. W is frozen. There is no further
    scale: the learning rate is one."""

    def __init__(self, other: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = other.in_features, other.out_features
        self.weight = other.weight
        self.register_parameter("bias", None)
        device = other.weight.device
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, device=device) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: FastLlama, rank: int, products: list[str]):
    """Freezes the model, and puts a `LoraLinear` in the place of these products in all layers. Raises ValueError for a rank that
    saves nothing."""
    model.requires_grad_(False)
    for layer in model.layers:
        for name in products:
            product = getattr(layer, name)
            most = min(product.weight.shape)
            require(rank < most, f"--lora {rank}: {name} has a rank of {most}, and less is what LoRA is for")
            layer.add_module(name, LoraLinear(product, rank))


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model without LoRA that computes the same: W + B A."""
    whole = {name: weight for name, weight in weights.items() if not name.endswith(PAIR)}
    for name in weights:
        if name.endswith(PAIR[0]):
            path = name.removesuffix(PAIR[0])
            a, b = (weights[path + part].float() for part in PAIR)
            whole[path + "weight"] = whole[path + "weight"].float() + b @ a
    return whole
