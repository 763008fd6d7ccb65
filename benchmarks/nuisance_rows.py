"""The rows of nuisances.py: the engine without and with its answer to a nuisance, with the truth told, and RELION.

`known` refines what an ideal answer would leave: particles only, each with its true CTF, beam tilt, B-factor and
intensity.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.particle_sets import ParticleSet
from benchmarks.score import without_junk
from benchmarks.views_rows import Row, run_row

KNOWN, COST = "known.star", "cost.json"
LOWPASS_A = 30


@dataclass(frozen=True)
class NuisanceRow(Row):
    """A row, and what follows the refinement."""

    then: str = ""
    """ctf-refine: CTFs are refined at the found poses, with beam tilt, and the maps are made again."""


ANSWERS = {"scale": "particle", "junk": True, "image_mask": "noise"}
ROWS: dict[str, NuisanceRow] = {
    "plain": NuisanceRow(),
    "scale particle": NuisanceRow(engine={"scale": "particle"}),
    "mask zero": NuisanceRow(engine={"image_mask": "zero"}),
    "mask noise": NuisanceRow(engine={"image_mask": "noise"}),
    "junk": NuisanceRow(engine={"junk": True}),
    "ctf-refine": NuisanceRow(then="ctf-refine"),
    "all answers": NuisanceRow(engine=ANSWERS),
    "known": NuisanceRow(particles=KNOWN),
    "relion": NuisanceRow("relion"),
}
"""Keys of [refine] beside the defaults. A changed row is measured again."""


def run(row: NuisanceRow, one: ParticleSet, folder: Path, out: Path, guarded: bool = True) -> harness.Cost:
    """As `views_rows.run_row`, for the rows of this file."""
    if row.particles == KNOWN:
        write_known(folder)
    if row.command == "relion":
        return relion(one, folder, out)
    if not row.then:
        cost = run_row(row, one, folder, out, guarded)
        (out / COST).write_text(json.dumps(asdict(cost)))
        return cost
    plain = out.parent / "plain"
    if not (plain / COST).exists():
        run(ROWS["plain"], one, folder, plain)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(plain, out)
    return _ctf_refined(one, folder, out, harness.Cost(**json.loads((plain / COST).read_text())))


def write_known(folder: Path) -> None:
    """particles.star without junk, with the true CTFs; scales are signal over noise, because images are normalised."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.star.write import write_particles

    true = without_junk(read_particle_file(folder / "truth.star", require=("image", "ctf", "pose")))
    noise = true.table["cryoisoNoiseScale"].astype(float).to_numpy() if "cryoisoNoiseScale" in true.table else 1.0
    drop = [name for name in true.table.columns if name.startswith(("rlnAngle", "rlnOrigin", "rlnRandomSubset"))]
    known = replace(
        true, ctf_scale=true.ctf_scale / noise, rotation=None, shift_A=None, half=None,
        table=true.table.drop(columns=drop),
    )  # fmt: skip
    names = [f"{i + 1:06d}@{folder / 'particles.mrcs'}" for i in true.index.tolist()]
    write_particles(folder / KNOWN, known, names)


def _ctf_refined(one: ParticleSet, folder: Path, out: Path, cost: harness.Cost) -> harness.Cost:
    """Refines the CTFs of what a row left in ``out``, whose poses and maps are replaced; the cost of both."""
    made, common = out / "ctf", ("--symmetry", one.symmetry, "--project", folder)
    halves = ("--half1", out / "half1.mrc", "--half2", out / "half2.mrc")
    more = harness.cryoiso(
        "ctf-refine", out / "particles.star", *halves, *common, "--micrographs", "defocus", "--beam-tilt", "tilt",
        "--out", made, log=out / "ctf.txt",
    )  # fmt: skip
    maps = out / "maps"
    harness.cryoiso("reconstruct", made / "particles.star", "--out", maps, *common, log=out / "reconstruct.txt")
    for file in (made / "particles.star", made / "ctf_refine.json", *maps.glob("*.mrc")):
        shutil.copy(file, out / file.name)
    return replace(
        more, cpu_s=cost.cpu_s + more.cpu_s, wall_s=cost.wall_s + more.wall_s,
        of_which_system_s=cost.of_which_system_s + more.of_which_system_s,
    )  # fmt: skip


def relion(one: ParticleSet, folder: Path, out: Path) -> harness.Cost:
    """RELION's auto-refinement of the same images from the same reference, sampled as in refine_vs_relion.py.

    Leaves its poses, with the uids of the set, and its unregularised half-maps.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    diameter_A = int(10 * (measured_diameter_A(folder / "homologue.mrc") // 10 + 1))
    command = (
        f"relion_refine_mpi --o {out}/run --auto_refine --split_random_halves --i particles.star --ref homologue.mrc "
        f"--ini_high {LOWPASS_A} --ctf --ctf_corrected_ref --particle_diameter {diameter_A} --flatten_solvent "
        f"--zero_mask --sym {one.symmetry} --healpix_order 2 --auto_local_healpix_order 4 --oversampling 1 "
        "--offset_range 3 --offset_step 1 --low_resol_join_halves 40 --norm --scale --pad 1 --j 1 --pool 10 "
        "--dont_combine_weights_via_disc --preread_images --random_seed 42 --maximum_angular_sampling 8"
    )
    argv = [*(harness.open_mpi() or []), "-np", 3, *command.split()]
    cost = harness.measure(argv, out / "relion.log", folder)
    _with_uids(folder, out / "run_data.star", out / "particles.star")
    for half in (1, 2):
        shutil.copy(out / f"run_half{half}_class001_unfil.mrc", out / f"half{half}.mrc")
    (out / "relion.json").write_text(json.dumps({"command": command.split(" --o ")[0], "diameter_A": diameter_A}))
    return cost


def measured_diameter_A(path: Path) -> float:
    """Of a map, as a refinement measures it."""
    from cryoiso.io.mrc import read_map
    from cryoiso.pipeline.inputs.reference import measure_diameter

    return measure_diameter(read_map(path))


def _with_uids(folder: Path, found: Path, out: Path) -> None:
    """RELION's particles in the order of the set, with its uids."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.star.write import write_particles

    given = read_particle_file(folder / "particles.star", str(folder))
    placed = read_particle_file(found, str(folder), ("pose",))
    order = np.argsort(placed.index)
    if not np.array_equal(placed.index[order], given.index):
        raise harness.Failed(f"{found}: other particles than in {folder}")
    posed = given.with_poses(*(values[order] for values in placed.require_poses()))
    write_particles(out, posed, [f"{i + 1:06d}@particles.mrcs" for i in given.index.tolist()])
