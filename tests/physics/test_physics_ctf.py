"""The CTF against a formula written out independently, and against RELION itself."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.physics import so3
from cryoiso.physics.contrast_transfer import (
    beam_tilt_phase,
    ctf,
    ctf_for,
    frequency_grid,
    wavelength_A,
    zernike_index,
    zernike_sum,
)

BOX, PIXEL_A = 64, 1.5
MICROSCOPE = {"voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}
DEFOCUS = {"defocus_u_A": 15000.0, "defocus_v_A": 13000.0, "defocus_angle_deg": 33.0}
EVEN = (0.3, 2.0, -3.0, 4.0, 10.0, -6.0, 7.0, 8.0, 9.0)
ODD = (3.0, 20.0, -30.0, 40.0, 10.0, -60.0)
MAGNIFICATION = (1.02, 0.015, -0.01, 0.98)
PLAIN = [0.1, 0.946949, 0.989675, 0.60475, 0.722945, 0.436691]
FULL = [-0.302379, -0.589546, -0.527582, 0.029599, 0.189627, -0.156242]


def group(**changes) -> OpticsGroup:
    return replace(OpticsGroup(1, "g", PIXEL_A, BOX, 300.0, 2.7, 0.1), **changes)


def particles(groups=None, n: int = 1, **columns) -> Particles:
    def column(name, default):
        return np.broadcast_to(np.asarray(columns.get(name, default), np.float64), n).copy()

    groups = groups or (group(),)
    return Particles(
        uid=np.arange(n, dtype=np.uint64),
        optics=np.asarray(columns.get("optics", np.zeros(n)), np.int32),
        groups=tuple(groups),
        stack=np.full(n, "a.mrcs"),
        index=np.arange(n),
        defocus_u_A=column("defocus_u_A", 15000.0),
        defocus_v_A=column("defocus_v_A", 13000.0),
        defocus_angle_deg=column("defocus_angle_deg", 33.0),
        phase_shift_deg=column("phase_shift_deg", 0.0),
        ctf_bfactor_A2=column("ctf_bfactor_A2", 0.0),
        ctf_scale=column("ctf_scale", 1.0),
    )


def textbook(box, pixel, du, dv, angle, kv, cs, w, phase=0.0, b=0.0, scale=1.0) -> np.ndarray:
    """sqrt(1 - w^2) sin g + w cos g, in polar coordinates, from the constants of nature's rounded product."""
    volt = kv * 1000
    lam = 12.2643247 / np.sqrt(volt + 0.978466e-6 * volt**2)
    ky, kx = np.meshgrid(np.fft.fftfreq(box, pixel), np.fft.rfftfreq(box, pixel), indexing="ij")
    s, theta = np.hypot(kx, ky), np.arctan2(ky, kx)
    df = (du + dv) / 2 + (du - dv) / 2 * np.cos(2 * (theta - np.radians(angle)))
    g = np.pi * lam * df * s**2 - np.pi / 2 * (cs * 1e7) * lam**3 * s**4 + np.radians(phase)
    return scale * np.exp(-b * s**2 / 4) * (np.sqrt(1 - w**2) * np.sin(g) + w * np.cos(g))


def test_wavelengths_are_the_relativistic_ones():
    from scipy import constants as c

    for kv in (80.0, 200.0, 300.0):
        energy = c.e * kv * 1e3
        exact = c.h / np.sqrt(2 * c.m_e * energy * (1 + energy / (2 * c.m_e * c.c**2))) * 1e10
        assert wavelength_A(kv) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("box", [64, 65])
def test_ctf_is_the_textbooks(box):
    rng = np.random.default_rng(0)
    fy, fx = frequency_grid(box, 1.1)
    cases = ((300, 2.7, 0.1, 0, 0, 1), (200, 0.001, 0.07, 90, 0, 1), (300, 2.0, 0.0, 20, 60, 0.7))
    for kv, cs, w, phase, b, scale in cases:
        du, dv, angle = rng.uniform(5e3, 4e4), rng.uniform(5e3, 4e4), rng.uniform(-180, 180)
        ours = ctf(
            fy, fx, defocus_u_A=du, defocus_v_A=dv, defocus_angle_deg=angle, voltage_kV=kv, spherical_aberration_mm=cs,
            amplitude_contrast=w, phase_shift_deg=phase, bfactor_A2=b, scale=scale,
        )  # fmt: skip
        np.testing.assert_allclose(ours, textbook(box, 1.1, du, dv, angle, kv, cs, w, phase, b, scale), atol=1e-9)


