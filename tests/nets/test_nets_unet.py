"""The volumes' network: one volume on a CPU is convolved in slabs, with the numbers and about the speed of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cryoiso.nets.unet import Unet3d, UnetConfig, inner
from cryoiso.nets.volume_convolutions import Double, Halve, Same

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


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_that_come_in_parts_are_convolved_as_if_joined(padding):
    torch.manual_seed(1)
    layer = Same(5, 4).double()
    x = torch.randn((1, 5, 8, 6, 10), dtype=torch.float64)
    own = nn.Conv3d(5, 4, 3, padding=padding, bias=False).double()
    own.load_state_dict(layer.state_dict())

    class Parted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, volume: Tensor) -> Tensor:
            return self.layer(*volume.split([2, 3], 1), padding=padding)

    for a, b in zip(gradients(Parted(), x), gradients(own, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("margin", [2, 3, 4])
@pytest.mark.parametrize("alone", [False, True])
def test_leaving_out_a_margin_changes_no_number_inside_it(margin, alone):
    torch.manual_seed(1)
    net = Unet3d(CONFIG).double()
    nn.init.normal_(net.last.weight, std=0.1)
    x = torch.randn(1 if alone else 2, 1, 16, 16, 16, dtype=torch.float64)
    whole = inner(net(x), margin)
    expected = torch.autograd.grad(whole.square().sum(), [*net.parameters()])
    found = net(x, margin)
    assert found.shape[-3:] == (16 - 2 * margin,) * 3
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [*net.parameters()]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this build of torch")
def test_bfloat16_takes_no_slabs_and_gives_nearly_the_same_gradient():
    torch.manual_seed(1)
    net = Unet3d(CONFIG).to(memory_format=torch.channels_last_3d)
    nn.init.normal_(net.last.weight, std=0.1)
    x = torch.randn(1, 1, 16, 16, 16)

    def gradient(low: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = net(x, 4).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])])

    exact = gradient(False)
    with torch.autograd.profiler.profile() as profile:
        rounded = gradient(True)
    assert float(torch.cosine_similarity(rounded, exact, 0)) > 0.999
    convolved = [e for e in profile.function_events if e.name == "aten::mkldnn_convolution"]
    assert len(convolved) == len([m for m in net.modules() if isinstance(m, (Same, Halve))]) + len(net.up)


def test_one_volume_does_not_take_torchs_slow_way():
    net = Unet3d(CONFIG)
    with torch.autograd.profiler.profile() as profile:
        net(torch.randn(1, 1, 16, 16, 16)).square().sum().backward()
    names = {event.name for event in profile.function_events}
    assert not [name for name in names if "slow_conv" in name]
    if torch.backends.mkldnn.is_available():
        assert any("mkldnn" in name for name in names)
