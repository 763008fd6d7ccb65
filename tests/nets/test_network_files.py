"""Trained networks in files: whatever is wrong with one is named with the file and the weight."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io import checkpoint
from cryoiso.methods.anisotropy import network as networks
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.nets.hvae import ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.nets.unet import Unet3d, UnetConfig

SHAPE = HvaeConfig(16, (1, 1), 16, 8, 2, 4, 16)


def generator(path: Path) -> Path:
    torch.manual_seed(1)
    Generator(
        ConditionalHvae(SHAPE), DensityMap(np.ones((16, 16, 16), np.float32), 8.0), np.ones(1), 0.1, {"half": 1}
    ).save(path)
    return path


def correction(path: Path) -> Path:
    torch.manual_seed(1)
    networks.save(path, Unet3d(UnetConfig((4, 8), 1)), {"label": "both"})
    return path


FILES = {"generator": (generator, Generator.load), "correction": (correction, networks.load)}


def rewritten(path: Path, change) -> None:
    arrays, values = checkpoint.read(path)
    change(arrays, values)
    checkpoint.save(path, arrays, values)
    checkpoint.previous(path).unlink()


def first(arrays: dict) -> str:
    return next(name for name in arrays if name.startswith("parameter ") and arrays[name].ndim > 1)


def put(make):
    def change(arrays, values):
        arrays[first(arrays)] = make(arrays[first(arrays)])

    return change


def with_nan(values: np.ndarray) -> np.ndarray:
    made = values.copy()
    made.flat[3] = np.nan
    return made


WEIGHTS = {
    "missing": (lambda a, v: a.pop(first(a)), "1 of the network's weights are missing (expected {name})"),
    "more": (lambda a, v: a.update({"parameter x": np.zeros(3)}), "does not have (found x)"),
    "shape": (put(lambda w: w[:-1]), "the weight '{name}' has another shape than the network's (expected ("),
    "flat": (put(lambda w: w.reshape(-1)), "the weight '{name}' has another shape"),
    "nan": (put(with_nan), "the weight '{name}' has values that are not numbers (expected finite values, found 1 of"),
    "type": (
        put(lambda w: w.astype(np.float64)),
        "the weight '{name}' has another type (expected float32, found float",
    ),
    "text": (put(lambda w: w.astype(str)), "the weight '{name}' has another type"),
    "no config": (lambda a, v: v.pop("config"), "is damaged"),
    "config": (lambda a, v: v.update(config={"widths": ["x"], "box_px": "x"}), "the shape of the network is damaged"),
    "a list": (lambda a, v: v.update(config=[1]), "the shape of the network is damaged"),
    "kind": (lambda a, v: v.update(kind="else"), "not a trained"),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("how", WEIGHTS)
def test_wrong_weights_are_named(tmp_path, what, how):
    make, load = FILES[what]
    path, (change, words) = make(tmp_path / "network.npz"), WEIGHTS[how]
    name = first(checkpoint.read(path)[0]).removeprefix("parameter ")
    load(path)
    rewritten(path, change)
    with raises_code("network-file-damaged", InputError, match=re.escape(words.format(name=name))) as error:
        load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("how, words", [
    (lambda a, v: a.pop("reference"), "damaged: reference"), (lambda a, v: a.pop("scale"), "damaged: scale"),
    (lambda a, v: a.update(reference=a["reference"][:8]), "damaged: reference"),
    (lambda a, v: a.update(scale=np.array([np.nan])), "values that are not numbers"),
    (lambda a, v: v.update(pixel_size_A=-1), "pixel_size_A"), (lambda a, v: v.update(likelihood_sd="x"), "likelihood"),
    (lambda a, v: v.pop("facts"), "facts"),
])  # fmt: skip
def test_what_a_generator_needs_beside_weights(tmp_path, how, words):
    rewritten(generator(tmp_path / "g.npz"), how)
    with pytest.raises(InputError, match=words):
        Generator.load(tmp_path / "g.npz")


@pytest.mark.parametrize("found", [1, 3, None])
def test_a_generator_of_another_network_format_is_refused(tmp_path, found):
    """Its weights have the right names and shapes, and would be taken for those of another network without a word."""
    path = generator(tmp_path / "g.npz")
    rewritten(path, lambda a, v: v.pop("network_format") if found is None else v.update(network_format=found))
    with pytest.raises(InputError, match=rf"another version.*network format 2, found {found or 1}") as error:
        Generator.load(path)
    assert "Train the generator again" in str(error.value)


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_says_so(tmp_path, what):
    """120 random damages: the file is refused by name, or has the same weights as before."""
    make, load = FILES[what]
    path, rng = make(tmp_path / "network.npz"), np.random.default_rng(0)
    whole, arrays = path.read_bytes(), checkpoint.read(path)[0]
    for trial in range(120):
        data = bytearray(whole)
        start = (0, len(data) - 1500, int(rng.integers(len(data))))[trial % 3]
        for _ in range(6):
            data[min(start + int(rng.integers(0, 1500)), len(data) - 1)] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            load(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert all(np.array_equal(arrays[name], values) for name, values in checkpoint.read(path)[0].items())
    for text in (b"", b"PK\x05\x06", whole[: len(whole) // 2]):
        path.write_bytes(text)
        with pytest.raises(InputError, match="damaged"):
            load(path)


def test_a_network_to_begin_with_is_looked_at_too(tmp_path):
    path = correction(tmp_path / "network.npz")
    assert set(networks.matching_weights(path, UnetConfig((4, 8), 1))) == set(
        Unet3d(UnetConfig((4, 8), 1)).state_dict()
    )
    rewritten(path, put(with_nan))
    with raises_code("network-file-damaged", InputError, match="not numbers"):
        networks.matching_weights(path, UnetConfig((4, 8), 1))
