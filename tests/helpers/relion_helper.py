"""Tiny particles for real RELION, and a job of ranks that refines them with a simple correction."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forks_helper import python
from mpi_helper import find_mpirun, mpi_environment

from cryoiso.engines.relion.install import find_relion
from cryoiso.io.mrc import read_map, write_map
from cryoiso.physics.so3 import matrix_to_euler

BOX, PIXEL = 24, 7.0

DRIVER = '''
import json, os, signal, sys, time
from pathlib import Path

import numpy as np

from cryoiso.cli.common import log_to_stderr
from cryoiso.core.config import parse_job
from cryoiso.core.errors import CryoisoError
from cryoiso.parallel.abort import agree, guard
from cryoiso.parallel.context import get_context
from cryoiso.pipeline.commands.refine import refine_files
from cryoiso.pipeline.stages import engines

job, out, kind = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ctx = get_context()
log_to_stderr(ctx.rank)
(out.parent / f"{out.name}-pid{ctx.rank}").write_text(str(os.getpid()))


class Correction:
    """Leaves references as they are, or goes wrong in the second iteration."""

    def wants(self, state):
        return kind != "never"

    def why_not(self, state):
        return "it never does" if kind == "never" else ""

    def facts(self):
        return {"halves_share_a_network": False}

    def __call__(self, state, comm):
        ranks = sum(comm.allgather(1))
        if comm.rank == 0:
            np.savez(out / "correction" / f"state{state.iteration}.npz", fsc=state.fsc, mask=state.mask is None,
                     step=state.step_deg, resolution=state.resolution_A, **{f"map{h}": state.maps[h] for h in (1, 2)},
                     **{f"reference{h}": state.references[h] for h in (1, 2)})
        if state.iteration == 2 and kind == "fail":
            agree(comm, CryoisoError("the network broke", code="correction-unusable"))
        if state.iteration == 2 and kind == "die" and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.iteration == 2 and kind == "nan":
            return {h: np.full_like(m, np.nan) for h, m in state.references.items()}, {}
        if state.iteration == 2 and kind == "hold":
            (out.parent / f"{out.name}-holding").write_text("now")
            while not comm.stop_requested():
                time.sleep(0.05)
            from cryoiso.core.errors import Interrupted
            raise Interrupted("stopped in the correction")
        return {h: m.copy() for h, m in state.references.items()}, {"applied": True, "ranks": ranks}


engines.correction = lambda job: None if kind == "plain" else Correction()
with guard(ctx):
    refine_files(parse_job(job), out, ctx, resume="--resume" in sys.argv)
'''


def job_of(data: Path, **relion: Any) -> dict[str, Any]:
    """A coarse refinement of two iterations."""
    return {
        "particles": {"file": str(data / "particles.star")},
        "reference": {"file": str(data / "truth_map.mrc"), "lowpass_A": 20.0},
        "sample": {"symmetry": "C3", "diameter_A": 140.0},
        "refine": {"engine": "relion", "healpix_order": 1, "max_iterations": 2, "padding": 1, "shift_range_A": 14.0},
        "run": {"workflow": "realign"},
        "relion": relion,
    }


def start(ranks: int, job: dict[str, Any], out: Path, kind: str, *more: str) -> subprocess.Popen[str]:
    """The job on so many ranks, in a process group of its own."""
    import json

    command = [python(), "-c", DRIVER, json.dumps(job), str(out), kind, *more]
    if ranks > 1:
        command = [str(find_mpirun()), "-n", str(ranks), *command]
    return subprocess.Popen(
        command, env=mpi_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 90.0) -> tuple[int, str]:
    """Exit status and all that was printed."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        process.communicate()
        raise
    return process.returncode, out


def refine(ranks: int, job: dict[str, Any], out: Path, kind: str, *more: str) -> str:
    """As ``start`` and ``finish``; what it printed if it ended well."""
    status, said = finish(start(ranks, job, out, kind, *more))
    assert status == 0, said
    return said


