"""What a particle set is, in memory: optics groups, CTF and pose columns, and where each image lies.

Conventions (the whole package): lengths in Å, angles in degrees in files and rotation matrices inside. A rotation A
maps map coordinates (x, y, z) to image coordinates; the image is the projection along the rotated z. ``shift_A`` is
RELION's origin: shifting the image content by it centres the content. The centre is pixel D//2; arrays are (z, y, x)
and (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cryoiso.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real, Shaped, UInt

HALVES = (1, 2)
"""Numbers of the two half-sets of a gold-standard refinement."""
Rows = slice | np.ndarray | list[int]
"""Which particles: a slice, indices or a boolean mask."""
CtfApplied = Literal["", "flipped", "premultiplied"]
"""How the images of an optics group were changed by their CTF c: not at all, times sign(c), times c."""


@dataclass(frozen=True)
class OpticsGroup:
    """One optics group: everything about the microscope that its particles share."""

    number: int
    name: str
    pixel_size_A: float
    box_px: int
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0)
    magnification: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)
    """Row-major 2x2 anisotropic magnification (RELION's rlnMagMat00, 01, 10, 11)."""
    odd_zernike: tuple[float, ...] = ()
    even_zernike: tuple[float, ...] = ()
    ctf_premultiplied: bool = False
    """The images were multiplied by their CTF (rlnCtfDataAreCtfPremultiplied)."""
    phase_flipped: bool = False
    """The images were multiplied by the sign of their CTF (rlnCtfDataArePhaseFlipped)."""

    @property
    def ctf_applied(self) -> CtfApplied:
        """What was done to the images. Where a file sets both flags, premultiplied holds, as in RELION, which squares
        the CTF whether or not its absolute value was taken."""
        return "premultiplied" if self.ctf_premultiplied else "flipped" if self.phase_flipped else ""

    def with_ctf_applied(self, applied: CtfApplied) -> OpticsGroup:
        """The same group for images of another kind."""
        return replace(self, ctf_premultiplied=applied == "premultiplied", phase_flipped=applied == "flipped")


@dataclass(frozen=True)
class Particles:
    """Metadata of n particles, in the order of the source. All arrays have length n; ``take`` selects rows of all of
    them.

    ``shift_A`` and ``rotation`` are None where the source has no poses; ``half`` is 0 where it names no half-set.
    """

    uid: UInt[np.ndarray, " n"]
    """(n,) uint64: kept from .cs, else a hash of the image's name."""
    optics: Int[np.ndarray, " n"]
    """(n,) int32: index into ``groups`` (not RELION's group number)."""
    groups: tuple[OpticsGroup, ...]
    stack: Shaped[np.ndarray, " n"]
    """(n,) str: path of the image stack, as resolved by the reader. Readers give an object array whose rows share one
    text per stack: fixed width would take 4 bytes per character and row."""
    index: Int[np.ndarray, " n"]
    """(n,) int64: image within the stack, from 0."""
    defocus_u_A: Float[np.ndarray, " n"]
    defocus_v_A: Float[np.ndarray, " n"]
    defocus_angle_deg: Float[np.ndarray, " n"]
    phase_shift_deg: Float[np.ndarray, " n"]
    ctf_bfactor_A2: Float[np.ndarray, " n"]
    ctf_scale: Float[np.ndarray, " n"]
    rotation: Float[np.ndarray, "n 3 3"] | None = None
    """(n, 3, 3) float64."""
    shift_A: Float[np.ndarray, "n 2"] | None = None
    """(n, 2) float64: RELION's (rlnOriginXAngst, rlnOriginYAngst)."""
    half: Int[np.ndarray, " n"] | None = None
    """(n,) int8: 1 or 2, 0 where unknown."""
    micrograph: Int[np.ndarray, " n"] | None = None
    """(n,) int64: number of each particle's micrograph, in no particular order; None where the source names none."""
    signal_scale: Float[np.ndarray, " n"] | None = None
    """(n,) factor of each image's signal beside ``ctf_scale``, estimated at these poses; None: 1."""
    noise_level: Float[np.ndarray, " n"] | None = None
    """(n,) variance of each image's noise over that of its optics group, estimated at these poses; None: 1."""
    table: Any = None
    """pandas.DataFrame of the source's particle rows, every column kept, in the same order; None if made in memory."""
    optics_table: Any = None
    """pandas.DataFrame of the source's optics groups, every column kept."""
    results: dict[str, Shaped[np.ndarray, " n"]] = field(default_factory=dict)
    """Columns that this program computed, by STAR name without underscore; written over those of ``table``."""

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, rows: Rows) -> Particles:
        """The particles of these rows (slice, index array or boolean mask), every column alike."""
        new: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                new[f.name] = value[rows]
        if self.table is not None:
            new["table"] = self.table.iloc[rows].reset_index(drop=True)
        new["results"] = {k: v[rows] for k, v in self.results.items()}
        return replace(self, **new)

    def with_poses(self, rotation: Real[np.ndarray, "n 3 3"], shift_A: Real[np.ndarray, "n 2"]) -> Particles:
        """A copy with these poses: rotation (n,3,3), shift_A (n,2); intensities belong to the old ones and go."""
        rotation, shift_A = np.asarray(rotation, np.float64), np.asarray(shift_A, np.float64)
        return replace(self, rotation=rotation, shift_A=shift_A, signal_scale=None, noise_level=None)

    def with_intensity(
        self, signal_scale: Real[np.ndarray, " n"] | None, noise_level: Real[np.ndarray, " n"] | None
    ) -> Particles:
        """A copy with these factors of the signal and of the noise variance, (n,) each; None: 1 everywhere."""
        return replace(self, signal_scale=signal_scale, noise_level=noise_level)

    def with_results(self, **columns: np.ndarray) -> Particles:
        """A copy with these result columns added, e.g. rlnLogLikeliContribution."""
        return replace(self, results={**self.results, **columns})

    @property
    def first_group(self) -> OpticsGroup:
        """The optics group of the first particle, whose box and pixel size maps take. The first row of the optics
        table may have no particles."""
        return self.groups[int(self.optics[0])]

    def group_values(self, name: str) -> Float[np.ndarray, " n"]:
        """(n,) float64: a scalar attribute of each particle's optics group, e.g. ``pixel_size_A``."""
        values: np.ndarray = np.array([getattr(g, name) for g in self.groups], np.float64)[self.optics]
        return values

    def with_ctf_applied(self, applied: CtfApplied) -> Particles:
        """A copy whose optics groups say that all images are of this kind; the images themselves are not touched."""
        return replace(self, groups=tuple(g.with_ctf_applied(applied) for g in self.groups))

    def require_poses(self, file: object = None) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 2"]]:
        """Rotation and shift, or one clear error where the source has none."""
        if self.rotation is None or self.shift_A is None:
            raise InputError(
                "the particles have no poses",
                file=file,
                expected="rlnAngleRot, rlnAngleTilt, rlnAnglePsi, rlnOriginXAngst, rlnOriginYAngst",
                hint="Give the output of a refinement, or run 'cryoiso refine' first.",
                code="poses-missing",
            )
        return self.rotation, self.shift_A


