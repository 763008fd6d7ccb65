"""The network and what surrounds it: laws that hold whatever it has learnt, ranks, and what it must not do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from mpi_helper import run_mpi

from cryoiso.core.config import CorrectSection
from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map, write_map
from cryoiso.methods.anisotropy.correct import correct_halves
from cryoiso.methods.anisotropy.filter import checked, filtered, friedel_mate, missing_cone, on_grid, radii
from cryoiso.methods.anisotropy.predict import predict
from cryoiso.methods.anisotropy.settings import resolve
from cryoiso.methods.anisotropy.submaps import SubMaps, axis_rotations, turned
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.nets.unet import Unet3d, UnetConfig
from cryoiso.parallel.context import Context
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.so3 import random_rotations

RNG = np.random.default_rng(11)
TINY = CorrectSection(cube_px=16, sub_maps=8, batch=2, epochs=2)
ONE = TrainingGroup([0], 0, "cpu")


def network(seed: int = 0, trained: bool = True) -> Unet3d:
    """A small network; trained: its last layer is no longer zero."""
    torch.manual_seed(seed)
    net = Unet3d(UnetConfig((4, 8, 8), 1))
    if trained:
        torch.nn.init.normal_(net.last.weight, std=0.05)
    return net


def test_a_new_network_is_the_identity_and_any_network_is_homogeneous():
    x = torch.from_numpy(RNG.normal(size=(2, 1, 16, 16, 16)).astype(np.float32))
    assert torch.equal(network(trained=False)(x), x)
    net = network()
    y = net(x)
    assert float((y - x).detach().abs().max()) > 0.01
    torch.testing.assert_close(net(8 * x), 8 * y)
    assert not net(torch.zeros_like(x)).any()


def test_the_published_size():
    """24 million parameters (spIsoNet's with its two convolutions at the bottom has 23.8 million)."""
    count = sum(p.numel() for p in Unet3d(UnetConfig()).parameters())
    assert count == pytest.approx(23.76e6, rel=0.15)


@pytest.mark.parametrize("box", [24, 25, 40])
def test_tiles_show_no_seams(box):
    data = RNG.normal(size=(box,) * 3).astype(np.float32)
    assert np.array_equal(predict(network(trained=False), data, 24, ONE, False), data)

    class Local(Unet3d):
        """Changes every voxel by itself: tiles must not be seen in what it gives."""

        def change(self, x):
            return 0.5 * x

    np.testing.assert_allclose(predict(Local(UnetConfig((4, 8), 1)), data, 16, ONE, False), 1.5 * data, atol=1e-5)


@pytest.mark.parametrize("box", [32, 33])
def test_a_filter_is_centred_symmetric_and_keeps_its_shape_in_another_box(box):
    cone = missing_cone(box, 40.0)
    np.testing.assert_array_equal(cone, friedel_mate(cone))
    assert cone[(box // 2,) * 3] == 1
    for other in (16, 17, 48):
        small = on_grid(cone, other)
        assert small.min() >= -1e-6 and small.max() <= 1 + 1e-6
        np.testing.assert_allclose(small, friedel_mate(small), atol=1e-5)
        r = radii(other)
        axis, across = small[other // 2 + 5, other // 2, other // 2], small[other // 2, other // 2, other // 2 + 5]
        assert axis < 0.35 < 0.8 < across and r[other // 2 + 5, other // 2, other // 2] == 5
    shifted = np.roll(cone, 1, 0)
    with raises_code("filter-invalid", InputError):
        checked(shifted, box)


def test_a_missing_cone_is_exactly_that_cone():
    cone = missing_cone(48, 30.0, (1.0, 0.0, 0.0))
    k = np.indices((48,) * 3) - 24
    r = np.linalg.norm(k, axis=0)
    angle = np.degrees(np.arccos(np.abs(k[2]) / np.maximum(r, 1e-9)))
    far = (r > 12) & (r < 23)
    assert cone[far & (angle < 25)].max() == 0 and cone[far & (angle > 35)].min() == 1


def test_turning_turns():
    """A quarter turn moves voxels, a turn and its inverse give the inside back, and the 24 axis turns are 24."""
    cube = torch.zeros(1, 1, 17, 17, 17)
    cube[0, 0, 8, 8, 12] = 1  # on +x
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])  # x -> y
    assert turned(cube, quarter)[0, 0, 8, 12, 8] == pytest.approx(1, abs=1e-5)
    smooth = torch.from_numpy(np.asarray(phantom_map(24, 8.0, 20.0).data, np.float32))[None, None]
    turn = torch.from_numpy(random_rotations(RNG, 1).astype(np.float32))
    back = turned(turned(smooth, turn), turn.transpose(1, 2))
    inside = torch.from_numpy(radii(24) < 9)
    assert float(torch.corrcoef(torch.stack([back[0, 0][inside], smooth[0, 0][inside]]))[0, 1]) > 0.97
    assert len({tuple(np.rint(m).astype(int).ravel()) for m in axis_rotations()}) == 24


def test_sub_maps_are_a_function_of_seed_and_number():
    inside = radii(32) < 8
    one, two = SubMaps(inside, 16, 3, "1", "so3"), SubMaps(inside, 16, 3, "2", "so3")
    again = SubMaps(inside, 16, 3, "1", "so3")
    draws = [one.draw(i) for i in range(20)]
    for i in (19, 3):
        for a, b in zip(again.draw(i), draws[i], strict=True):
            np.testing.assert_array_equal(a, b)
    assert len({tuple(d[0]) for d in draws}) > 10 and not np.array_equal(two.draw(0)[1], draws[0][1])
    assert all((d[0] >= 0).all() and (d[0] <= 16).all() for d in draws)


def corrected(halves: dict[int, np.ndarray], transfer: np.ndarray, folder: Path, section: CorrectSection):
    maps = {h: DensityMap(data, 8.0) for h, data in halves.items()}
    return correct_halves(maps, transfer, None, resolve(section, "cpu"), Context(), folder, seed=4)


def test_noise_stays_noise(tmp_path):
    """Independently corrected halves of pure noise agree by chance only: every shell within 4 standard deviations."""
    halves = {h: RNG.normal(size=(24,) * 3).astype(np.float32) for h in (1, 2)}
    transfer = missing_cone(24, 40.0) * 0.5
    section = TINY.model_copy(update={"mode": "independent", "epochs": 10})
    made = corrected(halves, transfer, tmp_path, section).maps
    curve = fsc(made[1], made[2])[2:]
    voxels = np.bincount(np.rint(radii(24)).astype(int).ravel())[2 : 2 + len(curve)] / 2
    assert np.abs(curve * np.sqrt(voxels)).max() < 4


def test_an_isotropic_map_is_left_alone(tmp_path):
    data = np.asarray(phantom_map(24, 8.0, 18.0).data, np.float32)
    found = corrected({1: data, 2: data.copy()}, np.full((24,) * 3, 0.97, np.float32), tmp_path, TINY)
    for half in (1, 2):
        assert np.corrcoef(found.maps[half].ravel(), data.ravel())[0, 1] > 0.99


def test_training_lowers_the_loss_and_fills_the_cone(tmp_path):
    whole = np.asarray(phantom_map(24, 8.0, 18.0).data, np.float32)
    cone = missing_cone(24, 35.0)
    data = filtered(whole, cone)
    section = TINY.model_copy(update={"epochs": 25, "learning_rate": 2e-3})
    found = corrected({1: data, 2: data.copy()}, cone, tmp_path, section)
    loss = [r["loss"] for r in found.history["both"]]
    assert np.mean(loss[-5:]) < 0.95 * np.mean(loss[:5])
    power = [np.abs(np.fft.fftshift(np.fft.fftn(m))[cone < 0.01]) ** 2 for m in (data, found.maps[1])]
    assert power[1].sum() > 10 * power[0].sum()


RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_anisotropy as t
from cryoiso.parallel.context import get_context
t.loss_curve(Path(sys.argv[2]), get_context(), sys.argv[3])
"""


def loss_curve(folder: Path, comm, method: str) -> None:
    """Fifty steps of the paired mode; the first rank writes the losses."""
    rng = np.random.default_rng(5)
    data = np.asarray(phantom_map(24, 8.0, 18.0).data, np.float32)
    halves = {
        h: DensityMap(data + 0.3 * data.std() * rng.normal(size=data.shape).astype(np.float32), 8.0) for h in (1, 2)
    }
    section = TINY.model_copy(update={"sub_maps": 20, "epochs": 5, "method": method})
    if comm.rank == 0:
        folder.mkdir()
    comm.barrier()
    found = correct_halves(halves, missing_cone(24, 35.0), None, resolve(section, "cpu"), comm, folder, seed=4)
    if comm.rank == 0:
        losses = [r["loss"] for r in found.history["both"]]
        (folder / "loss.json").write_text(json.dumps(losses))
        write_map(folder / "made.mrc", found.maps[1], 8.0)


@pytest.mark.mpi
@pytest.mark.parametrize("method", ["completion", "published"])
def test_two_ranks_train_as_one(tmp_path, method):
    """The same loss at each of 50 steps, bit by bit, and the same maps."""
    loss_curve(tmp_path / "1", Context(), method)
    run_mpi(2, ["-c", RANKS, str(Path(__file__).parent), tmp_path / "2", method])
    one, two = (np.array(json.loads((tmp_path / n / "loss.json").read_text())) for n in "12")
    assert len(one) == 50
    np.testing.assert_array_equal(two, one)
    assert np.ptp(one) > 0.05 * one.mean()
    maps = [read_map(tmp_path / n / "made.mrc").data for n in "12"]
    assert np.abs(maps[1] - maps[0]).max() < 1e-6 * np.abs(maps[0]).max()