def wait_until(condition: Any, limit_s: float = 60.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def relion_processes(folder: Path) -> list[int]:
    """RELION's processes that run in this folder."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.path.realpath(f"/proc/{process}/cwd") == str(folder.resolve()):
                name = Path(f"/proc/{process}/comm").read_text()
                state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
                found += [int(process)] if "relion" in name and state != "Z" else []
        except OSError:
            continue
    return found


def open_mpi() -> list[str]:
    """Start of an mpirun command for RELION without this program."""
    name = shutil.which("mpirun.openmpi") or "mpirun"
    return [name, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "3"]


def relion_by_hand(data: Path, out: Path, hook: Sequence[str] | None, *options: str) -> subprocess.CompletedProcess:
    """relion_refine_mpi as a user starts it, with a program of his as the callback (None: RELION's own, which gets
    --skip_gridding where relion_refine itself divides directly)."""
    out.mkdir(exist_ok=True)
    program = find_relion()
    if hook is None:
        own = [str(Path(program.program).with_name("relion_external_reconstruct"))]
        hook = own if program.major < 4 else ["sh", "-c", f'exec {own[0]} "$0" --skip_gridding']
    words = (  # with its path: mpirun puts its own folder before the PATH
        f"{program.program} --o {out}/run --auto_refine --split_random_halves --i particles.star --ref truth_map.mrc "
        "--ini_high 40 --ctf --ctf_corrected_ref --particle_diameter 140 --flatten_solvent --zero_mask --sym C3 "
        "--healpix_order 1 --oversampling 1 --offset_range 2 --offset_step 1 --low_resol_join_halves 40 --norm --scale "
        "--pad 2 --j 1 --pool 10 --dont_combine_weights_via_disc --preread_images --random_seed 1 "
        "--external_reconstruct --auto_iter_max 2"
    )
    env = mpi_environment({"RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE": shlex.join(hook)})
    return subprocess.run(
        [*open_mpi(), *words.split(), *options], cwd=data, env=env, capture_output=True, text=True, timeout=90
    )


def write_subtomograms(folder: Path, truth: Path, n: int = 16, seed: int = 1) -> Path:
    """Volumes of random orientation with noise and a missing wedge, their CTF volume, and truth.star; no poses."""
    from scipy.ndimage import affine_transform
    from scipy.spatial.transform import Rotation

    signal = read_map(truth).data.astype(np.float64)
    signal /= signal.std()
    rotations = np.swapaxes(Rotation.random(n, random_state=seed).as_matrix(), 1, 2)
    k = np.fft.fftfreq(BOX)
    wedge = np.abs(k)[:, None, None] <= np.abs(k)[None, None, :] * np.tan(np.radians(60)) + 1e-9
    wedge = np.broadcast_to(wedge, (BOX,) * 3).astype(np.float32)
    write_map(folder / "ctf.mrc", np.fft.fftshift(wedge), PIXEL)
    rng, centre, rows = np.random.default_rng(seed), np.full(3, BOX // 2), []
    radius = np.sqrt(((np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(0))
    for i, turn in enumerate(rotations):
        back = turn[::-1, ::-1].T  # in (z, y, x), from the particle to the map
        volume = affine_transform(signal, back, offset=centre - back @ centre, order=3)
        volume = volume + 0.5 * rng.standard_normal(volume.shape)
        volume = np.fft.ifftn(np.fft.fftn(volume) * wedge).real
        around = volume[radius > BOX // 2 - 1]
        write_map(folder / f"s{i:03d}.mrc", (volume - around.mean()) / around.std(), PIXEL)
        angles = " ".join(f"{a:.6f}" for a in matrix_to_euler(turn[None])[0])
        rows.append(f"s{i:03d}.mrc ctf.mrc tomo{i % 2}.mrc 1 {1 + i % 2} my{i} {angles} 0 0 0")
    names = ("rlnImageName", "rlnCtfImage", "rlnMicrographName", "rlnOpticsGroup", "rlnRandomSubset", "myColumn",
             "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst",
             "rlnOriginZAngst")  # fmt: skip
    for file, columns in (("truth.star", 12), ("particles.star", 6)):
        head = "\n".join(f"_{name} #{i}" for i, name in enumerate(names[:columns], 1))
        table = "\n".join(" ".join(row.split()[:columns]) for row in rows)
        optics = ("rlnOpticsGroup", "rlnOpticsGroupName", "rlnVoltage", "rlnSphericalAberration",
                  "rlnAmplitudeContrast", "rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality")  # fmt: skip
        optics_head = "\n".join(f"_{name} #{i}" for i, name in enumerate(optics, 1))
        (folder / file).write_text(
            f"data_optics\n\nloop_\n{optics_head}\n1 opticsGroup1 300 2.7 0.1 {PIXEL} {BOX} 3\n\n"
            f"data_particles\n\nloop_\n{head}\n{table}\n"
        )
    return folder / "particles.star"


HOOK = [sys.executable, "-m", "cryoiso.cli.main", "hook", "relion"]


def write_task(folder: Path, box: int, padding: int, current: int, *, half: int = 1, seed: int = 0) -> Path:
    """RELION's arrays of a random blob, unevenly sampled, and their STAR file; the name is that of iteration 3."""
    rng = np.random.default_rng(seed)
    side = padding * box
    z, y, x = np.indices((box, box, box)) - box // 2
    blob = np.exp(-(z**2 / 3 + y**2 / 8 + x**2 / 5) / 2) + 0.02 * rng.standard_normal((box, box, box))
    padded = np.zeros((side,) * 3)
    start = side // 2 - box // 2
    padded[(slice(start, start + box),) * 3] = blob
    data = np.fft.rfftn(np.fft.ifftshift(padded)) / box**2
    k = np.rint(np.fft.fftfreq(side) * side)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.arange(side // 2 + 1)[None, None] ** 2)
    weight = np.abs(np.fft.rfftn(rng.standard_normal((side,) * 3))) + 0.1
    weight[np.abs(k)[:, None, None] > 0.8 * radius + 1] *= 1e-4  # a thinly sampled cone
    weight[radius > padding * (current // 2)] = 0
    stem = f"run_it003_half{half}_class001_external_reconstruct"
    for name, values in (("data_real", (data * weight).real), ("data_imag", (data * weight).imag), ("weight", weight)):
        write_map(folder / f"{stem}_{name}.mrc", values.astype(np.float32), 1.0)
    shells = [f"{i} {0.05 / (1 + i) ** 2 if i <= current // 2 else 0:.6e} {max(1 - i / box, 0):.6f}"
              for i in range(box // 2 + 1)]  # fmt: skip
    star = folder / f"{stem}.star"
    star.write_text(
        f"""
data_external_reconstruct_general

_rlnExtReconsDataReal {star.stem}_data_real.mrc
_rlnExtReconsDataImag {star.stem}_data_imag.mrc
_rlnExtReconsWeight {star.stem}_weight.mrc
_rlnExtReconsResult {star.stem}.mrc
_rlnExtReconsResultStarfile {star.stem}_out.star
_rlnTau2FudgeFactor 1.5
_rlnPaddingFactor {padding}.000000
_rlnReferenceDimensionality 3
_rlnOriginalImageSize {box}
_rlnCurrentImageSize {current}

data_external_reconstruct_tau2

loop_
_rlnSpectralIndex #1
_rlnReferenceTau2 #2
_rlnGoldStandardFsc #3
"""
        + "\n".join(shells)
        + "\n"
    )
    return star
