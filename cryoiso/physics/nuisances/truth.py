"""What each image of a set with nuisances shows, and what the particle file says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, OpticsGroup, Particles
from cryoiso.physics.nuisances.copies import Copies, draw_copies
from cryoiso.physics.nuisances.micrographs import MicrographTruth, height_A, ice_factors, lay_out, shared_ctf
from cryoiso.physics.nuisances.settings import PARTICLE, Nuisances, Optics
from cryoiso.physics.nuisances.shape import Outline
from cryoiso.physics.simulation import CtfRanges
from cryoiso.physics.views import GivenViews, Views, normals, uniforms


@dataclass(frozen=True)
class NuisanceTruth:
    """A drawn set of n particles."""

    particles: Particles
    """With the CTFs, scales and B-factors that the images are made with."""
    given: Particles
    """The same with what the particle file states."""
    micrographs: MicrographTruth
    kind: np.ndarray
    """(n,) str: particle or one of ``settings.KINDS``."""
    signal_scale: np.ndarray
    """(n,): factor of the signal; part of ``particles.ctf_scale``."""
    noise_scale: np.ndarray
    """(n,): factor of the noise's standard deviation."""
    copies: Copies

    def columns(self) -> dict[str, np.ndarray]:
        """Columns of truth.star by name."""
        m = self.micrographs
        count, nearest = _nearest(self.copies, len(self.kind))
        return {
            **self.shared_columns(),
            "cryoisoKind": self.kind,
            "cryoisoIceThickness": m.thickness_A[m.of],
            "cryoisoSignalScale": self.signal_scale,
            "cryoisoNoiseScale": self.noise_scale,
            "cryoisoDefocusError": self.given.defocus_u_A - self.particles.defocus_u_A,
            "cryoisoCopies": count,
            "cryoisoCopyXAngst": nearest[:, 0],
            "cryoisoCopyYAngst": nearest[:, 1],
        }

    def shared_columns(self) -> dict[str, np.ndarray]:
        """Columns of truth.star and of particles.star: micrograph and place on it."""
        m = self.micrographs
        pixel = self.particles.group_values("pixel_size_A")
        x, y = m.position_A.T / pixel
        return {"rlnMicrographName": m.names[m.of], "rlnCoordinateX": x, "rlnCoordinateY": y}


