"""Particle images of known truth: x = scale C(optics) P(pose, shift) V + noise, each image a function of (seed, uid)
alone.

The noise has variance 1, so the map is scaled to the requested signal-to-noise ratio, SNR_dB = 10 log10(variance of the
CTF-multiplied projection / variance of the noise), both over the whole image and averaged over uniformly distributed
views. The cryoPROS paper's definition, an image's variance over its background's, is measured by
:func:`image_to_background_db`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator, shuffle_keys
from cryoiso.core.types import DensityMap, OpticsGroup, Particles
from cryoiso.physics.contrast_transfer import beam_tilt_phase, ctf_for
from cryoiso.physics.fourier import Disc, fourier_disc, fourier_to_images, shift_phases
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.projection import FourierVolume, magnified, scatter_to_half_plane
from cryoiso.physics.views import GivenViews, Views, normals, rows_of, sample_rotations, uniforms

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

BLOCK_PIXELS = 2**21
SNR_IMAGES = 256
"""Images from which the signal's variance is measured."""


@dataclass(frozen=True)
class CtfRanges:
    """Distribution of simulated CTFs: mean defocus and astigmatism uniform in their ranges, any axis."""

    defocus_A: tuple[float, float] = (10000.0, 30000.0)
    astigmatism_A: float = 400.0
    """Largest difference between both defoci."""
    voltage_kV: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.1
    phase_shift_deg: float = 0.0
    bfactor_A2: float = 0.0

    def __post_init__(self) -> None:
        if self.defocus_A[0] > self.defocus_A[1] or self.astigmatism_A < 0:
            raise InputError(
                "wrong range of defocus", expected="MIN <= MAX in Å", found=self.defocus_A, code="option-out-of-range"
            )


def make_particles(
    n: int,
    box_px: int,
    pixel_size_A: float,
    *,
    views: Views | GivenViews | None = None,
    ctf: CtfRanges | Particles | None = None,
    shift_sd_A: float = 0.0,
    seed: int = 1,
    stack: str = "particles.mrcs",
) -> Particles:
    """A set of simulated particles: identities, CTFs, poses, shifts and balanced random halves, but no images.

    Args:
        n: number of particles; the first m of n are those of a set of m.
        box_px, pixel_size_A: of the images.
        views: view distribution (default uniform).
        ctf: ranges, or particles from which CTFs and optics groups are drawn (whole rows; pixel size and box become the
            simulation's).
        shift_sd_A: standard deviation of the origin along x and y.
        seed: of everything.
        stack: name of the stack for the metadata.

    Returns:
        Particles with rotation, shift_A and half.

    Raises:
        InputError: n < 1, or an empty set to draw CTFs from.
    """
    if n < 1:
        raise InputError("nothing to simulate", expected="at least 1 particle", found=n, code="option-out-of-range")
    uid = shuffle_keys(seed, "uid of simulated particle", np.arange(n, dtype=np.uint64))
    groups, columns = draw_ctf(ctf or CtfRanges(), uid, box_px, pixel_size_A, seed)
    half = np.empty(n, np.int8)
    half[np.argsort(shuffle_keys(seed, "half", uid), kind="stable")] = np.arange(n) % 2 + 1
    return Particles(
        uid=uid,
        groups=groups,
        stack=np.full(n, stack),
        index=np.arange(n, dtype=np.int64),
        rotation=sample_rotations(views or Views(), uid, seed),
        shift_A=shift_sd_A * np.stack([normals(seed, f"shift {a}", uid) for a in "xy"], 1),
        half=half,
        **columns,
    )


def draw_ctf(
    ctf: CtfRanges | Particles, uid: Shaped[np.ndarray, " n"], box_px: int, pixel_size_A: float, seed: int
) -> tuple[tuple[OpticsGroup, ...], dict[str, Any]]:
    """Optics groups and per-particle CTF columns (whole rows of given particles, or uniform in ranges), by uid.

    The groups declare unprocessed images, regardless of the given particles' flags.
    """
    if isinstance(ctf, CtfRanges):
        mean = np.interp(uniforms(seed, "defocus", uid), [0, 1], ctf.defocus_A)
        half = 0.5 * ctf.astigmatism_A * uniforms(seed, "astigmatism", uid)
        group = OpticsGroup(
            1, "opticsGroup1", pixel_size_A, box_px, ctf.voltage_kV, ctf.spherical_aberration_mm, ctf.amplitude_contrast
        )
        return (group,), {
            "optics": np.zeros(len(uid), np.int32),
            "defocus_u_A": mean + half,
            "defocus_v_A": mean - half,
            "defocus_angle_deg": 180 * uniforms(seed, "astigmatism axis", uid),
            "phase_shift_deg": np.full(len(uid), ctf.phase_shift_deg),
            "ctf_bfactor_A2": np.full(len(uid), ctf.bfactor_A2),
            "ctf_scale": np.ones(len(uid)),
        }
    if len(ctf) == 0:
        raise InputError("no particles to draw CTFs from", code="particles-too-few")
    rows = ctf_rows(ctf, uid, seed)
    names = (
        "optics",
        "defocus_u_A",
        "defocus_v_A",
        "defocus_angle_deg",
        "phase_shift_deg",
        "ctf_bfactor_A2",
        "ctf_scale",
    )
    groups = tuple(replace(g.with_ctf_applied(""), pixel_size_A=pixel_size_A, box_px=box_px) for g in ctf.groups)
    return groups, {name: np.asarray(getattr(ctf, name))[rows] for name in names}


