"""Products with weights: the same numbers by all of torch's ways, on Intel's processors and on AMD's, whatever this one is."""

import contextlib

import pytest
import torch
from torch import nn

from fast.linear import PARTS, FastLinear, Limits, linear, use_fast_linear
from fast.test_model import DEVICES, each_mkl


@contextlib.contextmanager
def onednn(enabled: bool):
    """torch's own switch."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@torch.no_grad()
@each_mkl
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 200), (1, 5, 200), (3, 1, 200)])
def test_products_of_one_token_and_of_many_are_near_float64_and_leave_torchs_settings_alone(
    shape, dtype, enabled, device, mkl
):
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype)
    with onednn(enabled):
        for rows in (320, 333):  # in parts, or not
            assert (rows % PARTS == 0) == (rows == 320)
            weight = torch.randn(rows, 200).to(device, dtype)
            out, right = linear(x, weight, Limits(**mkl)), x.double() @ weight.double().T
            assert out.dtype == dtype and out.shape == right.shape
            assert (out - right).abs().max() < 8 * torch.finfo(dtype).eps * right.abs().max()
        assert torch.backends.mkldnn.enabled == enabled


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_product_that_fails_leaves_torchs_settings_alone_too(enabled, amx):
    x, weight = torch.ones(1, 1, 200).bfloat16(), torch.ones(320, 200)  # of another dtype
    with onednn(enabled):
        with torch.no_grad(), pytest.raises(RuntimeError):
            linear(x, weight, Limits(slow_mkl=False, amx=amx))
        assert torch.backends.mkldnn.enabled == enabled


@each_mkl
@pytest.mark.parametrize("shape", [(1, 1, 200), (1, 5, 200)])
def test_gradients_of_products_are_those_of_torch(shape, mkl):
    torch.manual_seed(0)
    layer = nn.Linear(200, 320, bias=False)
    fast, x = FastLinear(layer, Limits(**mkl)), torch.randn(shape, requires_grad=True)
    gradients = [torch.autograd.grad(module(x).square().sum(), (x, layer.weight)) for module in (fast, layer)]
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(*gradients))


def test_the_linears_of_a_model_are_replaced_and_share_their_weights():
    other = nn.Linear(3, 4)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU()))
    weights, limits = list(model.parameters()), Limits(cast=9)
    use_fast_linear(model, limits)
    assert type(model[0]) is type(model[1][0]) is FastLinear and type(model[1][1]) is nn.ReLU
    assert model[0].limits is limits and (model[0].in_features, model[0].out_features) == (2, 3)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert other.weight is FastLinear(other).weight
