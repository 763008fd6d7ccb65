"""Many short programs of this package: each in a fork of a process that has imported everything, without start-up.

CPU seconds of a fork do not contain imports (about 3 s of a refinement): compare them with those of other forks.
"""

from __future__ import annotations

import importlib
import os
import resource
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = (
    "torch", "numba", "scipy.ndimage", "scipy.stats", "scipy.optimize", "scipy.spatial.transform", "mrcfile", "h5py",
    "gemmi", "pandas", "cryoiso.cli.main", "cryoiso.core.config", "cryoiso.engines.native", "cryoiso.physics._kernels",
    "cryoiso.pipeline.commands.refine", "cryoiso.pipeline.commands.reconstruct", "cryoiso.pipeline.commands.simulate",
)  # fmt: skip
ready = False


def prepare() -> None:
    """Imports the libraries and switches forks on. One thread per process: a fork has only the one that forked."""
    global ready
    if any(os.environ.get(name) != "1" for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")):
        raise SystemExit("set OMP_NUM_THREADS=1 and NUMBA_NUM_THREADS=1 before programs are run as forks")
    for name in MODULES:
        importlib.import_module(name)
    ready = True


def run(words: Sequence[str], log: Path) -> tuple[int, resource.struct_rusage]:
    """Runs ``python -m`` with these words in a fork, its output in ``log``; its wait status and resources."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _program(words, log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, waited, usage = os.wait4(child, 0)
    return waited, usage


def _program(words: Sequence[str], log: Path) -> int:
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0
