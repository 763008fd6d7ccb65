"""Back-projection beside relion_reconstruct: the same STAR file and stack, 128 px, padding 2, C1, one core each.

Both programs make the two half-maps of N particles with known poses (RELION in one run a half). CPU seconds of whole
programs for two N give the time a particle (the slope) and what does not depend on N (the intercept: start, division,
transforms). Then, inside this process: where a particle's time goes, and how near the insertion kernel comes to the
memory bandwidth of one core.

    python benchmarks/backprojection.py [--skip-relion]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

BOX, PIXEL_A, PADDING = 128, 1.5, 2
LINE_BYTES = 64
VOXEL_BYTES = 24


def prepare(folder: Path, sizes: tuple[int, int], seed: int) -> list[Path]:
    """A simulated set and a STAR file of its first n particles for each n."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.star.read import write_particles

    harness.cryoiso(
        "simulate", "phantom", folder, "--n", max(sizes), "--box", BOX, "--pixel-size", PIXEL_A, "--with-poses",
        "--halves", "--seed", seed, log=folder / "simulate.log",
    )  # fmt: skip
    particles = read_particle_file(folder / "particles.star")
    files = []
    for n in sizes:
        files.append(folder / f"first{n}.star")
        write_particles(files[-1], particles.take(slice(0, n)))
    return files


def relion(star: Path) -> harness.Cost:
    """Both half-maps by relion_reconstruct."""
    costs = []
    for half in (1, 2):
        argv = ["relion_reconstruct", "--i", star.name, "--o", f"relion{half}.mrc", "--ctf", "--sym", "C1"]
        argv += ["--pad", PADDING, "--subset", half]
        costs.append(harness.measure(argv, star.parent / "relion.log", star.parent))
    sums = (sum(getattr(c, name) for c in costs) for name in ("cpu_s", "of_which_system_s", "wall_s"))
    return harness.Cost(*sums, max(c.peak_mib for c in costs))


def cryoiso(star: Path, normalise: bool) -> harness.Cost:
    """Both half-maps and their mean by `cryoiso reconstruct`."""
    shutil.rmtree(star.parent / "out", ignore_errors=True)
    flag = "--normalise" if normalise else "--no-normalise"
    return harness.cryoiso("reconstruct", star.name, "--out", "out", flag, log=star.parent / "out.log", cwd=star.parent)


