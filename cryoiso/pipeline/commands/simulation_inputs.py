"""What ``cryoiso simulate`` makes images of: the object and what is made of it, views, CTFs and noise of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io.models import is_model
from cryoiso.physics.nuisances.patches import PatchStack
from cryoiso.physics.nuisances.settings import PARTICLE, Junk
from cryoiso.physics.nuisances.shape import blob, coordinates_A, inside, without_part
from cryoiso.physics.simulation import CTF_ROW
from cryoiso.physics.so3 import fibonacci_sphere
from cryoiso.physics.views import GivenViews

PHANTOMS = {"phantom": 0, "phantom-homologue": 1}
DEFAULT_BOX_PX, DEFAULT_PIXEL_A = 64, 3.0
VARIANTS = 2
"""Different broken objects of a set."""
CUT_SOFT_A = 2.0
"""Half width of the border between atoms that are kept and atoms that are missing."""


def object_map(
    model: str, box: int | None, pixel_size: float | None, resolution: float | None, seed: int
) -> DensityMap:
    """A model, map or phantom on the images' grid, in its own units.

    Raises:
        InputError: no such file, or one that cannot be read or does not fit.
    """
    pixel = pixel_size or DEFAULT_PIXEL_A
    if model in PHANTOMS:
        from cryoiso.physics.phantom import phantom_map

        variant = PHANTOMS[model]
        return phantom_map(box or DEFAULT_BOX_PX, pixel, resolution or 2.5 * pixel, seed=seed, variant=variant)
    if not Path(model).is_file():
        raise InputError("no such file", file=model, hint=f"Or one of: {', '.join(PHANTOMS)}.", code="file-not-found")
    if Path(model.removesuffix(".gz")).suffix.lower() in (".mrc", ".map", ".ccp4"):
        return _map(model, box, pixel_size, resolution)
    from cryoiso.io.models import model_to_map

    return model_to_map(model, box or DEFAULT_BOX_PX, pixel, resolution or 2.5 * pixel)


def _map(path: str, box: int | None, pixel_size: float | None, resolution: float | None) -> DensityMap:
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.resample import resample_map

    volume = read_map(path)
    box, pixel = box or volume.box_px, pixel_size or volume.pixel_size_A
    data = volume.data
    if (box, pixel) != (volume.box_px, volume.pixel_size_A):
        data = resample_map(data, volume.pixel_size_A, box, pixel)
    return DensityMap(lowpass(data, pixel, resolution) if resolution else data, pixel)


def objects(
    volume: DensityMap, model: str, junk: Junk, other: str, resolution: float | None, seed: int
) -> dict[str, list[DensityMap]]:
    """The object and what junk shows instead, on one grid and grey scale, as ``nuisances.source`` takes them.

    Args:
        volume: of ``model`` (a file or a phantom).
        other: model or map of another protein; empty: a ball of the object's mass.
        resolution: Å, of all of them (None: 2.5 pixels).
    """
    maps = {PARTICLE: [volume]}
    if "broken" in junk.kinds:
        maps["broken"] = _broken(volume, model, junk.broken_share, seed)
    if "other" in junk.kinds:
        blur = resolution or 2.5 * volume.pixel_size_A
        maps["other"] = [_other(volume, model, other, blur, seed) if other else blob(volume, blur)]
    return maps


def _other(volume: DensityMap, model: str, other: str, resolution: float, seed: int) -> DensityMap:
    """Another protein. Models have one scale; next to a map of any scale it gets the object's variance."""
    other_map = object_map(other, volume.box_px, volume.pixel_size_A, resolution, seed)
    if is_model(model) and is_model(other):
        return other_map
    if not other_map.data.std() > 0:
        raise InputError("the map is constant: nothing to simulate", file=other, code="map-without-density")
    data = (other_map.data - np.median(other_map.data)) * (volume.data.std() / other_map.data.std())
    return DensityMap(data.astype(np.float32), other_map.pixel_size_A)


