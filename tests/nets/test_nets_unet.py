"""The volumes' network: one volume on a CPU is convolved in slabs, with the numbers and about the speed of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cryoiso.nets.unet import Double, Halve, Same, Unet3d, UnetConfig

CONFIG = UnetConfig((4, 8, 8), 2)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of a loss with respect to input and weights, in float64."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return [y, *torch.autograd.grad((y.square() * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("edge", [2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("kind", [Same, Halve, Double])
def test_one_volume_in_slabs_has_the_numbers_of_torchs_own(kind, edge):
    torch.manual_seed(1)
    layer = kind(3, 5).double()
    x = torch.randn((1, 3, edge, 6, 8), dtype=torch.float64)
    own = (nn.ConvTranspose3d if kind is Double else nn.Conv3d)(
        3, 5, layer.kernel_size, layer.stride, layer.padding, bias=False
    ).double()
    own.load_state_dict(layer.state_dict())
    for a, b in zip(gradients(layer, x), gradients(own, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("edge", [4, 8, 12])
def test_a_volume_does_not_depend_on_the_others_of_its_batch(channels_last, edge):
    torch.manual_seed(1)
    net = Unet3d(CONFIG)
    nn.init.normal_(net.last.weight, std=0.1)
    if channels_last:
        net = net.to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 1, edge, edge, edge)
    for one, among in zip(x, net(x), strict=True):
        torch.testing.assert_close(net(one[None])[0], among, rtol=1e-4, atol=1e-5)


def test_one_volume_does_not_take_torchs_slow_way():
    net = Unet3d(CONFIG)
    with torch.autograd.profiler.profile() as profile:
        net(torch.randn(1, 1, 16, 16, 16)).square().sum().backward()
    names = {event.name for event in profile.function_events}
    assert not [name for name in names if "slow_conv" in name]
    if torch.backends.mkldnn.is_available():
        assert any("mkldnn" in name for name in names)
