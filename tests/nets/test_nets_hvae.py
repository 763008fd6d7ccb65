"""The hierarchical autoencoder: shapes, what it must and must not depend on, and that it learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from cryoiso.core.errors import InputError
from cryoiso.nets import channel_parts
from cryoiso.nets.hvae import ConditionalHvae, pose_vector
from cryoiso.nets.hvae_parts import HvaeConfig, HvaeOutput
from cryoiso.nets.losses import negative_elbo
from cryoiso.nets.wavelet_init import hadamard
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.noise import noise_spectrum
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import random_rotations

DEEP = {"levels": (2, 1, 1), "width": 16, "growth": 8, "convolutions": 3, "latent_channels": 4, "pose_features": 16}
WHITE_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(config: HvaeConfig, n: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, condition, pose and noise."""
    box = config.box_px
    rotation = torch.from_numpy(random_rotations(np.random.default_rng(seed), n))
    pose = pose_vector(rotation, normal(n, 2, seed=seed), box)
    images, condition = normal(n, 1, box, box, seed=seed + 1), 0.3 * normal(n, 1, box, box, seed=seed + 2)
    return images, condition, pose, normal(n, config.latent_size, seed=seed + 3)


def network(config: HvaeConfig, *, stirred: float = 0.05, seed: int = 3) -> ConditionalHvae:
    """A network whose starting weights, zeros included, are stirred a little, as some training would."""
    torch.manual_seed(seed)
    net = ConditionalHvae(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(stirred * torch.randn_like(p))
    return net


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach()).norm() / b.detach().norm())


# --- on CPUs


def test_maps_of_layers_that_come_one_by_one_are_those_of_one_product(monkeypatch):
    """Output and gradients, with a box that is no multiple of the coarsest resolution's pixels."""
    config = HvaeConfig.preset("small", 30)
    results = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(channel_parts, "in_parts", lambda x: False)
        net = network(config)
        images, *given = inputs(config)
        output = net(images, *given)
        negative_elbo(output, images, 0.1, 1.0).loss.backward()
        results.append((output.mean, output.kl, *(p.grad for p in net.parameters())))
    for parts, joined in zip(*results, strict=True):
        assert parts.shape == joined.shape and relative(parts, joined) < 2e-5


# --- configuration


def test_paper_preset_has_the_published_layers():
    """15 layers, 50.25 latent numbers a pixel, at 64 px 2, 3, 5 and 5 layers from fine to coarse."""
    config = HvaeConfig.preset("paper", 64)
    sides = [h for _, h, _ in config.latent_shapes]
    assert config.latent_layers == len(sides) == 15
    assert [sides.count(s) for s in (64, 32, 16, 8)] == [2, 3, 5, 5] and sides == sorted(sides)
    assert config.latent_size == 50.25 * 64**2


@pytest.mark.parametrize(
    "wrong", [{"box_px": 12}, {"levels": ()}, {"levels": (1, 0)}, {"width": 18}, {"latent_channels": 2},
              {"patch_px": 3}, {"start_sd": 0.0}],
)  # fmt: skip
def test_wrong_configurations_are_refused(wrong):
    with pytest.raises(InputError):
        HvaeConfig(**{"box_px": 32, **wrong})
    with pytest.raises(InputError):
        HvaeConfig.preset("huge", 64)


def test_parameters_do_not_grow_with_the_box():
    for name in ("paper", "small"):
        nets = [ConditionalHvae(HvaeConfig.preset(name, box)) for box in (16, 64, 257)]
        assert len({sum(p.numel() for p in net.parameters()) for net in nets}) == 1


@pytest.mark.parametrize("box", [16, 17, 31, 38, 48])
@pytest.mark.parametrize("patch", [1, 2])
def test_shapes_of_odd_and_even_boxes(box, patch):
    config = HvaeConfig(box, **DEEP, patch_px=patch)
    net = network(config)
    images, condition, pose, noise = inputs(config)
    output = net(images, condition, pose, noise)
    assert output.mean.shape == images.shape and output.kl.shape == (3, config.latent_layers)
    assert output.mean.dtype == output.kl.dtype == torch.float32
    assert sum(math.prod(s) for s in config.latent_shapes) == config.latent_size == noise.shape[1]
    assert net.sample(condition, pose, noise).shape == images.shape
    assert bool((output.kl > 0).all()) and bool(output.mean.isfinite().all())