def programs(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Costs of whole programs, their slopes and intercepts, and the agreement of the maps."""
    folder = work / "particles"
    folder.mkdir(exist_ok=True)
    stars = prepare(folder, a.sizes, seed=1)
    harness.measure(
        [*harness.CRYOISO, "reconstruct", stars[0].name, "--out", "out", "--overwrite"], folder / "warm.log", folder
    )
    runs: dict[str, Callable[[Path], harness.Cost]] = {
        "cryoiso": lambda star: cryoiso(star, normalise=False),
        "cryoiso, normalising": lambda star: cryoiso(star, normalise=True),
    }
    if not a.skip_relion:
        runs["RELION"] = relion
    result = {}
    for name, run in runs.items():
        costs = [[run(star) for star in stars] for _ in range(2 if name == "RELION" else a.repeats)]
        few, many = (min(column, key=lambda cost: cost.cpu_s) for column in zip(*costs))
        slope = (many.cpu_s - few.cpu_s) / (a.sizes[1] - a.sizes[0])
        result[name] = {
            "few": few.as_dict(), "many": many.as_dict(), "ms_a_particle": 1e3 * slope,
            "fixed_s": few.cpu_s - a.sizes[0] * slope,
        }  # fmt: skip
        print(name, result[name], file=sys.stderr, flush=True)
        if name == "cryoiso":
            shutil.copytree(folder / "out", folder / "plain", dirs_exist_ok=True)
    if "RELION" in result:
        result["agreement"] = agreement(folder)
    return result


def agreement(folder: Path) -> dict[str, float]:
    """The two programs' maps of half 1 inside a sphere: FSC between them, and of each with the truth."""
    from cryoiso.io.mrc import read_map
    from cryoiso.metrics.fsc_curve import fsc, resolution_at
    from cryoiso.physics.masks import sphere_mask

    names = ("plain/half1.mrc", "relion1.mrc", "truth_map.mrc")
    ours, theirs, truth = (read_map(folder / f).data for f in names)
    mask = sphere_mask(BOX, 0.4 * BOX, 6.0).numpy()
    curve = fsc(ours, theirs, mask)
    return {
        "fsc_at_0.45_nyquist": float(curve[round(0.45 * BOX / 2)]),
        "fsc_at_0.9_nyquist": float(curve[round(0.9 * BOX / 2)]),
        "truth_A_cryoiso": resolution_at(fsc(ours, truth, mask), 0.5, BOX, PIXEL_A),
        "truth_A_RELION": resolution_at(fsc(theirs, truth, mask), 0.5, BOX, PIXEL_A),
    }


def cheapest(function: Callable[[], Any], times: int = 5) -> float:
    """Least CPU seconds of several calls, after one that does not count."""
    function()
    costs = []
    for _ in range(times):
        start = time.process_time()
        function()
        costs.append(time.process_time() - start)
    return min(costs)


def bandwidth() -> dict[str, float]:
    """GB/s of one core on arrays of 256 MB: copy and triad count what the program reads and writes."""
    import numpy as np
    from numba import njit

    @njit(fastmath=True)
    def triad(a, b, c):
        for i in range(len(a)):
            a[i] = b[i] + 3.0 * c[i]

    @njit
    def scattered(a, places):
        for i in range(len(places)):
            a[places[i]] += 1.0

    a, b, c = (np.ones(2**25) for _ in range(3))
    lines = np.random.default_rng(1).permutation(len(a) // 8) * 8
    return {
        "copy_GB_s": 16 * len(a) / cheapest(lambda: np.copyto(a, b)) / 1e9,
        "triad_GB_s": 24 * len(a) / cheapest(lambda: triad(a, b, c)) / 1e9,
        "scattered_lines_GB_s": 2 * LINE_BYTES * len(lines) / cheapest(lambda: scattered(a, lines)) / 1e9,
    }


def kernel(images: int) -> dict[str, Any]:
    """The insertion kernel alone, and the memory traffic that it cannot do without.

    Traffic of a call: data and weight of a sample read (12 B); its tile written and read twice (3 x 4 B); the sorted
    sample written, which reads the line first, and read (3 x 24 B); and every line of the grid that the call changes
    read and written once, as tiles stay in the cache meanwhile. Inserting slice by slice without sorting, a sample
    would read and write its own lines: four rows of two voxels (48 B) on lines of 64 B, 6.5 lines on average.
    """
    import numpy as np
    import torch

    from cryoiso.physics.backproject import SliceAccumulator
    from cryoiso.physics.fourier import fourier_disc
    from cryoiso.physics.so3 import random_rotations

    rng = np.random.default_rng(1)
    disc = fourier_disc(BOX, (BOX - 1) // 2, True)
    rotation = torch.from_numpy(random_rotations(rng, images).astype(np.float32))
    data = torch.randn(images, disc.size, dtype=torch.complex64)
    weight = torch.rand(images, disc.size)
    accumulator = SliceAccumulator.empty(BOX, padding=PADDING)
    seconds = cheapest(lambda: accumulator.insert(data, weight, rotation, disc))
    accumulator.clear()
    accumulator.insert(data, weight, rotation, disc)
    flat = accumulator.grid.view(-1).numpy()
    lines = int((flat[: len(flat) // 8 * 8].reshape(-1, 8) != 0).any(1).sum())
    samples = images * disc.size
    needed = samples * (12 + 12 + 72) + 2 * lines * LINE_BYTES
    unsorted = samples * 2 * 6.5 * LINE_BYTES
    return {
        "images": images,
        "samples_an_image": disc.size,
        "grid_MB": accumulator.grid.numel() * 8 / 1e6,
        "ms_an_image": 1e3 * seconds / images,
        "ns_a_sample": 1e9 * seconds / samples,
        "needed_bytes_a_sample": needed / samples,
        "needed_GB_s": needed / seconds / 1e9,
        "added_GB_s": samples * 2 * 8 * VOXEL_BYTES / seconds / 1e9,
        "unsorted_GB_s": unsorted / seconds / 1e9,
    }


def stages(folder: Path, images: int) -> dict[str, float]:
    """CPU milliseconds a particle of each step of `cryoiso reconstruct`, in blocks as it works."""
    import numpy as np
    import torch

    from cryoiso.io import read_particle_file
    from cryoiso.io.sources import StackSource
    from cryoiso.physics.contrast_transfer import ctf_for
    from cryoiso.physics.fourier import images_to_fourier
    from cryoiso.refine.batches import BatchReader
    from cryoiso.refine.reconstruct import BLOCK_IMAGES, weigh

    os.chdir(folder)
    particles = read_particle_file("particles.star")
    source = StackSource(particles, {"normalise": False}, "particles.star")
    plain = BatchReader(source, particles, PIXEL_A, with_dc=True, memory_bytes=0)
    blocks = [np.arange(i, i + BLOCK_IMAGES) for i in range(0, images, BLOCK_IMAGES)]
    batch = plain.read(blocks[0], (BOX - 1) // 2)
    disc, freq = batch.disc, batch.disc.frequencies(PIXEL_A)
    pixels = torch.from_numpy(source.read(blocks[0]))
    data, weight = torch.empty_like(batch.coefficients), torch.empty_like(batch.ctf)
    shift = torch.zeros(len(batch), 2)
    steps: dict[str, Callable[[np.ndarray], Any]] = {
        "read and check": source.read,
        "transform and pick": lambda rows: disc.gather(images_to_fourier(pixels)),
        "CTF": lambda rows: ctf_for(particles, rows, BOX, freq_invA=freq),
        "shift and weigh": lambda rows: weigh(batch, shift, data, weight),
    }
    return {
        name: 1e3 * cheapest(lambda step=step: [step(rows) for rows in blocks]) / images for name, step in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=(2000, 10000))
    parser.add_argument("--repeats", type=int, default=5, help="of cryoiso; the cheapest run counts")
    parser.add_argument("--skip-relion", action="store_true")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "backprojection.json")
    parser.add_argument("--work", type=Path, help="keep the files here")
    a = parser.parse_args()
    if not a.skip_relion and not shutil.which("relion_reconstruct"):
        harness.skip("relion_reconstruct is not on the PATH")
        a.skip_relion = True
    os.environ.update(harness.ONE_THREAD)
    with harness.work_folder(a.work) as work:
        result: dict[str, Any] = {"machine": harness.machine(), "sizes": list(a.sizes), "programs": programs(a, work)}
        result |= {"bandwidth": bandwidth(), "kernel": kernel(512), "ms_a_particle": stages(work / "particles", 512)}
        result["ms_a_particle"]["insertion"] = result["kernel"]["ms_an_image"]
        os.chdir(harness.REPO)
        harness.write_json(a.out, result)
        print(report(result))


def report(result: dict[str, Any]) -> str:
    """Markdown tables."""
    few, many = result["sizes"]
    found = result["programs"]
    theirs = found.get("RELION")
    rows = []
    for name in [n for n in found if n != "agreement"]:
        r = found[name]
        ratios = [None, None]
        if theirs and name != "RELION":
            slope = theirs["ms_a_particle"] / r["ms_a_particle"]
            ratios = [f"{slope:.1f}", f"{theirs['many']['cpu_s'] / r['many']['cpu_s']:.1f}"]
        rows.append([name, f"{r['few']['cpu_s']:.1f}", f"{r['many']['cpu_s']:.1f}", f"{r['fixed_s']:.1f}",
                     f"{r['ms_a_particle']:.2f}", f"{1e3 / r['ms_a_particle']:,.0f}", *ratios,
                     f"{r['many']['peak_mib']:,.0f}"])  # fmt: skip
    head = ["program", f"{few} particles, CPU s", f"{many:,} particles, CPU s", "fixed s", "ms a particle",
            "particles a CPU s", "times RELION a particle", "times RELION in all", "peak MiB"]  # fmt: skip
    numbers = {**found.get("agreement", {}), **result["bandwidth"], **result["kernel"]}
    return "\n\n".join(
        [
            harness.markdown(head, rows),
            harness.markdown(["step", "ms a particle"], [[k, f"{v:.3f}"] for k, v in result["ms_a_particle"].items()]),
            harness.markdown(["number", "value"], [[k, f"{v:,.4g}"] for k, v in numbers.items()]),
        ]
    )


if __name__ == "__main__":
    main()
