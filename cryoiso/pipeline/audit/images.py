"""Images of the controls as shards: a subset of the run's, and noise in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cryoiso.core.errors import STOPPED, CryoisoError, Interrupted
from cryoiso.core.types import Particles
from cryoiso.io import shardset
from cryoiso.io.background import read_patches
from cryoiso.io.shards import ShardSource
from cryoiso.methods.audit.null_images import Background, gaussian
from cryoiso.parallel.abort import agree, on_root
from cryoiso.physics.filters import power_spectrum
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.hashing import sha256_of
from cryoiso.pipeline.stages.rounds import noise_after

BLOCK = 256
"""Images in memory at once."""
MEASURED = 512
"""Images that noise spectra are measured from where no refinement left any."""
FOLDER = "images"


@dataclass(frozen=True)
class ImageSet:
    """Shards of some particles."""

    folder: Path
    digest: str
    particles: Particles | None = field(default=None, repr=False)
    """on rank 0, every column"""


Read = Callable[[np.ndarray], np.ndarray]
"""Rows of the subset -> images (n, D, D)."""


def real(bench: Bench, inputs: Inputs) -> ImageSet:
    """The subset's own images; those of the run where the subset is all of them. Collective."""
    if on_root(bench.comm, lambda: bench.is_whole):
        particles = bench.particles if bench.comm.rank == 0 else None
        return ImageSet(inputs.shards, "those of the run", particles)
    source = ShardSource(inputs.shards)
    rows = on_root(bench.comm, lambda: bench.rows)
    return _write(bench, "real", lambda some: source.read(rows[some]), "a subset of the run's images")


def null(bench: Bench, inputs: Inputs, purpose: str) -> ImageSet:
    """As many images without particles: Gaussian noise with the run's spectra, or the user's background. Collective."""
    particles, box = on_root(bench.comm, lambda: (bare(bench.particles), bench.box_px))
    seed, file = bench.seed, bench.job.audit.background
    if file:
        patches, grid = read_patches(Path(file))
        background = Background(patches, grid.pixel_size_A, box, particles.first_group.pixel_size_A, file)
        # by content: other patches under the same name are another control
        source = f"background {on_root(bench.comm, sha256_of, Path(file))}"
        return _write(bench, purpose, lambda some: background.images(particles, some, seed, purpose), source)
    spectra = _spectra(bench, inputs, particles)
    return _write(
        bench, purpose, lambda some: gaussian(particles, some, spectra, box, seed, purpose),
        f"Gaussian noise {np.round(spectra, 4).tolist()}",
    )  # fmt: skip


def _spectra(bench: Bench, inputs: Inputs, particles: Particles) -> np.ndarray:
    """(G, S) noise spectra that the run's first refinement estimated; of poses that were given, the images' power."""
    spectra = noise_after(bench.run, inputs, 0)
    if spectra is not None:
        return spectra
    source = ShardSource(inputs.shards)
    rows = on_root(bench.comm, lambda: bench.rows)[:MEASURED]
    power = power_spectrum(source.read(rows))
    optics = particles.optics[: len(rows)]
    return np.stack([power[optics == g].mean(0) if (optics == g).any() else power.mean(0)
                     for g in range(len(particles.groups))])  # fmt: skip


def _write(bench: Bench, name: str, read: Read, source: str) -> ImageSet:
    """Shards of the subset's particles, side by side on all ranks; those that are there stay. Collective."""
    folder, comm = bench.folder / FOLDER / name, bench.comm

    def planned() -> shardset.ShardSet:
        folder.mkdir(parents=True, exist_ok=True)
        storage = bench.job.particles.storage
        return shardset.plan_shards(bare(bench.particles), bench.box_px, f"{source} seed {bench.seed}", name, storage)

    plan = on_root(comm, planned)
    for first in range(0, len(plan.shards), comm.size):
        if comm.stop_requested():
            raise Interrupted(STOPPED)
        agree(comm, _one(plan, folder, first + comm.rank, read))
    on_root(comm, shardset.finish, plan, folder)
    return ImageSet(folder, plan.digest, bench.particles if comm.rank == 0 else None)


def _one(plan: shardset.ShardSet, folder: Path, number: int, read: Read) -> CryoisoError | None:
    def blocks() -> Iterator[np.ndarray]:
        start, stop = plan.shards[number]
        for first in range(start, stop, BLOCK):
            yield read(np.arange(first, min(first + BLOCK, stop)))

    try:
        if number < len(plan.shards) and not shardset.is_written(plan, folder, number):
            shardset.write_one(plan, folder, number, blocks())
    except CryoisoError as error:
        return error
    return None
