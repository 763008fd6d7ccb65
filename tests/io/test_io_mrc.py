"""MRC maps and stacks against the mrcfile library, with odd headers, all modes, and files that are broken."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.io.mrc import build_header, read_header, read_map, read_raw_map, write_map, write_stack
from cryoiso.io.stack import StackReader, runs


def theirs(path: Path) -> tuple[np.ndarray, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.open(path, permissive=True) as m:
            return np.array(m.data), [float(m.voxel_size[a]) for a in "xyz"]


def test_every_real_map_holds_what_mrcfile_reads(shared):
    files = [f for f in sorted((shared / "data/maps").rglob("*")) if f.suffix in (".mrc", ".map")]
    assert len(files) > 15
    for file in files:
        data, voxel = theirs(file)
        raw, header = read_raw_map(file)
        np.testing.assert_array_equal(np.transpose(raw, [2 - a for a in header.axes]), data, err_msg=str(file))
        np.testing.assert_allclose(header.voxel_A, voxel, rtol=1e-6, err_msg=str(file))


def test_axes_come_in_the_order_z_y_x(shared):
    data, _ = theirs(shared / "data/maps/emd_32143_lowres_1.53A_100.map")  # columns are y, rows are x
    np.testing.assert_array_equal(
        read_map(shared / "data/maps/emd_32143_lowres_1.53A_100.map").data, data.transpose(0, 2, 1)
    )
    data, _ = theirs(shared / "data/maps/format/emd_3001_skewed_axes.map")  # columns z, rows x, sections y
    raw, header = read_raw_map(shared / "data/maps/format/emd_3001_skewed_axes.map")
    np.testing.assert_array_equal(raw, data.transpose(2, 0, 1))
    assert header.axes == (1, 0, 2)
    np.testing.assert_allclose(header.origin_A, [-21 * 17.93 / 40, -12 * 4.71 / 12, 0], rtol=1e-4)


def test_old_machine_stamps_and_starts(shared):
    m = read_map(shared / "data/maps/gorgon_rotavirus_vp6_1.23A_96.mrc")
    assert m.box_px == 96 and m.pixel_size_A == pytest.approx(1.23) and np.isfinite(m.data).all()
    m = read_map(shared / "data/maps/format/emd_3197.map")
    np.testing.assert_allclose(m.origin_A, [-22.8, 0, 0], rtol=1e-5)


def test_a_pixel_size_that_is_given_wins(shared):
    path = shared / "data/maps/betagal_relion_tutorial_localres_100.mrc"
    assert read_map(path).pixel_size_A == 1.0 and read_map(path, 3.54).pixel_size_A == 3.54


def test_a_reference_without_a_pixel_size_says_what_to_do(shared, tmp_path):
    path = shared / "data/maps/aspire_clean70S_65.mrc"
    with raises_code("pixel-size-missing", InputError, match=r"no pixel size.*pixel_size_A under \[reference\]"):
        read_map(path)
    assert read_map(path, 5.0).pixel_size_A == 5.0
    (tmp_path / "nan.mrc").write_bytes(build_header((4, 4, 4), 2, float("nan")) + bytes(256))
    with raises_code("pixel-size-missing", InputError):
        read_map(tmp_path / "nan.mrc")


def test_maps_that_are_no_reference(shared, tmp_path):
    with raises_code("map-not-cubic", InputError, match=r"not a cube.*84 x 58 x 62"):
        read_map(shared / "data/maps/emd_7795_1.8A_84x58x62.mrc")
    with mrcfile.new(tmp_path / "flat.mrc", np.zeros((4, 4, 4), np.float32)) as m:
        m.voxel_size = (1.0, 1.0, 1.5)
    with raises_code("map-not-cubic", InputError, match=r"voxels are not cubes.*1 x 1 x 1\.5"):
        read_map(tmp_path / "flat.mrc")
    bad = np.zeros((4, 4, 4), np.float32)
    bad[1, 2, 3] = np.nan
    write_map(tmp_path / "nan.mrc", bad, 1.0)
    with raises_code("map-not-finite", InputError):
        read_map(tmp_path / "nan.mrc")
    (tmp_path / "text.mrc").write_text("hello" * 500)
    with raises_code("mrc-malformed", InputError):
        read_map(tmp_path / "text.mrc")
    with raises_code("file-not-found", InputError):
        read_map(tmp_path / "nowhere.mrc")
    with mrcfile.new(tmp_path / "complex.mrc", np.zeros((4, 4, 4), np.complex64)):
        pass
    with raises_code("mrc-unsupported", InputError, match="mode 4"):
        read_map(tmp_path / "complex.mrc")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_all_modes_in_both_byte_orders(tmp_path, dtype, order):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 100, (6, 5, 5)).astype(dtype)
    path = tmp_path / "s.mrcs"
    with mrcfile.new(path, data) as m:
        m.set_image_stack()
    if order == ">":
        raw = path.read_bytes()
        header = np.frombuffer(raw[:1024], mrcfile.dtypes.HEADER_DTYPE).astype(
            mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">")
        )
        header["machst"] = [17, 17, 0, 0]
        path.write_bytes(header.tobytes() + data.astype(data.dtype.newbyteorder(">")).tobytes())
    with StackReader() as reader:
        images = reader.read(str(path), np.array([4, 5, 0, 0, 2]))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, data[[4, 5, 0, 0, 2]].astype(np.float32))
    np.testing.assert_array_equal(read_raw_map(path)[0], data)


def test_real_stacks_with_and_without_map_strings(shared):
    for name in ("cryodrgn_toy/toy_projections", "relion31_5/relion31", "drgnai_M_ribosome/M_particles_sub10_repacked"):
        path = shared / f"data/particles/{name}.mrcs"
        with StackReader() as reader:
            np.testing.assert_array_equal(reader.read(str(path), np.array([3, 1])), theirs(path)[0][[3, 1]])


def test_written_maps_are_valid_and_come_back(tmp_path):
    data = np.random.default_rng(0).normal(3, 2, (7, 7, 7)).astype(np.float32)
    write_map(tmp_path / "m.mrc", data, 1.37, (1.0, -2.0, 3.5))
    assert mrcfile.validate(tmp_path / "m.mrc")
    m = read_map(tmp_path / "m.mrc")
    np.testing.assert_array_equal(m.data, data)
    assert m.pixel_size_A == pytest.approx(1.37, rel=1e-6) and m.origin_A == (1.0, -2.0, 3.5)
    with mrcfile.open(tmp_path / "m.mrc") as other:
        assert other.is_volume() and other.header.rms == pytest.approx(data.std(), rel=1e-5)
        assert bytes(other.header.label[0]).startswith(b"cryoiso")
    with gzip.open(tmp_path / "m.mrc.gz", "wb") as stream:
        stream.write((tmp_path / "m.mrc").read_bytes())
    np.testing.assert_array_equal(read_map(tmp_path / "m.mrc.gz").data, data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.mrc", "m.mrc.gz"]


@pytest.mark.parametrize(("mode", "dtype"), [(2, np.float32), (12, np.float16)])
def test_written_stacks_are_valid_and_come_back(tmp_path, mode, dtype):
    images = np.random.default_rng(0).normal(size=(10, 8, 8)).astype(dtype)
    with write_stack(tmp_path / "s.mrcs", 8, 2.5, mode) as stack:
        stack.append(images[:3])
        stack.append(images[3])
        stack.append(images[4:])
    assert mrcfile.validate(tmp_path / "s.mrcs")
    with mrcfile.open(tmp_path / "s.mrcs") as m:
        assert m.is_image_stack() and float(m.voxel_size.x) == 2.5
        np.testing.assert_array_equal(m.data, images)


def test_a_stack_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_stack(tmp_path / "s.mrcs", 8, 1.0) as stack:
        stack.append(np.zeros((2, 8, 8)))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_missing_truncated_and_short_stacks_are_named(tmp_path):
    path = tmp_path / "s.mrcs"
    with write_stack(path, 8, 1.0) as stack:
        stack.append(np.zeros((5, 8, 8)))
    with (
        StackReader() as reader,
        raises_code(
            "stack-too-short", InputError, match=r"p\.star, row 9: .*expected an image from 1 to 5, found image 8"
        ),
    ):
        reader.read(str(path), np.array([2, 7]), "p.star", np.array([3, 8]))
    path.write_bytes(path.read_bytes()[:-100])
    with (
        StackReader() as reader,
        raises_code("file-truncated", InputError, match=r"row 4: .*truncated \(expected 2304 bytes.*4 whole"),
    ):
        reader.read(str(path), np.array([0]), "p.star", np.array([3]))
    with (
        StackReader() as reader,
        raises_code("file-not-found", InputError, match=r"row 1: image stack .*gone\.mrcs: no such file"),
    ):
        reader.read(str(tmp_path / "gone.mrcs"), np.array([0]), "p.star", np.array([0]))


def test_few_files_stay_open(tmp_path):
    for k in range(6):
        with write_stack(tmp_path / f"{k}.mrcs", 4, 1.0) as stack:
            stack.append(np.full((2, 4, 4), k))
    with StackReader(max_open=2) as reader:
        for k in (0, 1, 2, 3, 4, 5, 0, 3):
            assert (reader.read(str(tmp_path / f"{k}.mrcs"), np.array([1])) == k).all()
            assert len(reader._open) <= 2


def test_runs_of_consecutive_numbers():
    assert runs(np.array([3, 4, 5, 9, 8, 8])) == [(0, 3), (3, 4), (4, 5), (5, 6)] and runs(np.array([])) == []


def test_headers_with_extra_records(shared):
    header = read_header(shared / "data/maps/format/emd_3001_skewed_axes.map")
    assert header.offset == 1024 + 160 and header.shape == (25, 43, 73)