def test_white_protein_stays_white_at_zero_frequency():
    fy, fx = frequency_grid(8, 1.0)
    assert ctf(fy, fx, **DEFOCUS, **MICROSCOPE)[0, 0] == pytest.approx(0.1)


@pytest.mark.parametrize("box", [64, 65])
def test_many_particles_at_once_are_the_single_ones(box):
    """Two optics groups, interleaved rows; float32 keeps 1e-4 at 4 um defocus and 0.6 Å pixels."""
    rng = np.random.default_rng(1)
    n = 40
    groups = (group(pixel_size_A=0.6, box_px=box), OpticsGroup(5, "h", 1.3, box, 200.0, 0.01, 0.07))
    p = particles(
        groups, n, optics=rng.integers(2, size=n), defocus_u_A=rng.uniform(1e4, 4e4, n),
        defocus_v_A=rng.uniform(1e4, 4e4, n), defocus_angle_deg=rng.uniform(-180, 180, n),
        phase_shift_deg=rng.uniform(0, 180, n), ctf_bfactor_A2=rng.uniform(-20, 80, n),
        ctf_scale=rng.uniform(0.5, 2, n),
    )  # fmt: skip
    rows = rng.permutation(n)[:30]
    ours = ctf_for(p, rows)
    assert ours.dtype == torch.float32 and ours.shape == (30, box, box // 2 + 1)
    for i, r in enumerate(rows):
        g = groups[p.optics[r]]
        one = textbook(
            box, g.pixel_size_A, p.defocus_u_A[r], p.defocus_v_A[r], p.defocus_angle_deg[r], g.voltage_kV,
            g.spherical_aberration_mm, g.amplitude_contrast, p.phase_shift_deg[r], p.ctf_bfactor_A2[r], p.ctf_scale[r],
        )  # fmt: skip
        np.testing.assert_allclose(ours[i], one, atol=2e-6 * np.abs(one).max(), rtol=1e-5)


def test_given_frequencies_and_boxes():
    p = particles(n=3, defocus_u_A=[1e4, 2e4, 3e4])
    whole = ctf_for(p, dtype=torch.float64)
    fy, fx = frequency_grid(BOX, PIXEL_A)
    picked = ctf_for(p, [2, 0], freq_invA=(fy[[3, 5, 60], 0], fx[0, [1, 2, 30]]), dtype=torch.float64)
    np.testing.assert_allclose(picked, whole[[2, 0]][:, [3, 5, 60], [1, 2, 30]], atol=1e-12)
    # an image cropped in Fourier space to half the box has twice the pixel and the same low frequencies
    small = ctf_for(p, None, BOX // 2, pixel_size_A=2 * PIXEL_A, dtype=torch.float64)
    np.testing.assert_allclose(small[:, :10, :10], whole[:, :10, :10], atol=1e-12)
    mixed = particles((group(), group(box_px=32)), 2, optics=[0, 1])
    with raises_code("box-mismatch", InputError):
        ctf_for(mixed)


def test_gradients_reach_the_defocus():
    fy, fx = frequency_grid(16, 2.0)
    du = torch.tensor([[[12000.0]], [[20000.0]]], dtype=torch.float64, requires_grad=True)

    def f(u):
        return ctf(fy, fx, defocus_u_A=u, defocus_v_A=15000.0, defocus_angle_deg=10.0, **MICROSCOPE)

    assert f(du).shape == (2, 16, 9)
    assert torch.autograd.gradcheck(f, du)


def test_inputs_are_left_alone():
    du = torch.tensor([15000.0])
    fy, fx = frequency_grid(8, 1.0)
    first = ctf(fy, fx, defocus_u_A=du, defocus_v_A=1e4, defocus_angle_deg=3.0, **MICROSCOPE)
    second = ctf(fy, fx, defocus_u_A=du, defocus_v_A=1e4, defocus_angle_deg=3.0, **MICROSCOPE)
    assert du.item() == 15000.0 and torch.equal(first, second)


def test_zernike_polynomials_are_the_standard_ones():
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (7, 9)), indexing="ij")
    r2 = x * x + y * y
    expected = {
        (True, 0): y, (True, 1): x, (True, 3): (3 * r2 - 2) * y, (True, 4): (3 * r2 - 2) * x,
        (True, 5): x**3 - 3 * x * y * y, (False, 0): torch.ones_like(x), (False, 1): 2 * x * y, (False, 2): 2 * r2 - 1,
        (False, 3): x * x - y * y, (False, 6): 6 * r2 * r2 - 6 * r2 + 1,
    }  # fmt: skip
    for (odd, i), value in expected.items():
        coefficients = [0.0] * i + [1.0]
        np.testing.assert_allclose(zernike_sum(y, x, coefficients, odd=odd), value, atol=1e-12)
    assert [zernike_index(i, True) for i in (5, 6)] == [(3, 3), (-5, 5)]