def _broken(volume: DensityMap, model: str, share: float, seed: int) -> list[DensityMap]:
    """Variants of the object without whole chains, or without one side where there are no chains."""
    rng = generator(seed, "broken objects")
    if is_model(model):
        chains = _chains(model)
        if len(chains) > 1:
            first = rng.permutation(len(chains))[:VARIANTS]
            return [_without_chains(volume, chains, _missing(chains, int(i), share)) for i in first]
    directions = fibonacci_sphere(100)[rng.permutation(100)[:VARIANTS]]
    return [without_part(volume, share, direction) for direction in directions]


def _chains(path: str) -> list[np.ndarray]:
    """Coordinates (k, 3) in Å of the atoms of each chain, about the model's centre of mass."""
    from cryoiso.io.models import positions, read_model

    model = read_model(path)
    xyz, mass = positions(model)
    ends = np.cumsum([sum(len(residue) for residue in chain) for chain in model])[:-1]
    return [part for part in np.split(xyz - np.average(xyz, axis=0, weights=mass), ends) if len(part)]


def _missing(chains: list[np.ndarray], first: int, share: float) -> list[int]:
    """A chain and its nearest ones, until they hold a share of the atoms; one chain stays."""
    centres = np.array([c.mean(0) for c in chains])
    order = np.argsort(np.linalg.norm(centres - centres[first], axis=1), kind="stable")
    held = np.cumsum([len(chains[i]) for i in order]) / sum(map(len, chains))
    count = min(int(np.searchsorted(held, share - 0.01)) + 1, len(chains) - 1)
    return [int(i) for i in order[:count]]


def _without_chains(volume: DensityMap, chains: list[np.ndarray], missing: list[int]) -> DensityMap:
    """Every voxel belongs to the nearest atom; those of missing chains are taken out, with a soft border."""
    from scipy.ndimage import binary_dilation
    from scipy.spatial import cKDTree

    near = binary_dilation(inside(volume), iterations=max(2, round(6.0 / volume.pixel_size_A)))
    points = coordinates_A(near, volume.pixel_size_A)
    kept, gone = (
        cKDTree(np.concatenate([c for i, c in enumerate(chains) if (i in missing) == out])).query(points)[0]
        for out in (False, True)
    )
    data = volume.data.copy()
    data[near] /= 1 + np.exp(np.clip((kept - gone) / (CUT_SOFT_A / 2), -50, 50))
    return DensityMap(data, volume.pixel_size_A)


def read_set(path: Path | None, require: tuple[str, ...]) -> Particles | None:
    """Particles of a STAR or .cs file, or of a numpy archive of poses and CTFs; None without a file."""
    if path is None:
        return None
    if path.suffix.lower() == ".npz":
        from cryoiso.io.pose_archive import read_pose_archive

        return read_pose_archive(path, require)
    from cryoiso.io import read_particle_file

    return read_particle_file(path, require=require)


def views_of(particles: Particles, with_ctf: bool) -> GivenViews:
    """The views of a set; ``with_ctf``: drawn together with CTFs that come from the same file."""
    directions = particles.require_poses()[0][:, 2]
    return GivenViews(directions, CTF_ROW if with_ctf else "view row")


def micrograph_names(particles: Particles | None) -> np.ndarray | None:
    """(n,) micrograph of each row of a STAR file, or None where there is no such column."""
    if particles is None or particles.table is None or "rlnMicrographName" not in particles.table.columns:
        return None
    return np.array([str(v) for v in particles.table["rlnMicrographName"].tolist()])


def patch_stack(path: Path, pixel_size: float | None, way: str, image_pixel_A: float) -> PatchStack:
    """Patches of ice in a stack.

    Args:
        pixel_size: Å (None: of the stack's header, or where that has none that of the images).

    Raises:
        InputError: no such file, or patches that are not square.
    """
    from cryoiso.io.stack import StackReader

    reader = StackReader()
    header = reader.header(str(path))
    count, rows, columns = header.shape
    if rows != columns:
        raise InputError(
            "the noise patches are not square", file=path, found=f"{columns} x {rows} px", code="stack-not-of-images"
        )
    said = float(header.voxel_A[0])
    pixel = pixel_size or (said if 0 < said < np.inf and said != 1.0 else image_pixel_A)

    def read(numbers: np.ndarray) -> np.ndarray:
        unique, place = np.unique(numbers, return_inverse=True)
        return reader.read(str(path), unique)[place]

    return PatchStack(read, count, rows, pixel, way, str(path))