CTF_ROW = "CTF row"


def ctf_rows(ctf: Particles, uid: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64: the row of given particles that each uid's CTF comes from."""
    return rows_of(seed, CTF_ROW, uid, len(ctf))


class Projector:
    """Noise-free images of a map with the CTF, beam tilt, magnification and shift of the particles' metadata."""

    def __init__(self, volume: DensityMap, *, with_ctf: bool = True, device: str = "cpu") -> None:
        self.box_px, self.pixel_size_A, self.with_ctf = volume.box_px, volume.pixel_size_A, with_ctf
        self.device = device
        data = torch.from_numpy(np.ascontiguousarray(volume.data, np.float32))
        self._volume = FourierVolume.from_volume(data.to(device))

    def images(self, particles: Particles, rows: Shaped[np.ndarray, " n"]) -> Float[Tensor, "n box box"]:
        """Signals of these rows: (n, D, D) float32."""
        rotation, shift = particles.require_poses()
        out = torch.empty(len(rows), self.box_px, self.box_px, device=self.device)
        groups = np.asarray(particles.optics)[rows]
        for g in np.unique(groups):
            where = np.flatnonzero(groups == g)
            group = particles.groups[g]
            seen = self._frequencies(group)
            plane = scatter_to_half_plane(self._group(particles, rows[where], group, seen, rotation, shift), seen)
            out[torch.from_numpy(where).to(self.device)] = fourier_to_images(plane, self.box_px)
        return out

    def _frequencies(self, group: OpticsGroup) -> Disc:
        """The image frequencies covered by the map: |M k| up to the map's Nyquist circle."""
        largest = float(np.linalg.norm(np.reshape(group.magnification, (2, 2)), 2))
        return fourier_disc(self.box_px, (self.box_px - 1) // 2 / max(largest, 1.0), with_dc=True)

    def _group(
        self,
        particles: Particles,
        rows: np.ndarray,
        group: OpticsGroup,
        seen: Disc,
        rotation: np.ndarray,
        shift: np.ndarray,
    ) -> Tensor:
        """(n, K) Fourier coefficients of particles of one optics group."""
        poses = torch.from_numpy(np.ascontiguousarray(rotation[rows], np.float32)).to(self.device)
        if group.magnification != (1.0, 0.0, 0.0, 1.0):
            poses = magnified(poses, torch.tensor(group.magnification, dtype=poses.dtype).reshape(2, 2))
        values = self._volume.slices(poses, seen)
        ky, kx = seen.frequencies(1.0)
        phases = shift_phases(ky, kx, torch.from_numpy(-shift[rows] / self.pixel_size_A))
        values = values * phases.to(values)
        return through_optics(values, particles, rows, group, seen, self.pixel_size_A) if self.with_ctf else values


def through_optics(
    values: Tensor, particles: Particles, rows: np.ndarray, group: OpticsGroup, seen: Disc, pixel_size_A: float
) -> Tensor:
    """Coefficients (n, K) of particles of one optics group, multiplied by their CTFs and the phases of the optics."""
    freq = seen.frequencies(pixel_size_A)
    transfer = ctf_for(particles, rows, freq_invA=freq, device=values.device)
    values = values * (transfer.square() if group.ctf_applied == "premultiplied" else transfer)
    if any(group.beam_tilt_mrad) or any(group.odd_zernike):
        values = values * beam_tilt_phase(*freq, group).to(values)
    return values


class SimulatedSource:
    """Simulated particles as an image source (``core.protocols.ImageSource``), to test algorithms against known truth.

    An image depends only on (map, seed, its own row); in particular neither on the order nor on the number of images
    read together (up to the rounding of float32).
    """

    def __init__(
        self,
        volume: DensityMap,
        particles: Particles,
        seed: int = 1,
        spectrum: np.ndarray | None = None,
        *,
        noise: bool = True,
    ) -> None:
        """
        Args:
            volume: the truth, in units of the noise's standard deviation per projected pixel.
            particles: with poses and shifts.
            seed: of the noise.
            spectrum: (D//2+1,) of the noise (default white of variance 1).
            noise: False for noise-free images.
        """
        particles.require_poses()
        self.particles, self.box_px, self.volume, self.seed = particles, volume.box_px, volume, seed
        self.spectrum = np.ones(self.box_px // 2 + 1) if spectrum is None else np.asarray(spectrum, np.float64)
        self.noise = noise
        self._projector = Projector(volume)

    def __len__(self) -> int:
        return len(self.particles)

    def read(self, rows: Shaped[np.ndarray, " n"] | slice) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32."""
        rows = np.arange(len(self.particles))[rows]
        out = np.empty((len(rows), self.box_px, self.box_px), np.float32)
        step = max(1, BLOCK_PIXELS // self.box_px**2)
        for i in range(0, len(rows), step):
            part = rows[i : i + step]
            images = self._projector.images(self.particles, part)
            if self.noise:
                images += self._noise(self.particles.uid[part])
            out[i : i + step] = images.numpy()
        return out

    def blocks(self, size: int = 512) -> Iterator[np.ndarray]:
        """All images in order, in blocks of at most ``size``."""
        for i in range(0, len(self), size):
            yield self.read(np.arange(i, min(i + size, len(self))))

    def signal(self, rows: Shaped[np.ndarray, " n"] | slice) -> Float[np.ndarray, "n box box"]:
        """The images without their noise: (n, D, D) float32."""
        return self._projector.images(self.particles, np.arange(len(self.particles))[rows]).numpy()

    def _noise(self, uids: np.ndarray) -> Tensor:
        shape = (self.box_px, self.box_px)
        white = [generator(self.seed, "image noise", u).standard_normal(shape, np.float32) for u in uids.tolist()]
        return colour_noise(torch.from_numpy(np.stack(white)), self.spectrum)

    def measured(self) -> dict[str, float]:
        """Measured properties of the set, from its first images: dB of signal over noise, and the paper's number.

        Empty for noise-free images.
        """
        if not self.noise:
            return {}
        rows = np.arange(min(SNR_IMAGES, len(self)))
        variance = float(self.signal(rows).var((1, 2)).mean())
        return {
            "snr_dB": float(10 * np.log10(variance)),
            "image_to_background_dB": image_to_background_db(self.read(rows), 0.5 * self.box_px),
        }


def simulate(
    volume: DensityMap,
    n: int,
    *,
    snr_db: float | None = -10.0,
    views: Views | GivenViews | None = None,
    ctf: CtfRanges | Particles | None = None,
    shift_sd_A: float = 0.0,
    noise: str = "white",
    noise_table: ArrayLike | None = None,
    seed: int = 1,
) -> SimulatedSource:
    """A simulated particle set.

    Args:
        volume: the truth, on any scale; the source's own ``volume`` is scaled to the SNR.
        n: number of particles.
        snr_db: see the module's docstring; None for noise-free images and the map as it is.
        views, ctf, shift_sd_A, seed: as for :func:`make_particles`.
        noise, noise_table: ``kind`` and ``table`` of :func:`cryoiso.physics.noise.noise_spectrum`.

    Returns:
        The source; ``.particles`` holds the truth.
    """
    particles = make_particles(
        n, volume.box_px, volume.pixel_size_A, views=views, ctf=ctf, shift_sd_A=shift_sd_A, seed=seed
    )
    if snr_db is None:
        return SimulatedSource(volume, particles, seed, noise=False)
    scaled = replace(volume, data=volume.data * scale_for_snr(volume, particles, snr_db, seed))
    return SimulatedSource(scaled, particles, seed, noise_spectrum(volume.box_px, noise, table=noise_table))


def scale_for_snr(volume: DensityMap, particles: Particles, snr_db: float, seed: int = 1) -> np.float32:
    """Factor on a map that gives its images a signal-to-noise ratio against noise of variance 1.

    The signal's variance is the mean over uniform views with the particles' CTFs, regardless of their own views, so
    that sets of different view distributions share one map.

    Raises:
        InputError: the map is constant.
    """
    some = particles.take(np.arange(min(SNR_IMAGES, len(particles))))
    uids = np.arange(SNR_IMAGES, dtype=np.uint64)
    rows = np.arange(SNR_IMAGES) % len(some)
    even = some.take(rows).with_poses(sample_rotations(Views(), uids, seed), np.zeros((SNR_IMAGES, 2)))
    variance = float(Projector(volume).images(even, np.arange(SNR_IMAGES)).double().var((1, 2)).mean())
    if not variance > 0:
        raise InputError(
            "the map is constant: nothing to simulate",
            expected="density",
            found=f"variance {variance}",
            code="map-without-density",
        )
    return np.float32(np.sqrt(10 ** (snr_db / 10) / variance))


def image_to_background_db(images: Float[np.ndarray, "n box box"], radius_px: float) -> float:
    """The SNR of the cryoPROS paper: (10 / N) sum_i [log10 var(x_i - mu_b) - log10 var(b_i)].

    Image x and its background b, here the pixels outside a circle, with mean mu_b. The numerator contains signal and
    noise, so an image without signal has 0 dB.

    Args:
        images: (N, D, D).
        radius_px: of the circle that contains the particle.
    """
    from cryoiso.physics.noise import background_statistics

    x = np.asarray(images, np.float64)
    mean, sd = background_statistics(x, radius_px)
    return float(10 * np.mean(np.log10((x - mean[:, None, None]).var((1, 2))) - 2 * np.log10(sd)))