def test_beam_tilt_is_coma_and_odd():
    """A beam tilt equals the Zernike terms that RELION makes of it: Z(1,3) and its share of Z(1,1)."""
    fy, fx = frequency_grid(33, PIXEL_A)
    tilt = beam_tilt_phase(fy, fx, group(beam_tilt_mrad=(2.0, -0.7)))
    scale = -2 * np.pi * 2.7e7 * 1e-3 * wavelength_A(300) ** 2 / 3
    odd = (2 * scale * -0.7, 2 * scale * 2.0, 0.0, scale * -0.7, scale * 2.0)
    np.testing.assert_allclose(tilt, beam_tilt_phase(fy, fx, group(odd_zernike=odd)), atol=1e-9)
    np.testing.assert_allclose(tilt.abs(), 1, atol=1e-12)
    np.testing.assert_allclose((tilt[1:].flip(0) * tilt[1:])[:, 0], 1, atol=1e-9)  # Friedel mates on the kx = 0 column


def test_values_that_relion_printed():
    """From relion_project 3.1.3 (a point's image with CTF over that without), at (ky, kx) of a 64 px half-plane."""
    where = [(0, 0), (5, 7), (-9, 3), (0, 25), (20, 20), (-14, 22)]
    plain = ctf_for(particles(), dtype=torch.float64)[0]
    aberrated = group(even_zernike=EVEN, magnification=MAGNIFICATION)
    full = particles((aberrated,), phase_shift_deg=70.0, ctf_bfactor_A2=30.0, ctf_scale=0.7)
    full = ctf_for(full, dtype=torch.float64)[0]
    np.testing.assert_allclose([plain[k] for k in where], PLAIN, atol=2e-6)
    np.testing.assert_allclose([full[k] for k in where], FULL, atol=2e-6)


OPTICS = (
    "OpticsGroupName OpticsGroup MicrographOriginalPixelSize Voltage SphericalAberration AmplitudeContrast "
    "ImagePixelSize ImageSize ImageDimensionality"
)
ROWS = "OpticsGroup MicrographName DefocusU DefocusV DefocusAngle AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst"


def write_star(path: Path, rows: list[str], optics: dict[str, str], columns: str) -> None:
    names = [*OPTICS.split(), *optics]
    values = f"g1 1 {PIXEL_A} 300.0 2.7 0.1 {PIXEL_A} {BOX} 2 {' '.join(optics.values())}"
    text = ["# version 30001", "", "data_optics", "", "loop_", *(f"_rln{n}" for n in names), values, ""]
    text += ["# version 30001", "", "data_particles", "", "loop_", *(f"_rln{n}" for n in columns.split()), *rows, ""]
    path.write_text("\n".join(text) + "\n")


def relion(*command: object, cwd: Path) -> None:
    subprocess.run([str(c) for c in command], cwd=cwd, check=True, capture_output=True)