def concatenate(first: Particles, second: Particles, *, pooled: bool = False) -> Particles:
    """Both sets, one after the other. Tables of the sources are dropped.

    Args:
        pooled: particles of the second set join the first one's optics groups, which must be the same ones; else the
            second keeps optics groups of its own.

    Raises:
        InputError: one of them has poses or half-sets and the other has not, or ``pooled`` and the groups differ.
    """
    columns: dict[str, Any] = {}
    for f in fields(Particles):
        left, right = getattr(first, f.name), getattr(second, f.name)
        if f.name in ("groups", "table", "optics_table", "results", "optics", *_OPTIONAL):
            continue
        if (left is None) != (right is None):
            raise InputError(
                f"only one of the two particle sets has a '{f.name}'",
                expected="both or none",
                code="particle-sets-differ",
            )
        columns[f.name] = None if left is None else np.concatenate([left, right])
    columns |= {name: _joined(first, second, name) for name in _OPTIONAL}
    if pooled:
        _require_same_optics(first, second)
        groups, shift = first.groups, 0
    else:
        numbers, shift = max((g.number for g in first.groups), default=0), len(first.groups)
        groups = first.groups + tuple(replace(g, number=numbers + i) for i, g in enumerate(second.groups, 1))
    optics = np.concatenate([first.optics, second.optics + shift]).astype(first.optics.dtype)
    results = {k: np.concatenate([first.results[k], second.results[k]]) for k in first.results if k in second.results}
    return Particles(groups=groups, optics=optics, results=results, **columns)


_OPTIONAL = ("micrograph", "signal_scale", "noise_level")
"""Fields that one of two joined sets may lack."""


def _joined(first: Particles, second: Particles, name: str) -> np.ndarray | None:
    """An optional field of both sets; a set without it gets a micrograph of its own, or intensities of 1."""
    left, right = getattr(first, name), getattr(second, name)
    if left is None and right is None:
        return None
    if name != "micrograph":
        return np.concatenate([np.ones(len(p)) if v is None else v for p, v in ((first, left), (second, right))])
    left, right = (np.zeros(len(p), np.int64) if v is None else v for p, v in ((first, left), (second, right)))
    return np.concatenate([left, right + left.max(initial=-1) + 1])


def _require_same_optics(first: Particles, second: Particles) -> None:
    """The box does not count: sources bring all images to one."""
    for i in np.unique(second.optics).tolist():
        group = first.groups[i] if i < len(first.groups) else None
        if group is None or replace(group, box_px=0) != replace(second.groups[i], box_px=0):
            raise InputError(
                "particles cannot join an optics group of other particles",
                expected=second.groups[i],
                found=group,
                code="particle-sets-differ",
            )


@dataclass(frozen=True)
class DensityMap:
    """A cubic density map: data (D, D, D) float32 in (z, y, x), centre at voxel D//2, pixel size in Å."""

    data: Float[np.ndarray, "box box box"]
    pixel_size_A: float
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def box_px(self) -> int:
        return int(self.data.shape[0])