def _nearest(copies: Copies, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of copies in each image, and x, y of the one nearest to the centre (0, 0 without any)."""
    count, place = np.bincount(copies.row, minlength=n), np.zeros((n, 2))
    far = np.argsort(-np.hypot(*copies.position_A[:, :2].T), kind="stable")
    place[copies.row[far]] = copies.position_A[far, :2]  # the nearest comes last
    return count, place


def draw_truth(
    base: Particles,
    volume: DensityMap,
    settings: Nuisances,
    *,
    views: Views | GivenViews,
    ctf: CtfRanges | Particles,
    names: np.ndarray | None = None,
    axis: np.ndarray | None = None,
    seed: int,
) -> NuisanceTruth:
    """Draws all nuisances of a set.

    Args:
        base: the set without them (``physics.simulate.make_particles``).
        volume: the object on the first optics group's grid.
        views, ctf: as ``base`` was made with.
        names: micrograph of each row of ``ctf``, if it is a set.
        axis: (3,) the view whose ice is thinnest (default z).
        seed: of the simulation.

    Raises:
        InputError: the object does not fit the box of an optics group, or several optics groups are to be made of a
            set that has several itself.
    """
    if settings.micrographs.from_ctf and names is None:
        raise InputError(
            "the file of the CTFs names no micrographs", expected="_rlnMicrographName", code="star-column-missing"
        )
    outline = Outline.of(volume)
    axis = np.array([0.0, 0.0, 1.0]) if axis is None else axis
    layout = lay_out(base, settings.micrographs, settings.ice, ctf, names, axis, seed)
    if settings.micrographs.defocus:
        base = replace(base, **shared_ctf(layout, ctf, volume.box_px, volume.pixel_size_A, seed))
    plain = base
    base = _with_optics(base, settings.optics, layout, seed)
    _require_room(base.groups, outline.diameter_A)
    true, signal, noise = _true_ctf(base, settings, layout, seed)
    kind = _kinds(base.uid, settings, seed)
    return NuisanceTruth(
        particles=true,
        given=true if settings.known else _stated(true, base, plain, settings, layout, seed),
        micrographs=layout,
        kind=kind,
        signal_scale=signal,
        noise_scale=noise,
        copies=draw_copies(
            base, kind == "pair", settings.neighbours, outline,
            base.group_values("box_px") * base.group_values("pixel_size_A"), views, seed,
        ),
    )  # fmt: skip


def _with_optics(base: Particles, optics: Optics, layout: MicrographTruth, seed: int) -> Particles:
    """The particles in the optics groups of their micrographs."""
    if optics.count == 1 and not optics.beam_tilted:
        return base
    if optics.count > 1 and len(base.groups) > 1:
        raise InputError(
            "the CTFs come with optics groups of their own", expected="no further groups and grids",
            found=f"{len(base.groups)} groups",
        code="options-conflict")  # fmt: skip
    groups = base.groups if optics.count == 1 else base.groups * optics.count
    number = np.arange(len(groups), dtype=np.uint64)
    scatter = [optics.beam_tilt_sd_mrad * normals(seed, f"beam tilt {a}", number) for a in "xy"]
    first = base.groups[0]
    grids = ((first.box_px, first.pixel_size_A), *optics.grids)
    new_groups = []
    for i, group in enumerate(groups):
        tilt = tuple(float(group.beam_tilt_mrad[k] + optics.beam_tilt_mrad[k] + scatter[k][i]) for k in (0, 1))
        new: dict[str, Any] = {"beam_tilt_mrad": tilt}
        if optics.count > 1:
            box, pixel = grids[i % len(grids)]
            new |= {"number": i + 1, "name": f"opticsGroup{i + 1}", "box_px": box, "pixel_size_A": pixel}
        new_groups.append(replace(group, **new))
    of = base.optics if optics.count == 1 else (layout.of % optics.count).astype(np.int32)
    return replace(base, groups=tuple(new_groups), optics=of)


def _require_room(groups: tuple[OpticsGroup, ...], diameter_A: float) -> None:
    for group in groups[1:]:
        if group.box_px * group.pixel_size_A < diameter_A:
            raise InputError(
                f"the object does not fit the box of optics group {group.number}", expected=f"{diameter_A:.0f} Å",
                found=f"{group.box_px} px of {group.pixel_size_A:g} Å",
            code="model-exceeds-box")  # fmt: skip


def _true_ctf(
    base: Particles, settings: Nuisances, layout: MicrographTruth, seed: int
) -> tuple[Particles, np.ndarray, np.ndarray]:
    """Particles with the true CTFs, and the factors of signal and noise."""
    m = settings.micrographs
    height = height_A(layout, m, base.uid, seed)
    ice_signal, ice_noise = (f[layout.of] for f in ice_factors(layout.thickness_A, settings.ice))
    own = np.exp(m.particle_scale_sd * normals(seed, "particle scale", base.uid))
    signal = ice_signal * layout.scale[layout.of] * own
    true = replace(
        base,
        defocus_u_A=base.defocus_u_A + height,
        defocus_v_A=base.defocus_v_A + height,
        ctf_bfactor_A2=base.ctf_bfactor_A2 + layout.bfactor_A2[layout.of],
        ctf_scale=base.ctf_scale * signal,
    )
    return true, signal, ice_noise


def _stated(
    true: Particles, base: Particles, plain: Particles, settings: Nuisances, layout: MicrographTruth, seed: int
) -> Particles:
    """The particles as a CTF estimation per micrograph would describe them: no plane, no scale, no beam tilt."""
    own = settings.micrographs.defocus_error_sd_A * normals(seed, "defocus error", base.uid)
    error = own + layout.error_A[layout.of]
    tilt = [plain.groups[min(i, len(plain.groups) - 1)].beam_tilt_mrad for i in range(len(base.groups))]
    return replace(
        true,
        groups=tuple(replace(g, beam_tilt_mrad=t) for g, t in zip(base.groups, tilt, strict=True)),
        defocus_u_A=base.defocus_u_A + error,
        defocus_v_A=base.defocus_v_A + error,
        ctf_bfactor_A2=base.ctf_bfactor_A2,
        ctf_scale=base.ctf_scale,
    )


def _kinds(uid: np.ndarray, settings: Nuisances, seed: int) -> np.ndarray:
    """(n,) str: what each image shows."""
    kinds = settings.junk.kinds
    ends = np.cumsum([settings.junk.shares[kind] for kind in kinds])
    which = np.searchsorted(ends, uniforms(seed, "kind of image", uid), side="right")
    return np.array([*kinds, PARTICLE])[which]