def relions_ctf(folder: Path, optics: dict[str, str], extra: dict[str, str]) -> np.ndarray:
    """relion_project's image of a point with the CTF, over that without, as a half-plane."""
    import mrcfile

    point = np.zeros((BOX,) * 3, np.float32)
    point[BOX // 2, BOX // 2, BOX // 2] = 1
    with mrcfile.new(folder / "point.mrc") as m:
        m.set_data(point)
        m.voxel_size = PIXEL_A
    row = "1 m.mrc 15000 13000 33 0 0 0 0 0 " + " ".join(extra.values())
    write_star(folder / "in.star", [row], optics, f"{ROWS} {' '.join(extra)}")
    transforms = []
    for flags in ([], ["--ctf"]):
        files = ("--i", "point.mrc", "--ang", "in.star", "--o", "out")
        relion("relion_project", *files, "--angpix", PIXEL_A, *flags, cwd=folder)
        image = mrcfile.read(folder / "out.mrcs").reshape(BOX, BOX).astype(np.float64)
        transforms.append(np.fft.rfft2(np.fft.ifftshift(image)))
    return transforms[1] / transforms[0]


CASES = {
    "plain": ({}, {}),
    "phase plate": ({}, {"PhaseShift": "70"}),
    "B-factor and scale": ({}, {"CtfBfactor": "30", "CtfScalefactor": "0.7"}),
    "magnification": ({f"MagMat{k}": str(v) for k, v in zip(("00", "01", "10", "11"), MAGNIFICATION)}, {}),
    "even Zernike": ({"EvenZernike": "[" + ",".join(map(str, EVEN)) + "]"}, {}),
}


@pytest.mark.relion
@pytest.mark.parametrize("case", CASES)
def test_ctf_is_relions(case, tmp_path):
    optics, extra = CASES[case]
    changes = {}
    if "MagMat00" in optics:
        changes["magnification"] = MAGNIFICATION
    if "EvenZernike" in optics:
        changes["even_zernike"] = EVEN
    p = particles(
        (group(**changes),),
        phase_shift_deg=float(extra.get("PhaseShift", 0)),
        ctf_bfactor_A2=float(extra.get("CtfBfactor", 0)),
        ctf_scale=float(extra.get("CtfScalefactor", 1)),
    )
    fy, fx = frequency_grid(BOX, PIXEL_A)
    inside = torch.hypot(fx, fy).numpy() * BOX * PIXEL_A < BOX // 2 - 1
    theirs = relions_ctf(tmp_path, optics, extra)
    ours = ctf_for(p, dtype=torch.float64)[0].numpy()
    assert np.abs(theirs - ours)[inside].max() < 1e-6


@pytest.mark.relion
@pytest.mark.parametrize("kind", ["tilt", "odd Zernike"])
def test_aberrations_have_relions_sign(kind, tmp_path):
    """relion_reconstruct undoes our aberration: a point comes back sharp, and blurred with the other sign."""
    import mrcfile

    changed = group(beam_tilt_mrad=(8.0, -5.0)) if kind == "tilt" else group(odd_zernike=ODD)
    rotation = so3.random_rotations(np.random.default_rng(1), 150)
    point = np.array([6.0, -4.0, 9.0])
    fy, fx = frequency_grid(BOX, PIXEL_A)
    kernel = ctf(fy, fx, **{**DEFOCUS, "defocus_v_A": 15000.0}, **MICROSCOPE) * beam_tilt_phase(fy, fx, changed)
    where = rotation @ point
    cycles = where[:, 0, None, None] * fx.numpy() + where[:, 1, None, None] * fy.numpy()
    phases = np.exp(-2j * np.pi * PIXEL_A * cycles)
    images = np.fft.fftshift(np.fft.irfft2(kernel.numpy() * phases, s=(BOX, BOX)), axes=(1, 2)).astype(np.float32)
    with mrcfile.new(tmp_path / "images.mrcs") as m:
        m.set_data(images)
    euler = so3.matrix_to_euler(rotation)
    poses = [" ".join(f"{angle:.5f}" for angle in angles) for angles in euler]
    rows = [f"1 m.mrc 15000 15000 33 {pose} 0 0 {i + 1:06d}@images.mrcs" for i, pose in enumerate(poses)]
    peaks = []
    for sign in (1, -1):
        if kind == "tilt":
            optics = {"BeamTiltX": f"{8.0 * sign}", "BeamTiltY": f"{-5.0 * sign}"}
        else:
            optics = {"OddZernike": "[" + ",".join(str(sign * c) for c in ODD) + "]"}
        write_star(tmp_path / "in.star", rows, optics, f"{ROWS} ImageName")
        relion("relion_reconstruct", "--i", "in.star", "--o", "map.mrc", "--ctf", cwd=tmp_path)
        volume = mrcfile.read(tmp_path / "map.mrc")
        peaks.append(volume[BOX // 2 + 9, BOX // 2 - 4, BOX // 2 + 6])
    assert peaks[0] > 0.5 and peaks[0] > 10 * peaks[1]
