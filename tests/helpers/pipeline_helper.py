"""Small runs for tests: a simulated set, its job file, and stand-ins that make a run take a fraction of a second."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from forks_helper import python

from cryoiso.core.log import logger
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.context import Context

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SERIAL = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_", "PMIX_", "SLURM_"))}


def cryoiso(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, see ``forks_helper``."""
    command = [python(), "-m", "cryoiso.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**SERIAL, **env})


def cryoiso_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in this process: quicker, for commands that fail before they start to work.

    Environment, signal handlers and log handlers are afterwards what they were before.
    """
    from cryoiso.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    words = ["cryoiso", *map(str, arguments)]
    argv, environment = sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    sys.argv = words
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        close_logs()
        logger.handlers.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def simulate(folder: Path, n: int = 40, box: int = 24, pixel_size: float = 7.0, seed: int = 1) -> Path:
    """A simulated set with a job file for it in ``folder``; returns the job file."""
    options = ["--n", n, "--box", box, "--pixel-size", pixel_size, "--snr-db", 0, "--seed", seed]
    done = cryoiso("simulate", "phantom", folder, *options)
    assert done.returncode == 0, done.stderr
    return write_job(folder)


def write_job(folder: Path, name: str = "job.toml", **changes: Any) -> Path:
    """A job file in ``folder``; ``changes`` are section_key=value, e.g. reference_file="x.mrc"; None takes it away."""
    job: dict[str, dict[str, Any]] = {
        "particles": {"file": "particles.star"},
        "reference": {"file": "truth_map.mrc"},
        "sample": {"symmetry": "C3"},
        "refine": {"max_iterations": 2, "healpix_order": 1},
        "truth": {"particles": "truth.star", "map": "truth_map.mrc"},
    }
    for name_of_key, value in changes.items():
        section, key = name_of_key.split("_", 1)
        job.setdefault(section, {})[key] = value
    lines = []
    for section, keys in job.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items() if v is not None)]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


class QuickEngine:
    """Three 'iterations' that are sums over images; checkpoints like a real engine, in no time."""

    name = "native"
    iterations = 3

    def refine(self, request: Any, comm: Any) -> None:
        folder, particles = request.folder, request.source.particles
        state = folder / "state.json"
        done = json.loads(state.read_text()) if request.resume and state.exists() else []
        while len(done) < self.iterations:
            images = request.source.read(np.arange(len(particles)))
            done.append(float(np.round(images.sum(dtype=np.float64) * (len(done) + 1 + request.seed), 6)))
            if comm.rank == 0:
                write_text(state, json.dumps(done))
                if request.on_checkpoint:
                    request.on_checkpoint({"iteration": len(done)})
        if comm.rank == 0:
            angle = np.arange(len(particles)) * done[-1] % 7
            rotation = np.stack([_rotation(a) for a in angle])
            write_particles(folder / "particles.star", particles.with_poses(rotation, np.zeros((len(particles), 2))))
            write_text(folder / "refine.json", json.dumps({"iterations": []}))
            write_text(folder / "timing.json", json.dumps({"seconds": os.getpid()}))
        comm.barrier()


def _rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def quick_reconstructor(source: Any, particles: Any, comm: Any, **options: Any) -> dict[int, DensityMap]:
    """Maps that depend on images and poses, and look like nothing."""
    maps = {}
    for half in (1, 2):
        rows = np.flatnonzero(particles.half == half)
        weight = particles.rotation[rows][:, :1, :1] + 2
        plane = (source.read(rows) * weight).mean(0, dtype=np.float64)
        ball = np.exp(-((np.indices([source.box_px] * 3) - source.box_px // 2) ** 2).sum(0) / 30)
        maps[half] = DensityMap((ball * (3 + plane[None])).astype(np.float32), particles.groups[0].pixel_size_A)
    return maps


def quick_full_reconstructor(source: Any, particles: Any, comm: Any, mask_of: Any, **options: Any) -> Any:
    """The same maps, and their mean for the weighted one."""
    from cryoiso.refine.full_map import FullReconstruction

    halves = quick_reconstructor(source, particles, comm)
    mean = DensityMap((halves[1].data + halves[2].data) / 2, halves[1].pixel_size_A)
    mask_of(mean)
    return FullReconstruction(halves, mean, np.ones(source.box_px // 2 + 1))


def quick_report(folder: Path) -> None:
    """A report that is made of the result alone."""
    write_text(folder / "report.html", hash_files(folder / "result")["map.mrc"])


def use_quick_parts(monkeypatch: Any) -> None:
    """Lets the pipeline of this process work with the stand-ins."""
    from cryoiso.pipeline.inputs import reference
    from cryoiso.pipeline.records import environment
    from cryoiso.pipeline.stages import engines

    monkeypatch.setattr(environment, "git_state", functools.cache(environment.git_state))  # two programs per run
    monkeypatch.setattr(engines, "engine", lambda name: QuickEngine())
    monkeypatch.setattr(engines, "reconstructor", lambda: quick_reconstructor)
    monkeypatch.setattr(engines, "full_reconstructor", lambda: quick_full_reconstructor)
    # numba's threads, after which a process cannot be forked; the check of the symmetry has tests of its own
    monkeypatch.setattr(reference, "require_symmetry", lambda *args, **options: None)


class StopsAt(Context):
    """Is told to stop when it has asked this often."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def forget_signals() -> None:
    """This process as it was before a run: no signal received, the handlers those of the system, no log file open."""
    from cryoiso.parallel import signals

    signals.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    close_logs()


def close_logs() -> None:
    """Closes the log files of runs in this process."""
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()


def hash_files(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below a folder that must not differ between two runs of a job."""
    skip_suffix, skip_name = {".log", ".part"}, {"journal.jsonl", "manifest.json", "timing.json", "lock.json"}
    skip_name |= {"resolved.toml", "report.html", "report.json", "job.toml", "seal.json"}
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix not in skip_suffix and p.name not in skip_name
    }


def write_cube(path: Path, box: int, pixel_size: float, value: float = 1.0) -> Path:
    """A map with a bright cube in the middle."""
    data = np.zeros((box, box, box), np.float32)
    data[box // 3 : 2 * box // 3, box // 3 : 2 * box // 3, box // 3 : 2 * box // 3] = value
    write_map(path, data, pixel_size)
    return path
