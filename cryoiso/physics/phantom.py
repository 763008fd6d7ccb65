"""A protein-like C3 trimer generated from a seed, and homologues of it: test objects that need no downloaded model.

A protomer is a chain of pseudo-residues threaded through helices and strands: a long central helix, a helix packed
against it and a small sheet form a thin stem (negative z), two sheets face to face with three helices form a wider head
(positive z). Three copies around z are about 135 Å long and 45 Å wide. Both ends differ and no part is its own mirror
image, so wrong poses are detectable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.core.types import DensityMap
from cryoiso.physics.so3 import rotvec_to_matrix
from cryoiso.physics.symmetry import point_group

if TYPE_CHECKING:
    from jaxtyping import Float

HELIX_RISE_A, HELIX_TURN_DEG, HELIX_RADIUS_A = 1.5, 100.0, 2.3
STRAND_RISE_A, LOOP_STEP_A, SIDE_CHAIN_A = 3.3, 3.6, 2.4


class PseudoAtoms(NamedTuple):
    """Gaussian blobs that form a density."""

    coords_A: Float[np.ndarray, "n 3"]
    """(n, 3) x, y, z relative to the centre."""
    weights: Float[np.ndarray, " n"]
    """(n,) integral of each blob."""
    sigma_A: Float[np.ndarray, " n"]
    """(n,) standard deviation of each blob."""


@dataclass(frozen=True)
class _Element:
    """A helix or strand from start to end; ``twist_deg`` turns it around its own axis."""

    kind: str
    start_A: np.ndarray
    end_A: np.ndarray
    twist_deg: float = 0.0


WIDTH_A = 160.0
"""Of the trimer, with room for its blur."""


def trimer(seed: int = 1) -> PseudoAtoms:
    """The trimer of a seed: pseudo-atoms (about 1,600) with C3 symmetry about z.

    Args:
        seed: any integer; every seed gives another protein of the same architecture.

    Returns:
        PseudoAtoms, unpackable as coords_A (n,3), weights (n,), sigma_A (n,).
    """
    return _assemble(_protomer_elements(seed), seed, seed)


def homologue(seed: int = 1, variant: int = 1, displacement_A: float = 2.5) -> PseudoAtoms:
    """A relative of ``trimer(seed)``: the same fold with displaced and exchanged parts and other side chains.

    Every helix and strand is moved by about ``displacement_A`` and rotated by some degrees, loops and most side chains
    are redrawn, and one strand of the head becomes a helix.

    Args:
        seed: of the trimer.
        variant: which relative.
        displacement_A: length of the displacements, drawn between 2/3 and 4/3 of it.

    Returns:
        PseudoAtoms with C3 symmetry about z.
    """
    rng = generator(seed, "phantom homologue", variant)
    elements = [_displaced(e, rng, displacement_A) for e in _protomer_elements(seed)]
    strands = [i for i, e in enumerate(elements) if e.kind == "strand"]
    exchanged = int(rng.choice(strands[4:]))
    elements[exchanged] = replace(elements[exchanged], kind="helix")
    return _assemble(elements, seed, seed + 7919 * variant + 1)


def _displaced(e: _Element, rng: np.random.Generator, displacement_A: float) -> _Element:
    direction = rng.standard_normal(3)
    move = direction / np.linalg.norm(direction) * displacement_A * rng.uniform(2 / 3, 4 / 3)
    turn = rotvec_to_matrix(np.radians(rng.normal(0, 0.7 * displacement_A, 3)))[0]
    middle = (e.start_A + e.end_A) / 2
    start, end = ((p - middle) @ turn.T + middle + move for p in (e.start_A, e.end_A))
    return replace(e, start_A=start, end_A=end, twist_deg=e.twist_deg + rng.normal(0, 20))


def _protomer_elements(seed: int) -> list[_Element]:
    """Helices and strands of one protomer in the order of the chain, placed around +x."""
    rng = generator(seed, "phantom fold")

    def at(radius: float, angle_deg: float, z: float) -> np.ndarray:
        a = math.radians(angle_deg)
        return np.array([radius * math.cos(a), radius * math.sin(a), z]) + rng.normal(0, 1.2, 3)

    turn = (-52, -32, -12)
    elements = [_Element("strand", at(14, a, -64 + 2 * i), at(17, a + 18, -46 + 2 * i)) for i, a in enumerate(turn)]
    elements.append(_Element("helix", at(16.5, 8, -36), at(15, 32, 4), rng.uniform(0, 360)))
    sheets = ((9.0, -40.0), (18.5, -46.0))
    for sheet, (radius, first) in enumerate(sheets):
        spread = 28.0 if sheet == 0 else 18.0
        for i in range(4):
            low = at(radius, first + spread * i, 18 + 3 * i + 5 * sheet)
            high = at(radius + 1.5 - sheet, first + spread * (i + 0.5), 46 + 2 * i - 3 * sheet)
            elements.append(_Element("strand", *((low, high) if i % 2 == 0 else (high, low))))
    elements.append(_Element("helix", at(13, -34, 53), at(14, 38, 59), rng.uniform(0, 360)))
    elements.append(_Element("helix", at(9, 50, 62), at(19, -12, 65), rng.uniform(0, 360)))
    elements.append(_Element("helix", at(20, 36, 38), at(17, 44, 12), rng.uniform(0, 360)))
    elements.append(_Element("helix", at(6.8, -8, 15), at(7.2, 52, -62), rng.uniform(0, 360)))
    return elements


def _assemble(elements: list[_Element], seed: int, chain_seed: int) -> PseudoAtoms:
    """Thread the chain, add side chains, and make the three copies."""
    path_rng = generator(chain_seed, "phantom loops")
    common, own = generator(seed, "phantom side chains"), generator(chain_seed, "phantom side chains of its own")
    backbone, outward = _thread(elements, path_rng)
    n = len(backbone)
    mass = common.choice([0.3, 0.8, 1.2, 1.8, 2.4], 4000)[:n]
    if chain_seed != seed:
        redrawn = own.random(n) < 0.55
        mass = np.where(redrawn, own.choice([0.3, 0.8, 1.2, 1.8, 2.4], n), mass)
    side = backbone + outward * (SIDE_CHAIN_A * np.sqrt(mass))[:, None]
    coords = np.concatenate([backbone, side])
    weights = np.concatenate([np.full(n, 4.0), 3.0 * mass])
    sigma = np.concatenate([np.full(n, 1.2), np.full(n, 1.5)])
    copies = np.concatenate([coords @ op.T for op in point_group("C3")])
    return PseudoAtoms(copies, np.tile(weights, 3), np.tile(sigma, 3))


def _thread(elements: list[_Element], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Residue positions (n,3) and unit vectors (n,3) towards their side chains, along the chain."""
    positions: list[np.ndarray] = []
    for e in elements:
        residues = _helix(e) if e.kind == "helix" else _strand(e)
        if positions:
            positions.append(_loop(positions[-1][-1], residues[0], rng))
        positions.append(residues)
    path = np.concatenate(positions)
    # side chains point away from the local middle of the chain, as on helices and strands
    middle = np.stack([np.convolve(np.pad(path[:, a], 2, "edge"), np.ones(5) / 5, "valid") for a in range(3)], 1)
    outward = path - middle + 0.3 * rng.standard_normal(path.shape)
    return path, outward / np.linalg.norm(outward, axis=1, keepdims=True)


