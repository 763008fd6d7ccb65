"""Switches of the nuisances. The defaults switch everything off."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from cryoiso.core.errors import InputError

KINDS = ("broken", "empty", "pair", "other")
"""Kinds of junk: part of the object missing, bare ice, two objects stuck together, another protein."""
PARTICLE = "particle"
PARTICLES_A_MICROGRAPH = 100


def _require(holds: bool, problem: str, expected: object, found: object) -> None:
    if not holds:
        raise InputError(problem, expected=expected, found=found, code="option-out-of-range")


@dataclass(frozen=True)
class Neighbours:
    """Other copies of the object around each particle, in its plane."""

    density: float = 0.0
    """Centres per square of the diameter, before those that come too close to another one are dropped."""
    distance: float = 1.2
    """Least distance between two centres in diameters; below 1 copies may overlap."""
    diameter_A: float | None = None
    """None: measured on the map."""

    def __post_init__(self) -> None:
        _require(0 <= self.density <= 10, "wrong density of neighbours", "0 to 10 per squared diameter", self.density)
        _require(0.1 <= self.distance <= 10, "wrong distance of neighbours", "0.1 to 10 diameters", self.distance)
        _require(self.diameter_A is None or self.diameter_A > 0, "wrong diameter", "more than 0 Å", self.diameter_A)


@dataclass(frozen=True)
class Ice:
    """Thickness of the ice per micrograph, and what it does to signal and noise (docs/simulate.md)."""

    thickness_A: tuple[float, float] | None = None
    """Uniform in this range; None: one thickness, no effect."""
    view_correlation: float = 0.7
    """Correlation of the normal scores of thickness and angle between view and axis: positive if side views lie in
    thick ice."""
    mean_free_path_A: float = 3950.0
    """For inelastic scattering; the signal falls as exp(-thickness / it). 3950 Å: 300 kV, Rice et al. 2018,
    doi 10.1016/j.jsb.2018.06.007."""
    noise_share: float = 0.3
    """Share of the ice in the variance of the noise in the middle of the range; it grows with the thickness."""

    def __post_init__(self) -> None:
        if self.thickness_A is not None:
            low, high = self.thickness_A
            _require(0 < low <= high <= 20_000, "wrong range of ice thickness", "0 < MIN <= MAX in Å", self.thickness_A)
        _require(-1 <= self.view_correlation <= 1, "wrong correlation", "-1 to 1", self.view_correlation)
        _require(self.mean_free_path_A > 0, "wrong mean free path", "more than 0 Å", self.mean_free_path_A)
        _require(0 <= self.noise_share <= 1, "wrong share of the ice in the noise", "0 to 1", self.noise_share)

    @property
    def middle_A(self) -> float:
        """The thickness without effect."""
        return 0.0 if self.thickness_A is None else sum(self.thickness_A) / 2


@dataclass(frozen=True)
class Micrographs:
    """What particles of one micrograph share."""

    count: int | None = None
    """None: one per 100 particles."""
    from_ctf: bool = False
    """The micrograph is that of the row that the CTF is drawn from."""
    defocus: bool = False
    """Defocus, astigmatism and phase shift are drawn per micrograph, not per particle."""
    field_A: float = 4000.0
    """Side of the area that particles lie in."""
    stage_tilt_deg: float = 0.0
    """The defocus is a plane over each micrograph, of this tilt and about an axis drawn per micrograph."""
    height_sd_A: float = 0.0
    """Standard deviation of the particles' heights, which are defocus."""
    defocus_error_sd_A: float = 0.0
    """Standard deviation of the error of each particle's defocus in particles.star."""
    defocus_error_shared_sd_A: float = 0.0
    """The same of an error that particles of a micrograph share."""
    bfactor_A2: tuple[float, float] | None = None
    """Uniform in this range per micrograph."""
    scale_sd: float = 0.0
    """Standard deviation of the logarithm of the signal's scale per micrograph."""
    particle_scale_sd: float = 0.0
    """The same per particle."""

    def __post_init__(self) -> None:
        _require(self.count is None or self.count > 0, "wrong number of micrographs", "at least 1", self.count)
        _require(not (self.from_ctf and self.count), "micrographs are either counted or from a file", "one", "both")
        _require(self.field_A > 0, "wrong width of the micrographs", "more than 0 Å", self.field_A)
        _require(0 <= self.stage_tilt_deg < 80, "wrong tilt of the stage", "0 to 80 degrees", self.stage_tilt_deg)
        for f in fields(self):
            if f.name.endswith(("sd_A", "scale_sd")):
                value = getattr(self, f.name)
                _require(value >= 0, f"wrong {f.name}", "not negative", value)
        if self.bfactor_A2 is not None:
            _require(0 <= self.bfactor_A2[0] <= self.bfactor_A2[1], "wrong B-factors", "MIN <= MAX", self.bfactor_A2)