def test_state_survives_a_trip_through_arrays():
    config = HvaeConfig(24, **DEEP)
    net, other = network(config), network(config, seed=8)
    other.load_state_dict({k: torch.from_numpy(v.numpy().copy()) for k, v in net.state_dict().items()})
    for a, b in zip(net(*inputs(config)), other(*inputs(config)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- what the output depends on


def test_nothing_is_random_but_the_given_noise():
    config = HvaeConfig(32, **DEEP)
    net, batch = network(config), inputs(config)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append((*net(*batch), net.sample(*batch[1:])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    other = net(*batch[:3], batch[3] + 1)
    assert float((other.mean - results[0][0]).detach().abs().max()) > 0.01


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    config = HvaeConfig(33, **DEEP)
    net, batch = network(config, stirred=0.02), inputs(config, 5)
    together = (*net(*batch), net.sample(*batch[1:]))
    for i in range(5):
        part = [t[i : i + 1] for t in batch]
        for alone, among in zip((*net(*part), net.sample(*part[1:])), together, strict=True):
            assert relative(alone, among[i : i + 1]) < 1e-5


@pytest.mark.parametrize("residual", [True, False])
def test_every_layer_sees_image_projection_and_pose(residual):
    """Gradients of each layer's KL with respect to all that the network is told, and to its own embeddings."""
    config = HvaeConfig(24, **DEEP, residual=residual)
    net = network(config)
    batch = [t.requires_grad_() for t in inputs(config, 1)]
    kl = net(*batch).kl
    layers, width = config.latent_layers, config.width
    for layer in range(layers):
        *told, vectors = torch.autograd.grad(kl[0, layer], [*batch[:3], net.pose.last.weight], retain_graph=True)
        assert all(float(g.abs().max()) > 1e-6 for g in told)
        own = vectors.view(layers, width, -1)[layers - 1 - layer]
        assert float(own.abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["small", "paper"])
def test_a_posterior_sees_the_condition_of_its_own_layer_as_the_prior_does(monkeypatch, name):
    """Only one layer's context changes, in channels that do not start as the image's: that layer's posterior moves as
    far as its prior, within a factor of 3."""
    config = HvaeConfig.preset(name, 32)
    net = network(config, stirred=0.02)
    images, condition, pose, noise = inputs(config)
    contexts = net._contexts(condition, pose)
    for number, layer in enumerate(net.latent_layers()):
        means: dict[str, list[Tensor]] = {"prior": [], "posterior": []}
        hooks = [
            getattr(layer, which).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0]))
            for which, kept in means.items()
        ]
        for change in (0.0, 1.0):
            new = [c.detach().clone() for c in contexts]
            new[number][:, 4:] += change * normal(*new[number][:, 4:].shape, seed=11)
            monkeypatch.setattr(net, "_contexts", lambda *_, new=new: new)
            with torch.no_grad():
                net(images, condition, pose, noise)
        for hook in hooks:
            hook.remove()
        moved = {which: float((b - a).square().mean().sqrt()) for which, (a, b) in means.items()}
        assert moved["prior"] > 0.01
        assert 1 / 3 < moved["posterior"] / moved["prior"] < 3, (number, moved)


def test_generation_sees_projection_and_pose():
    config = HvaeConfig(24, **DEEP, residual=False)
    net = network(config)
    _, condition, pose, noise = inputs(config)
    image = net.sample(condition, pose, noise)
    for other in (net.sample(-condition, pose, noise), net.sample(condition, pose.flip(0), noise)):
        assert relative(other, image) > 1e-3


def test_temperature_scales_the_noise_and_zero_gives_the_prior_mean():
    config = HvaeConfig(24, **DEEP)
    net = network(config)
    _, condition, pose, noise = inputs(config)
    calm = net.sample(condition, pose, noise, temperature=0.0)
    assert torch.equal(calm, net.sample(condition, pose, torch.zeros_like(noise)))
    torch.testing.assert_close(net.sample(condition, pose, noise, 0.5), net.sample(condition, pose, 0.5 * noise))
    assert relative(net.sample(condition, pose, noise), calm) > 0.1


def test_posterior_that_is_the_prior_costs_nothing_and_generates():
    """With both heads constant and alike, the KL is 0 and reconstruction is the prior's sample of the same noise."""
    config = HvaeConfig(24, **DEEP)
    net = network(config)
    with torch.no_grad():
        for layer in net.latent_layers():
            for head in (layer.prior, layer.posterior):
                nn.init.zeros_(head.out.weight)
                nn.init.zeros_(head.bent.weight)
            layer.posterior.out.bias.copy_(layer.prior.out.bias)
            layer.posterior.bent.bias.copy_(layer.prior.bent.bias)
    batch = inputs(config)
    output = net(*batch)
    assert float(output.kl.detach().abs().max()) < 1e-3
    torch.testing.assert_close(output.mean, net.sample(*batch[1:]))


# --- precision, memory order, compilation


def test_bf16_autocast_is_near_float32():
    config = HvaeConfig(32, **DEEP)
    net, batch = network(config), inputs(config)
    with torch.autocast("cpu", torch.bfloat16):
        low, sampled = net(*batch), net.sample(*batch[1:])
        negative_elbo(low, batch[0], 0.3, 1.0).loss.backward()
    high = net(*batch)
    assert low.mean.dtype == low.kl.dtype == sampled.dtype == torch.float32
    assert 1e-5 < relative(low.mean, high.mean) < 0.02 and relative(low.kl, high.kl) < 0.03
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_memory_order_does_not_matter():
    config = HvaeConfig(32, **DEEP)
    net, batch = network(config), inputs(config)
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for a, b in zip(net(*batch), plain(*batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_compiles_as_one_graph(request):
    if request.config.getoption("--shapes"):
        pytest.skip("checks of shapes cannot be compiled")
    config = HvaeConfig(16, **{**DEEP, "levels": (1, 1)})
    net, batch = network(config), inputs(config)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for a, b in zip(net(*batch), compiled(*batch), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_cuda_gives_the_numbers_of_the_cpu():
    config = HvaeConfig(48, **DEEP)
    net, batch = network(config), inputs(config)
    expected = (*net(*batch), net.sample(*batch[1:]))
    net, batch = net.cuda(), tuple(t.cuda() for t in batch)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for a, b in zip((*net(*batch), net.sample(*batch[1:])), expected, strict=True):
            assert relative(a.cpu(), b) < 1e-4


@pytest.mark.gpu
def test_bf16_autocast_on_cuda_is_near_float32():
    """Stirred less than above: that network is so far from a trained one (KL of 1e9 nats) that it amplifies rounding.

    A GPU rounds to bfloat16 once more than a CPU, between a convolution and its bias. That alone, done on the CPU,
    moves the other network's error from 0.024 to 0.044, and this one's from 0.0071 to 0.0075.
    """
    config = HvaeConfig(48, **DEEP)
    net, batch = network(config, stirred=0.02), inputs(config)
    high = net(*batch)
    net, batch = net.cuda(), tuple(t.cuda() for t in batch)
    with torch.autocast("cuda", torch.bfloat16):
        low = net(*batch)
    assert low.mean.dtype == low.kl.dtype == torch.float32
    assert 1e-5 < relative(low.mean.cpu(), high.mean) < 0.02 and relative(low.kl.cpu(), high.kl) < 0.03


# --- it learns


@pytest.mark.parametrize("name", ["paper", "small"])
def test_start_is_the_autoencoder_of_white_noise(name):
    """Untrained, the bound is the entropy of white noise, every layer has its part, and samples are white."""
    config = HvaeConfig.preset(name, 32)
    torch.manual_seed(1)
    net = ConditionalHvae(config)
    noise, condition, pose, draws = inputs(config, 24)
    terms = bound(net, (noise + condition, condition, pose), config.start_sd)
    entropy_here = WHITE_ENTROPY + 0.5 * float(noise.square().mean() - 1)
    assert entropy_here - 0.01 < float(terms.loss) < entropy_here + 0.03
    assert float(terms.kl_per_layer.min()) > 5e-4
    with torch.no_grad():
        made = net.sample(condition, pose, draws) - condition + config.start_sd * normal(*noise.shape, seed=9)
    assert float((power_spectrum(made[:, 0]).mean(0)[1:] - 1).abs().max()) < 0.25
    assert float(made.square().mean()) == pytest.approx(1, abs=0.03)


def test_hadamard_matrices_are_orthonormal_with_a_constant_first_row():
    matrix = hadamard(16)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16))
    assert bool(((matrix[0] - 0.25).abs() < 1e-6).all())


def toy(n: int, box: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Simulated particles in coloured noise, their projections, poses."""
    source = simulate(phantom_map(box, 6.0, 14.0), n, snr_db=-8.0, shift_sd_A=6.0, noise="coloured", seed=5)
    rows = np.arange(n)
    rotation, shift = source.particles.require_poses()
    pose = pose_vector(torch.from_numpy(rotation), torch.from_numpy(shift) / 6.0, box)
    images, signals = (torch.from_numpy(a)[:, None] for a in (source.read(rows), source.signal(rows)))
    return images, signals, pose


def fit(net: ConditionalHvae, data: tuple[Tensor, Tensor, Tensor], steps: int, sd: float, batch: int = 16) -> None:
    """Adam with a linear decay."""
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    draws = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(data[0]), (batch,), generator=draws)
        part = [t[rows] for t in data]
        noise = torch.randn(batch, net.config.latent_size, generator=draws)
        loss = negative_elbo(net(*part, noise), part[0], sd, 1.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def bound(net: ConditionalHvae, data: tuple[Tensor, Tensor, Tensor], sd: float):
    with torch.no_grad():
        noise = normal(len(data[0]), net.config.latent_size, seed=7)
        return negative_elbo(net(*data, noise), data[0], sd, 1.0)


def spectrum_error(net: ConditionalHvae, data: tuple[Tensor, Tensor, Tensor], sd: float) -> np.ndarray:
    """Logarithm of the power of generated over that of true images, shell by shell."""
    images, condition, pose = data
    with torch.no_grad():
        made = net.sample(condition, pose, normal(len(images), net.config.latent_size, seed=8))
    made = made + sd * normal(*images.shape, seed=9)
    return torch.log(power_spectrum(made[:, 0]).mean(0) / power_spectrum(images[:, 0]).mean(0)).numpy()


def test_learns_coloured_noise_in_seconds():
    """On held-out particles the bound falls towards the entropy but not below it, and samples get the spectrum."""
    sd = 0.2
    data = toy(600)
    train, held = tuple(t[:400] for t in data), tuple(t[400:] for t in data)
    torch.manual_seed(4)
    net = ConditionalHvae(replace(HvaeConfig.preset("small", 32), start_sd=sd))
    before, wrong = bound(net, held, sd), spectrum_error(net, held, sd)
    fit(net, train, 120, sd)
    after, error = bound(net, held, sd), spectrum_error(net, held, sd)
    curve = np.log(noise_spectrum(32, "coloured"))
    shells = np.minimum(np.hypot(*np.meshgrid(np.fft.fftfreq(32) * 32, np.fft.fftfreq(32) * 32)), 16)
    entropy = WHITE_ENTROPY + 0.5 * float(np.interp(shells, np.arange(17), curve).mean())
    assert entropy - 0.02 < float(after.loss) < min(entropy + 0.02, float(before.loss) - 0.01)
    assert float((after.kl_per_layer > 1e-3).float().mean()) > 0.8
    beyond_20_A = slice(round(32 * 6.0 / 20), None)
    assert np.abs(error[beyond_20_A]).max() < 0.15 < np.abs(wrong[beyond_20_A]).max()


@pytest.mark.slow
def test_small_preset_generates_the_raw_spectrum_in_a_minute():
    """64 px, 10 % a shell beyond 20 Å; an untrained network is far off."""
    box, sd = 64, 0.1
    source = simulate(phantom_map(box, 3.0, 8.0), 1500, snr_db=-10.0, shift_sd_A=6.0, noise="coloured", seed=3)
    rows = np.arange(1500)
    rotation, shift = source.particles.require_poses()
    pose = pose_vector(torch.from_numpy(rotation), torch.from_numpy(shift) / 3.0, box)
    data = *(torch.from_numpy(a)[:, None] for a in (source.read(rows), source.signal(rows))), pose
    train, held = tuple(t[:1100] for t in data), tuple(t[1100:] for t in data)
    torch.manual_seed(4)
    net = ConditionalHvae(HvaeConfig.preset("small", box))
    beyond_20_A = slice(round(box * 3.0 / 20), None)
    assert np.abs(spectrum_error(net, held, sd)[beyond_20_A]).max() > 0.2
    fit(net, train, 300, sd)
    assert np.abs(spectrum_error(net, held, sd)[beyond_20_A]).max() < 0.1
    assert float((bound(net, held, sd).kl_per_layer > 1e-3).float().mean()) > 0.8


# --- poses


def test_pose_vector_is_the_unit_quaternion_of_scipy_and_the_shift():
    rotation = np.concatenate([random_rotations(np.random.default_rng(1), 200), np.eye(3)[None]])
    rotation = np.concatenate([rotation, Rotation.from_rotvec(np.pi * np.eye(3)).as_matrix()])
    shift = np.random.default_rng(2).normal(0, 3, (len(rotation), 2))
    pose = pose_vector(torch.from_numpy(rotation), torch.from_numpy(shift), 48).numpy()
    expected = Rotation.from_matrix(rotation).as_quat(canonical=True, scalar_first=True)
    assert pose.dtype == np.float32 and np.abs(pose[:, :4] - expected).max() < 1e-6
    assert np.abs(pose[:, 4:] - shift / 48).max() < 1e-6


def test_output_is_a_named_tuple():
    """Data-parallel wrappers find the tensors of tuples only."""
    assert issubclass(HvaeOutput, tuple)