def _frame(e: _Element) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Length and right-handed unit vectors (u, v, axis) of an element."""
    axis = e.end_A - e.start_A
    length = float(np.linalg.norm(axis))
    axis = axis / length
    u = np.cross(axis, [0.0, 0.0, 1.0] if abs(axis[2]) < 0.9 else [1.0, 0.0, 0.0])
    u /= np.linalg.norm(u)
    return length, u, np.cross(axis, u), axis


def _helix(e: _Element) -> np.ndarray:
    """A right-handed alpha helix."""
    length, u, v, axis = _frame(e)
    t = np.arange(0, length, HELIX_RISE_A)[:, None]
    angle = np.radians(e.twist_deg + HELIX_TURN_DEG * t / HELIX_RISE_A)
    points_A: np.ndarray = e.start_A + axis * t + HELIX_RADIUS_A * (np.cos(angle) * u + np.sin(angle) * v)
    return points_A


def _strand(e: _Element) -> np.ndarray:
    """A pleated strand."""
    length, u, v, axis = _frame(e)
    t = np.arange(0, length, STRAND_RISE_A)[:, None]
    angle = np.radians(e.twist_deg + 20 * t / STRAND_RISE_A)
    pleat = np.where(np.arange(len(t)) % 2, 0.9, -0.9)[:, None]
    points_A: np.ndarray = e.start_A + axis * t + pleat * (np.cos(angle) * u + np.sin(angle) * v)
    return points_A


def _loop(start: np.ndarray, end: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bent path of residues between two points (both left out), bulging in a random direction."""
    gap = float(np.linalg.norm(end - start))
    count = max(2, round(1.15 * gap / LOOP_STEP_A))
    t = (np.arange(count) + 1)[:, None] / (count + 1)
    bulge = rng.standard_normal(3)
    bulge *= min(4.0, 0.25 * gap) / np.linalg.norm(bulge)
    points_A: np.ndarray = start + (end - start) * t + bulge * np.sin(np.pi * t) + rng.normal(0, 0.4, (count, 3))
    return points_A


