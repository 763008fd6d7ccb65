"""STAR files of two optics groups, and particles that only memory holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryoiso.core.types import OpticsGroup, Particles

OPTICS = """data_optics
loop_
_rlnOpticsGroup
_rlnOpticsGroupName
_rlnVoltage
_rlnSphericalAberration
_rlnAmplitudeContrast
_rlnImagePixelSize
_rlnImageSize
7 fine 300 2.7 0.1 1.25 64
3 coarse 200 2.0 0.07 2.5 64
"""


HEAD = """
data_particles
loop_
_rlnImageName
_rlnDefocusU
_rlnDefocusV
_rlnDefocusAngle
_rlnOpticsGroup
_rlnMyOwnColumn
_rlnAngleRot
_rlnAngleTilt
_rlnAnglePsi
_rlnOriginXAngst
_rlnOriginYAngst
_rlnRandomSubset
"""


ROWS = [
    "000001@a.mrcs 10000.10 9000 30 7 00017 10 20 30 1.5 -2.5 1",
    "000001@b.mrcs 11000.20 9100 31 3 1e3 -11 95 170 0 0 2",
    "000002@a.mrcs 12000.30 9200 32 7 0x1f 10 -20 30 3 4 1",
    '000002@b.mrcs 13000.40 9300 33 3 "two words" 0 0 0 0.000001 4 2',
]


def star(folder: Path, optics: str = OPTICS, rows: list[str] = ROWS, head: str = HEAD) -> Path:
    path = folder / "particles.star"
    path.write_text(optics + head + "\n".join(rows) + "\n")
    return path


def memory_particles(n: int) -> Particles:
    group = OpticsGroup(
        4, "mine", 1.7000000000000002, 48, 300.0, 2.7, 0.1, (0.1, -0.2), (1.01, 0.0, 0.001, 0.99), (1.5, 0.25), (0.5,)
    )
    ones = np.ones(n)
    return Particles(
        uid=np.arange(n, dtype=np.uint64) + np.uint64(2**63),
        optics=np.zeros(n, np.int32),
        groups=(group,),
        stack=np.full(n, "s.mrcs"),
        index=np.arange(n),
        defocus_u_A=ones * 12345.5,
        defocus_v_A=ones * 12000.25,
        defocus_angle_deg=ones * -12.5,
        phase_shift_deg=ones * 90,
        ctf_bfactor_A2=ones * 30,
        ctf_scale=ones * 0.5,
        half=(np.arange(n) % 3).astype(np.int8),
    )
