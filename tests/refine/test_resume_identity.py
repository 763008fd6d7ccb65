"""A refinement is resumed with what it was begun with, in whatever order the rows come; anything else is refused."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import StopsAt

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.identity import differences, of_images, of_particles
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.engines.native import NativeEngine
from cryoiso.io import checkpoint
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.search import Level

BOX, PIXEL_A = 24, 7.0


@pytest.fixture(scope="module")
def images() -> ArraySource:
    """80 images of the C3 phantom, uids in no order."""
    simulated = simulate(phantom_map(BOX, PIXEL_A, 16.0), 80, snr_db=0.0, shift_sd_A=5.0, seed=4)
    held = ArraySource(simulated.read(np.arange(80)), simulated.particles)
    held.truth = simulated.volume
    return held


def taken(source: ArraySource, rows: np.ndarray) -> ArraySource:
    return ArraySource(source.read(rows), source.particles.take(rows))


def request_for(source, folder: Path, truth: DensityMap, **changes) -> RefineRequest:
    settings = RefineSection(**{"healpix_order": 1, "max_iterations": 2, **changes.pop("settings", {})})
    plain = RefineRequest(
        source, truth, "C3", folder, settings, seed=1, diameter_A=140.0, lowpass_A=40.0, resume=True
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def begun(images, tmp_path_factory) -> Path:
    """Folder of a refinement after two iterations."""
    folder = tmp_path_factory.mktemp("begun")
    NativeEngine().refine(request_for(images, folder, images.truth, resume=False), Context())
    return folder


def copied(folder: Path, target: Path) -> Path:
    for file in folder.rglob("*.npz"):
        (target / "checkpoint").mkdir(exist_ok=True)
        (target / "checkpoint" / file.name).write_bytes(file.read_bytes())
    return target


def test_rows_in_another_order_keep_their_poses(images, begun, tmp_path):
    """By uid the poses are those of the refinement in the first order, and right."""
    order = np.random.default_rng(7).permutation(80)
    source = taken(images, order)
    request = request_for(source, copied(begun, tmp_path), images.truth, settings={"max_iterations": 3})
    result = NativeEngine().refine(request, Context())
    assert [record["iteration"] for record in result.iterations] == [1, 2, 3]
    np.testing.assert_array_equal(result.particles.uid, images.particles.uid[order])
    true = source.particles
    errors = pose_errors(
        result.particles.rotation, true.rotation, "C3", align="axis", shift_estimated_A=result.particles.shift_A,
        shift_true_A=true.shift_A,
    )  # fmt: skip
    assert errors.median_deg < 7 and errors.median_shift_A < 2  # mixed up: 80 degrees and 6 Å
    (tmp_path / "straight").mkdir()
    straight = NativeEngine().refine(
        request_for(images, copied(begun, tmp_path / "straight"), images.truth, settings={"max_iterations": 3}),
        Context(),
    )
    apart = angular_distance_deg(
        straight.particles.rotation[order], result.particles.rotation, point_group("C3")
    )  # fmt: skip
    assert np.quantile(apart, 0.95) < 0.1
    # and without an iteration of its own the result is that of the checkpoint, row by row
    finished = replace(request, folder=tmp_path / "straight", source=source)
    again = NativeEngine().refine(finished, Context())
    np.testing.assert_array_equal(again.particles.rotation, straight.particles.rotation[order])
    np.testing.assert_array_equal(again.particles.shift_A, straight.particles.shift_A[order])
    for name, values in straight.particles.results.items():
        np.testing.assert_array_equal(again.particles.results[name], values[order])


def test_more_iterations_are_those_of_a_refinement_with_more(images, begun, tmp_path):
    """Ended by max_iterations and resumed with more: the same bits as in one go."""
    (tmp_path / "one").mkdir()
    more = {"max_iterations": 3}
    one = request_for(images, tmp_path / "one", images.truth, settings=more, resume=False)
    (tmp_path / "two").mkdir()
    two = request_for(images, copied(begun, tmp_path / "two"), images.truth, settings=more)
    results = [NativeEngine().refine(request, Context()) for request in (one, two)]
    np.testing.assert_array_equal(results[0].particles.rotation, results[1].particles.rotation)
    assert (tmp_path / "one/half1.mrc").read_bytes() == (tmp_path / "two/half1.mrc").read_bytes()


def other(images, what: str) -> tuple[dict, str]:
    """What is changed, and what the refusal must name."""
    p, truth = images.particles, images.truth
    cube = np.zeros((BOX, BOX, BOX), np.float32)
    cube[6:18, 6:18, 6:18] = 1
    pixels = images.read(np.arange(80))
    groups = tuple(replace(g, voltage_kV=200.0) for g in p.groups)
    changes = {
        "fewer": ({"source": taken(images, np.arange(79))}, "particles: number was 80, is 79"),
        "others": ({"source": ArraySource(pixels, replace(p, uid=p.uid + np.uint64(1)))}, "particles: uids differ"),
        "halves": ({"source": ArraySource(pixels, replace(p, half=3 - p.half))}, "particles: half-sets differ"),
        "offsets": ({"source": ArraySource(pixels, replace(p, shift_A=p.shift_A + 4))}, "particles: offsets differ"),
        "defocus": ({"source": ArraySource(pixels, replace(p, defocus_u_A=p.defocus_u_A + 500))}, "CTF differs"),
        "voltage": ({"source": ArraySource(pixels, replace(p, groups=groups))}, "particles: optics groups differ"),
        "images": ({"source": ArraySource(-pixels, p)}, "images differ"),
        "symmetry": ({"symmetry": "C1"}, "symmetry was C3, is C1"),
        "reference": ({"reference": replace(truth, data=np.roll(truth.data, 2, 0))}, "reference: density differs"),
        "mask": ({"mask": DensityMap(cube, PIXEL_A)}, "mask was none, is given"),
        "halves' references": ({"half_references": {1: truth, 2: truth}}, "half references was none, is given"),
        "seed": ({"seed": 2}, "seed was 1, is 2"),
        "low-pass": ({"lowpass_A": 30.0}, "lowpass_A was 40.0, is 30.0"),
        "local": ({"local_deg": 10.0}, "local_deg was None, is 10.0"),
        "settings": ({"settings": {"healpix_order": 2}}, "settings: healpix_order was 1, is 2"),
    }
    return changes[what]


NAMES = (
    "fewer", "others", "halves", "defocus", "voltage", "images", "symmetry", "reference", "mask", "halves' references",
    "seed", "low-pass", "local", "settings", "offsets",
)  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_anything_else_is_refused_and_named(images, begun, tmp_path, what):
    changes, words = other(images, what)
    folder = copied(begun, tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    source = changes.pop("source", images)
    with raises_code("checkpoint-of-another-run", InputError) as error:
        NativeEngine().refine(request_for(source, folder, images.truth, **changes), Context())
    assert words in str(error.value) and "state.npz" in str(error.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_checkpoint_that_names_nothing_is_refused(images, begun, tmp_path):
    """As an earlier version wrote it."""
    folder = copied(begun, tmp_path)
    file = folder / "checkpoint/state.npz"
    arrays, values = checkpoint.read(file)
    del values["identity"]
    old = {"meta": np.frombuffer(json.dumps({"format": 1, **values}).encode(), np.uint8), **arrays}
    np.savez(file, **old)
    with raises_code("checkpoint-not-continuable", InputError):
        NativeEngine().refine(request_for(images, folder, images.truth), Context())


def test_a_new_refinement_forgets_the_checkpoint_of_another(images, begun, tmp_path):
    """Begun anew with another symmetry and stopped at once, it is resumed as itself."""
    folder = copied(begun, tmp_path)

    class Stop(Context):
        def stop_requested(self) -> bool:
            return True

    request = request_for(images, folder, images.truth, symmetry="C1")
    with pytest.raises(Exception, match="stopped by a signal"):
        NativeEngine().refine(replace(request, resume=False), Stop())
    assert not list(folder.rglob("*.npz"))
    assert NativeEngine().refine(request, Context()).iterations[0]["iteration"] == 1


def test_the_identity_of_particles_is_that_of_a_set():
    """The same for every order of the rows, unless the order matters; half-sets and images go with their uid."""
    source = simulate(phantom_map(BOX, PIXEL_A, 16.0), 30, seed=2)
    rows = np.random.default_rng(1).permutation(30)
    mixed = taken(source, rows)
    one, two = (of_particles(s.particles, poses=True) for s in (source, mixed))
    # sketches are compared, not their digits: one image simulated alone has other last bits than in a batch
    one, two = ({**i, "images": of_images(s)} for i, s in ((one, source), (two, mixed)))
    assert not list(differences(one, two))
    swapped = source.particles.take(np.arange(30))
    swapped = replace(swapped, uid=source.particles.uid[rows])
    assert "poses differ" in list(differences(one, of_particles(swapped, poses=True)))
    ordered = [of_particles(s.particles, ordered=True) for s in (source, mixed)]
    assert list(differences(*ordered)) == ["row order differs"]


# --- damage


ARRAYS = {"x": np.arange(600, dtype=np.float32).reshape(20, 30), "n": np.array(5), "name": np.array(["a", "bc"])}


def two_generations(folder: Path) -> Path:
    file = folder / "state.npz"
    for number in (1, 2):
        checkpoint.save(file, {**ARRAYS, "x": ARRAYS["x"] * number}, {"n": number, "history": [{"a": 1.5, "b": None}]})
    return file


def test_damage_in_any_place_is_found(tmp_path):
    """Six bytes changed in 300 random places: the generation before it, or, where nothing was lost, the same."""
    file = two_generations(tmp_path)
    whole, rng, fallen = file.read_bytes(), np.random.default_rng(0), 0
    for trial in range(300):
        data = bytearray(whole)
        places = (rng.integers(len(data)), rng.integers(0, 400), rng.integers(len(data) - 600, len(data)))
        for _ in range(6):
            data[min(places[trial % 3] + rng.integers(0, 50), len(data) - 1)] = rng.integers(256)
        file.write_bytes(bytes(data))
        arrays, values = checkpoint.load(file)
        fallen += values["n"] == 1
        np.testing.assert_array_equal(arrays["x"], ARRAYS["x"] * values["n"])
        assert values["history"] == [{"a": 1.5, "b": None}] and list(arrays["name"]) == ["a", "bc"]
        assert arrays["n"].shape == () and arrays["n"] == 5
    assert fallen > 250


def rewritten(file: Path, meta: bytes | None, compression: int = zipfile.ZIP_STORED, **arrays: np.ndarray) -> None:
    import io

    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in {**({} if meta is None else {"meta": np.frombuffer(meta, np.uint8)}), **arrays}.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array)
            archive.writestr(f"{name}.npy", stream.getvalue())


@pytest.mark.parametrize("meta", [
    None, b"", b"[1, 2]", b"3", b"null", b"[" * 100_000, b"9" * 5000, b'{"format": 2}', b'{"format": "x"}', b"{}",
    b'{"format": 2, "digest": 5}', b'{"format": null}', b"\xff\xfe",
])  # fmt: skip
def test_a_description_that_is_none(meta, tmp_path):
    file = two_generations(tmp_path)
    rewritten(file, meta, x=np.zeros(3))
    assert checkpoint.load(file)[1]["n"] == 1


def test_what_unpacks_to_more_and_what_is_of_a_later_version(tmp_path):
    file = two_generations(tmp_path)
    rewritten(file, b'{"format": 1}', zipfile.ZIP_DEFLATED, x=np.zeros(10**6))
    assert checkpoint.load(file)[1]["n"] == 1
    rewritten(file, b'{"format": 3}')
    with raises_code("version-mismatch", InputError, match="a later version of the program wrote this file"):
        checkpoint.load(file)
    checkpoint.remove(file)
    assert checkpoint.load(file) is None


def test_searches_of_other_particles_are_not_taken(images, tmp_path):
    """Stopped in the first iteration, which leaves no checkpoint but its searches: with another defocus they are made
    again, and the result has the bits of a refinement of these particles."""
    p = images.particles
    other = ArraySource(images.read(np.arange(80)), replace(p, defocus_u_A=p.defocus_u_A + 3000))
    results = {}
    for name, asked in (("straight", None), ("resumed", 0)):
        folder = tmp_path / name
        folder.mkdir()
        if asked is not None:
            begun = request_for(images, folder, images.truth, resume=False)
            while not list(folder.glob("checkpoint/searched-*")):
                with pytest.raises(Interrupted):
                    NativeEngine().refine(begun, StopsAt(asked := asked + 1))
            assert list(folder.glob("checkpoint/searched-*")) and not list(folder.rglob("*.npz"))
        results[name] = NativeEngine().refine(request_for(other, folder, images.truth), Context())
    np.testing.assert_array_equal(*(result.particles.rotation for result in results.values()))
    assert (tmp_path / "straight/half1.mrc").read_bytes() == (tmp_path / "resumed/half1.mrc").read_bytes()


def test_searches_of_earlier_versions_keep_their_digest():
    """The text of a level is part of it, and was first written when candidates were called a beam."""
    level = Level(cell_deg=1.5, spacing_px=0.25, radius_px=7, max_candidates=16, threshold=3.0)
    assert repr(level) == "Level(cell_deg=1.5, spacing_px=0.25, radius_px=7, beam=16, threshold=3.0)"