def pseudo_atoms_to_map(
    coords_A: Float[np.ndarray, "n 3"],
    weights: Float[np.ndarray, " n"],
    sigma_A: Float[np.ndarray, " n"] | float,
    box_px: int,
    pixel_size_A: float,
    resolution_A: float,
) -> DensityMap:
    """The band-limited density of Gaussian blobs, summed exactly in Fourier space.

    F(k) = sum_a w_a exp(-2 pi i k.r_a) exp(-2 pi^2 (sigma_a^2 + sigma_r^2) k^2) inside the Nyquist sphere, with
    sigma_r = 0.225 resolution. The sum factorises over the axes, so it is one matrix product per plane.

    Args:
        coords_A: (n, 3) x, y, z in Å from voxel D//2.
        weights: (n,) integrals of the blobs.
        sigma_A: (n,) or float, their own widths.
        box_px: D.
        pixel_size_A: Å.
        resolution_A: blur to this resolution.

    Returns:
        DensityMap in weight per Å^3.

    Raises:
        InputError: the blobs reach beyond the box.
    """
    coords = np.asarray(coords_A, np.float64)
    reach = float(np.abs(coords).max()) + 2 * resolution_A * 0.225
    if reach > box_px * pixel_size_A / 2:
        raise InputError(
            "the model does not fit into the box",
            expected=f"at least {math.ceil(2 * reach / pixel_size_A)} px of {pixel_size_A} Å",
            found=f"{box_px} px",
            code="model-exceeds-box",
        )
    variance = np.broadcast_to(np.asarray(sigma_A, np.float64), len(coords)) ** 2 + (0.225 * resolution_A) ** 2
    full = np.fft.fftfreq(box_px, pixel_size_A)
    half = np.arange(box_px // 2 + 1) / (box_px * pixel_size_A)
    z, y, x = (_axis_factors(coords[:, a], variance, k) for a, k in ((2, full), (1, full), (0, half)))
    y = y * torch.from_numpy(np.asarray(weights, np.float32))
    transform = torch.stack([(y * plane) @ x.T for plane in z])
    inside = full[:, None, None] ** 2 + full[:, None] ** 2 + half**2 < (0.5 / pixel_size_A) ** 2
    transform = transform * torch.from_numpy(inside)
    density = torch.fft.fftshift(torch.fft.irfftn(transform, s=(box_px,) * 3)) / pixel_size_A**3
    return DensityMap(density.float().numpy(), pixel_size_A)


def _axis_factors(position_A: np.ndarray, variance: np.ndarray, freq: np.ndarray) -> torch.Tensor:
    """(K, n) complex64: one axis's phases and Gaussian fall-off of every blob."""
    phase = -2 * np.pi * freq[:, None] * position_A
    fall_off = np.exp(-2 * np.pi**2 * variance * freq[:, None] ** 2)
    return torch.from_numpy((fall_off * np.exp(1j * phase)).astype(np.complex64))


def phantom_map(
    box_px: int, pixel_size_A: float, resolution_A: float = 6.0, *, seed: int = 1, variant: int = 0
) -> DensityMap:
    """Density of the trimer (variant 0) or of a homologue of it (variant 1, 2, ...).

    Args:
        box_px, pixel_size_A, resolution_A: as for :func:`pseudo_atoms_to_map`; 135 Å must fit.
        seed: of the trimer.
        variant: which homologue.
    """
    atoms = homologue(seed, variant) if variant else trimer(seed)
    return pseudo_atoms_to_map(*atoms, box_px, pixel_size_A, resolution_A)


def phantom_of_box(box_px: int, pixel_size_A: float, resolution_px: float) -> DensityMap:
    """The trimer scaled so that it fills two thirds of a box, for tests of speed, which need its size and not its own.

    Args:
        pixel_size_A: stated by the map.
        resolution_px: resolution in pixels.
    """
    fitting_A = WIDTH_A / (0.67 * box_px)
    return DensityMap(phantom_map(box_px, fitting_A, resolution_px * fitting_A).data, pixel_size_A)