@dataclass(frozen=True)
class Optics:
    """Several optics groups; micrograph i belongs to group i modulo their number."""

    groups: int = 1
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0)
    beam_tilt_sd_mrad: float = 0.0
    """Standard deviation of each component between groups."""
    grids: tuple[tuple[int, float], ...] = ()
    """Box in pixels and pixel size in Å of the second, third ... group; the first one again after the last."""

    def __post_init__(self) -> None:
        _require(self.groups >= 1, "wrong number of optics groups", "at least 1", self.groups)
        _require(self.beam_tilt_sd_mrad >= 0, "wrong scatter of the beam tilt", "not negative", self.beam_tilt_sd_mrad)
        for box, pixel in self.grids:
            _require(box >= 8 and pixel > 0, "wrong grid of an optics group", "at least 8 px", f"{box} px, {pixel} Å")

    @property
    def count(self) -> int:
        """Number of optics groups to make."""
        return max(self.groups, 1 + len(self.grids))

    @property
    def beam_tilted(self) -> bool:
        return any(self.beam_tilt_mrad) or self.beam_tilt_sd_mrad > 0


@dataclass(frozen=True)
class Junk:
    """Shares of the images that show something else than the object."""

    shares: dict[str, float] = field(default_factory=dict)
    """By kind (``KINDS``)."""
    broken_share: float = 0.33
    """Share of the mass that broken particles lack."""

    def __post_init__(self) -> None:
        for kind, share in self.shares.items():
            _require(kind in KINDS, "unknown kind of junk", ", ".join(KINDS), repr(kind))
            _require(0 <= share <= 1, f"wrong share of the junk '{kind}'", "0 to 1", share)
        total = sum(self.shares.values())
        _require(total <= 1 + 1e-9, "the shares of junk exceed the whole", "a sum of at most 1", f"{total:g}")
        _require(0 < self.broken_share < 1, "wrong share of the missing part", "between 0 and 1", self.broken_share)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that occur."""
        return tuple(kind for kind in KINDS if self.shares.get(kind))


@dataclass(frozen=True)
class Nuisances:
    """All switches."""

    neighbours: Neighbours = Neighbours()
    ice: Ice = Ice()
    micrographs: Micrographs = Micrographs()
    optics: Optics = Optics()
    junk: Junk = field(default_factory=Junk)
    known: bool = False
    """The particle file states the true CTF parameters, scales, B-factors and beam tilts."""

    @property
    def hides_ctf(self) -> bool:
        """Whether the CTF that the particle file states is not the true one."""
        m = self.micrographs
        wrong: list[Any] = [
            self.ice.thickness_A, m.stage_tilt_deg, m.height_sd_A, m.defocus_error_sd_A, m.defocus_error_shared_sd_A,
            m.bfactor_A2, m.scale_sd, m.particle_scale_sd, self.optics.beam_tilted,
        ]  # fmt: skip
        return not self.known and any(wrong)
