"""Sets with nuisances: haemagglutinin and beta-galactosidase with what makes real images worse, one at a time.

700 particles of 48 px, 95 % of them top views. `HA_plain` and `betagal_plain` are the same particles without any
nuisance; `_wide` sets have a larger box (neighbours), `_fine` sets smaller pixels (CTF), `_noisy` ones have so little
signal that many poses are wrong. nuisances.py refines them.

    python benchmarks/nuisance_sets.py --sets HA_plain,HA_all --picture sheet.png     # make sets and look at them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, particle_sets
from benchmarks.particle_sets import ParticleSet

REAL_NOISE = "particles/betagal_real_384/background.mrcs"
"""In shared/data: 101 patches of ice of 384 px of 0.637 Å."""
MICROGRAPHS = {"micrographs": 30}
NUISANCES: dict[str, Mapping[str, object]] = {
    "touching": {"neighbours": 0.8, "neighbour-distance": 0.6},
    "ice_by_view": {**MICROGRAPHS, "ice": (200.0, 900.0), "ice-view-correlation": 0.8},
    "scale": {**MICROGRAPHS, "scale-sd": 0.15, "micrograph-scale-sd": 0.3},
    "bfactor": {**MICROGRAPHS, "bfactor": (0.0, 300.0)},
    "junk_20": {"junk": ["broken=0.08", "empty=0.05", "pair=0.04", "other=0.03"]},
    "real_noise": {"noise-from": REAL_NOISE},
}  # fmt: skip
"""Options of `cryoiso simulate`. Diameters are those of the long axis: top views 0.6 apart do not overlap."""
CTF_NUISANCES: dict[str, Mapping[str, object]] = {
    "defocus_error": {
        **MICROGRAPHS, "defocus-per-micrograph": True, "stage-tilt": 15.0, "height-sd": 150.0,
        "defocus-error-sd": 300.0, "micrograph-defocus-error-sd": 500.0,
    },
    "beam_tilt": {**MICROGRAPHS, "beam-tilt": (3.0, -2.0)},
}  # fmt: skip
"""What only fine detail shows. The defocus errors are those of a fit per micrograph of a tilted, uneven film; they and
the beam tilt (mrad) are large, because the sets end at 6.4 Å."""
NUISANCES["all"] = {
    key: value for some in (*tuple(NUISANCES.values()), *CTF_NUISANCES.values()) for key, value in some.items()
}
_SEEDS = (3, 4, 5)
_VIEWS = {"mode": "preferred", "fraction": 0.95}
BASES: dict[str, ParticleSet] = {
    "HA": replace(particle_sets.SETS["one_pole_-13"], views=_VIEWS, particles=700, seeds=_SEEDS),
    "betagal": replace(
        particle_sets.SETS["D2"], views=_VIEWS, snr_db=-11, box=48, pixel_A=4.5, particles=700, seeds=_SEEDS
    ),
}
"""About 35 rare views each; without nuisances 2 % (HA) and 4 % of the poses are wrong (seed 3)."""
NOISY = replace(BASES["betagal"], snr_db=-14)
"""Here 42 % are wrong, so that nothing can be said of other nuisances: what answers to junk make of wrong poses."""


def _wide(one: ParticleSet) -> ParticleSet:
    """The same signal in each particle; room for neighbours at 1.2 diameters, whose rims begin at 0.7."""
    return replace(one, snr_db=one.snr_db - 2.5, box=64)


FINE_SNR_DB = {"HA": -9.0, "betagal": -10.0}


def _fine(one: ParticleSet, snr_db: float) -> ParticleSet:
    """Detail down to 6.4 Å, and the signal to see it."""
    return replace(one, snr_db=snr_db, box=64, pixel_A=3.2)


def _variants(prefix: str, one: ParticleSet, nuisances: Mapping[str, Mapping[str, object]]) -> dict[str, ParticleSet]:
    return {f"{prefix}_{name}": replace(one, nuisances=some) for name, some in {"plain": {}, **nuisances}.items()}


SETS: dict[str, ParticleSet] = {
    name: one
    for base, plain in BASES.items()
    for name, one in {
        **_variants(base, plain, NUISANCES),
        **_variants(f"{base}_wide", _wide(plain), {"neighbours": {"neighbours": 1.5, "neighbour-distance": 1.2}}),
        **_variants(f"{base}_fine", _fine(plain, FINE_SNR_DB[base]), CTF_NUISANCES),
    }.items()
} | _variants("betagal_noisy", NOISY, {"junk_20": NUISANCES["junk_20"]})


def signals(folder: Path, count: int = 8) -> np.ndarray:
    """The first images of a set, low-passed so that something can be seen in them."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.stack import StackReader
    from cryoiso.physics.filters import lowpass

    particles = read_particle_file(folder / "particles.star")
    with StackReader() as reader:
        images = reader.read(str(particles.stack[0]), particles.index[:count])
    return np.asarray(lowpass(images, particles.groups[0].pixel_size_A, 30.0, dims=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/ (default ../shared)")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the sets here, where views.py finds them")
    parser.add_argument("--picture", type=Path, help="write a contact sheet of their first images (PNG)")
    a = parser.parse_args()
    names, data = a.sets.split(","), (a.shared / "data").resolve()
    if not (data / "models" / "ha").is_dir():
        harness.skip(f"no models in {data}; give --shared")
        return
    with harness.work_folder(a.work) as work:
        for name in names:
            folder = work / f"{name}_{a.seed}"
            if not particle_sets.prepared(SETS[name], a.seed, folder):
                particle_sets.prepare(SETS[name], a.seed, data / "models", folder)
            print(f"{name}: {folder}", flush=True)
        if a.picture:
            from cryoiso.report.contact_sheet import write_contact_sheet

            write_contact_sheet(a.picture, {name: signals(work / f"{name}_{a.seed}") for name in names})


if __name__ == "__main__":
    main()
