"""Ingest: the right images in the right rows, the same bytes on any number of ranks."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import ingest as ing
from cryoiso.io.atomic import DiskFullError, atomic_write
from cryoiso.io.contrast_sign import decide_sign
from cryoiso.io.imageprep import IngestSettings, background_mask, fit_box, normalise
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import CHUNK_IMAGES, ShardSource
from cryoiso.io.sources import ArraySource, StackSource
from cryoiso.io.star.read import read_particles, write_particles

BOX = 16


def blobs(n: int, box: int = BOX, seed: int = 0) -> np.ndarray:
    """White blobs on noise with an offset and a scale that differ from image to image."""
    rng = np.random.default_rng(seed)
    axis = np.arange(box) - box // 2
    blob = 3 * np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (0.15 * box) ** 2)
    noise = rng.normal(size=(n, box, box))
    return ((noise + blob) * rng.uniform(1, 20, (n, 1, 1)) + rng.normal(0, 50, (n, 1, 1))).astype(np.float32)


def make_set(
    folder: Path, images: dict[str, np.ndarray], rows: list[tuple[str, int, int]], pixels=(1.5, 3.0), boxes=None
) -> Path:
    """Stacks and a STAR file. rows: (stack, index from 0, optics group from 0)."""
    for name, block in images.items():
        with write_stack(folder / name, block.shape[-1], 1.0) as stack:
            stack.append(block)
    boxes = boxes or (BOX, BOX)
    n = len(rows)
    particles = Particles(
        uid=np.arange(n, dtype=np.uint64) + np.uint64(1000),
        optics=np.array([r[2] for r in rows], np.int32),
        groups=tuple(OpticsGroup(k + 1, f"g{k}", pixels[k], boxes[k], 300.0, 2.7, 0.1) for k in range(2)),
        stack=np.array([str(folder / r[0]) for r in rows]),
        index=np.array([r[1] for r in rows]),
        defocus_u_A=np.linspace(1e4, 2e4, n),
        defocus_v_A=np.linspace(1e4, 2e4, n),
        defocus_angle_deg=np.zeros(n),
        phase_shift_deg=np.zeros(n),
        ctf_bfactor_A2=np.zeros(n),
        ctf_scale=np.ones(n),
        half=(np.arange(n) % 2 + 1).astype(np.int8),
    )
    write_particles(folder / "p.star", particles)
    return folder / "p.star"


def simple_set(folder: Path, n: int = 600) -> tuple[Path, np.ndarray]:
    """Two stacks, rows of them interleaved and in no order."""
    images = blobs(n)
    half = n // 2
    order = np.random.default_rng(1).permutation(n)
    rows = [("a.mrcs", int(k), 0) if k < half else ("b.mrcs", int(k - half), 1) for k in order]
    return make_set(folder, {"a.mrcs": images[:half], "b.mrcs": images[half:]}, rows), images[order]


def settings(**changes) -> IngestSettings:
    return IngestSettings(**{"invert": "no", "shard_mib": 1, **changes})


def by_hand(images: np.ndarray) -> np.ndarray:
    axis = np.arange(images.shape[-1]) - images.shape[-1] // 2
    background = np.hypot(axis[:, None], axis[None]) > 0.45 * images.shape[-1]
    return np.stack([(i - i[background].mean(dtype=float)) / i[background].std(dtype=float) for i in images])


def fingerprints(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 2e-3), ("float32", 2e-6)])
def test_every_image_lies_in_its_row(tmp_path, storage, tolerance):
    star, images = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings(storage=storage))
    source = ShardSource(tmp_path / "shards")
    assert isinstance(source, ImageSource) and len(source) == 600 and source.box_px == BOX
    expected = by_hand(images)
    scale = np.abs(expected).max()
    everything = source.read(np.arange(600))
    assert everything.dtype == np.float32
    assert np.abs(everything - expected).max() < tolerance * scale
    rows = np.array([599, 3, 4, 5, 0, 250, 3])
    np.testing.assert_array_equal(source.read(rows), everything[rows])
    mask = np.random.default_rng(2).random(600) < 0.3
    np.testing.assert_array_equal(source.read(mask), everything[mask])
    assert source.read(np.array([], int)).shape == (0, BOX, BOX)


def test_metadata_of_shards_is_that_of_the_star_file(tmp_path):
    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings())
    p, q = ShardSource(tmp_path / "shards").particles, read_particles(star)
    for name in ("uid", "optics", "index", "defocus_u_A", "ctf_scale", "half", "stack"):
        np.testing.assert_array_equal(getattr(p, name), getattr(q, name))
    assert p.groups == q.groups
    np.testing.assert_array_equal(p.group_values("pixel_size_A"), q.group_values("pixel_size_A"))


def many_shards(monkeypatch) -> None:
    monkeypatch.setattr(ing, "_images_per_shard", lambda box, s: 150)


def test_chunks_are_fixed_and_stay_within_shards(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings())
    source = ShardSource(tmp_path / "shards")
    assert [s["stop"] for s in source.index["shards"]] == [150, 300, 450, 600]
    assert source.chunks[:3] == [(0, 128), (128, 150), (150, 278)]
    assert sum(b - a for a, b in source.chunks) == 600 and max(b - a for a, b in source.chunks) <= CHUNK_IMAGES
    np.testing.assert_array_equal(
        source.read(np.arange(100, 500)), np.concatenate([source.read([k]) for k in range(100, 500)])
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, monkeypatch, size):
    many_shards(monkeypatch)
    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "one", settings())
    for rank in reversed(range(size)):
        ing.ingest(star, tmp_path / "many", settings(), rank, size)
    assert not (tmp_path / "many/index.json").exists(), "the index comes last"
    ing.finish_index(ing.plan(read_particles(star), settings(), star), tmp_path / "many")
    assert fingerprints(tmp_path / "many") == fingerprints(tmp_path / "one")
    assert len(fingerprints(tmp_path / "one")) == 5


def test_a_rerun_writes_only_what_is_missing_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings())
    before = fingerprints(tmp_path / "shards")
    (tmp_path / "shards/shard-00002.h5").unlink()
    (tmp_path / "shards/index.json").unlink()
    (tmp_path / "shards/shard-00009.h5.part").write_text("left behind by a killed process")
    written = []
    original = ing.write_shard_file
    monkeypatch.setattr(ing, "write_shard_file", lambda path, *a: (written.append(path.name), original(path, *a)))
    ing.ingest(star, tmp_path / "shards", settings())
    assert written == ["shard-00002.h5"]
    assert fingerprints(tmp_path / "shards") == before
    ing.ingest(star, tmp_path / "shards", settings(ramp=True))
    assert len(written) == 5, "other settings: everything anew"


def test_new_images_under_an_old_name_are_noticed(tmp_path):
    star, _ = simple_set(tmp_path, 20)
    ing.ingest(star, tmp_path / "shards", settings())
    first = ShardSource(tmp_path / "shards").read([0])
    with write_stack(tmp_path / "a.mrcs", BOX, 1.0) as stack:
        stack.append(blobs(10, seed=5))
    with write_stack(tmp_path / "b.mrcs", BOX, 1.0) as stack:
        stack.append(blobs(10, seed=6))
    later = os.stat(tmp_path / "shards/shard-00000.h5").st_mtime + 5
    os.utime(tmp_path / "a.mrcs", (later, later))
    ing.ingest(star, tmp_path / "shards", settings())
    assert np.abs(ShardSource(tmp_path / "shards").read([0]) - first).max() > 0.1


def test_shard_files_say_what_they_hold(tmp_path):
    import h5py

    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings())
    with h5py.File(tmp_path / "shards/shard-00000.h5") as file:
        assert file["images"].dtype == np.float16 and file["images"].compression is None
        assert file.attrs["format"] == "cryoiso-shard" and file.attrs["version"] == 1 and file.attrs["box_px"] == BOX
        np.testing.assert_array_equal(file.attrs["pixel_size_A"], [1.5, 3.0])
        assert "0.9 x box" in file.attrs["normalisation"]
        assert file.attrs["source_sha256"] == hashlib.sha256(star.read_bytes()).hexdigest()
    chunk = ing.hdf5_chunk(128, "float16")
    assert 2**20 * 0.9 < chunk * 128 * 128 * 2 <= 2**20


def test_reading_the_stacks_in_place_gives_the_same_images(tmp_path):
    star, _ = simple_set(tmp_path)
    ing.ingest(star, tmp_path / "shards", settings(storage="float32"))
    rows = np.random.default_rng(3).permutation(600)[:77]
    direct = StackSource(read_particles(star), settings())
    np.testing.assert_array_equal(direct.read(rows), ShardSource(tmp_path / "shards").read(rows))
    direct.close()


def test_real_stacks_in_both_dialects_give_the_same_shards(shared, tmp_path):
    folder = shared / "data/particles/aspire_sample17"
    images = []
    for version in ("30", "31"):
        ing.ingest(folder / f"sample_particles_relion{version}.star", tmp_path / version, settings(storage="float32"))
        images.append(ShardSource(tmp_path / version).read(np.arange(17)))
    np.testing.assert_array_equal(*images)
    background = images[0][:, background_mask(200, 0.9)]
    assert np.abs(background.mean(1)).max() < 1e-5 and np.abs(background.std(1) - 1).max() < 1e-5


def test_the_ramp_goes_if_asked(tmp_path):
    axis = np.arange(BOX) / 4
    images = blobs(5) + 30 * axis[None, :, None] - 17 * axis[None, None, :]
    flat, _ = normalise(blobs(5), ramp=True)
    np.testing.assert_allclose(normalise(images.astype(np.float32), ramp=True)[0], flat, atol=2e-4)


def test_noise_free_images_keep_their_scale():
    images = np.zeros((2, BOX, BOX), np.float32)
    images[:, 8, 8] = [3, 5]
    out, empty = normalise(images + 7)
    assert empty.all() and (out[:, 8, 8] == [3, 5]).all() and (out[:, 0, 0] == 0).all()


@pytest.mark.parametrize(("small", "large"), [(8, 12), (7, 12), (8, 13), (7, 13)])
def test_cropping_and_padding_keep_the_centre(small, large):
    image = np.zeros((1, small, small), np.float32)
    image[0, small // 2, small // 2] = 1
    padded = fit_box(image, large)
    assert padded[0, large // 2, large // 2] == 1 and padded.sum() == 1
    np.testing.assert_array_equal(fit_box(padded, small), image)


def test_groups_with_other_boxes_come_to_the_first_and_keep_their_pixel_size(tmp_path):
    rows = [("a.mrcs", 0, 0), ("b.mrcs", 0, 1), ("a.mrcs", 1, 0), ("b.mrcs", 1, 1)]
    star = make_set(tmp_path, {"a.mrcs": blobs(2), "b.mrcs": blobs(2, 24)}, rows, boxes=(BOX, 24))
    ing.ingest(star, tmp_path / "shards", settings(storage="float32"))
    source = ShardSource(tmp_path / "shards")
    assert source.box_px == BOX
    np.testing.assert_allclose(source.read([1, 3]), by_hand(blobs(2, 24))[:, 4:20, 4:20], atol=1e-5)
    np.testing.assert_array_equal(source.particles.group_values("pixel_size_A"), [1.5, 3.0, 1.5, 3.0])


@pytest.mark.parametrize("factor", [1, -1])
def test_the_sign_is_found_from_the_images(tmp_path, factor):
    images = factor * blobs(60)
    star = make_set(tmp_path, {"a.mrcs": images}, [("a.mrcs", k, 0) for k in range(60)])
    ing.ingest(star, tmp_path / "shards", settings(invert="auto"))
    source = ShardSource(tmp_path / "shards")
    assert source.index["inverted"] == (factor < 0) and source.index["sign"] == "decided by the data"
    assert source.read(np.arange(60))[:, 6:11, 6:11].mean() > 0.5, "protein is white in the shards"


def test_given_signs_win_over_the_data(tmp_path, caplog):
    star = make_set(tmp_path, {"a.mrcs": blobs(60)}, [("a.mrcs", k, 0) for k in range(60)])
    p = read_particles(star)
    decision = decide_sign(p, settings(invert="yes"))
    assert (decision.sign == -1).all() and "seems dark" in caplog.text
    assert (decide_sign(p.with_results(cryoisoSign=np.full(60, -1)), settings(invert="auto")).sign == -1).all()
    assert (decide_sign(p.with_results(cryoisoSign=np.full(60, -1)), settings(invert="no")).sign == 1).all()


def test_pure_noise_is_taken_as_it_is_with_a_warning(tmp_path, caplog):
    noise = np.random.default_rng(0).normal(size=(50, BOX, BOX))
    star = make_set(tmp_path, {"a.mrcs": noise}, [("a.mrcs", k, 0) for k in range(50)])
    assert (decide_sign(read_particles(star), settings(invert="auto")).sign == 1).all()
    assert "do not tell whether protein is white or dark" in caplog.text


def test_real_images_agree_with_the_sign_that_cryosparc_stored(shared):
    from cryoiso.io.contrast_sign import contrast
    from cryoiso.io.cs import read_cs

    folder = shared / "data/particles/empiar_10076_7"
    p = replace(read_cs(folder / "empiar_10076_7.cs"), stack=np.full(7, str(folder / "empiar_10076_7.mrcs")))
    assert (p.results["cryoisoSign"] == -1).all() and contrast(p, np.arange(7), IngestSettings()) < -1.5


def test_array_source_checks_its_shape(tmp_path):
    star, images = simple_set(tmp_path, 20)
    p = read_particles(star)
    source = ArraySource(images, p)
    assert isinstance(source, ImageSource)
    np.testing.assert_array_equal(source.read(np.array([3, 1])), images[[3, 1]])
    with raises_code("arrays-do-not-fit", InputError, match="do not fit"):
        ArraySource(images[:5], p)


def test_atomic_files_appear_whole_or_not_at_all(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as stream:
        stream.write("one")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.txt", "w") as stream:
        stream.write("two")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
    with raises_code("folder-not-found", InputError), atomic_write(tmp_path / "no/a.txt"):
        pass
    with pytest.raises(DiskFullError, match=r"needs .* TiB"), atomic_write(tmp_path / "b", need_bytes=2**62):
        pass


def test_the_plan_can_be_sent_to_other_ranks(tmp_path):
    import pickle

    star, _ = simple_set(tmp_path, 20)
    plan = ing.plan(read_particles(star), settings(), star)
    assert (
        pickle.loads(pickle.dumps(plan)).digest
        == plan.digest
        == ing.plan(read_particles(star), settings(), star).digest
    )
