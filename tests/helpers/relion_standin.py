"""A stand-in for relion_refine_mpi with the rules of RELION 3.1 to 5.0, for tests of the protocol where no RELION is.

It reads and writes the files of an auto-refinement under RELION's names and calls the external reconstruction of both
halves as RELION does, but aligns nothing: its maximisation step leaves a half's reference as it is. So a map tells how
often it went through a correction. What it follows of RELION's sources, by version:

- command line: unknown options are warned of and ignored; ``--continue`` reads the optimiser file, then parses again.
  Up to 4.0.1 the stored rlnDoExternalReconstruct stays, from 4.0.2 on the command line's counts (``forgets``).
- the file for the external program has rlnPixelSize and rlnParticleDiameter from version 5 on.
- ``--blush`` takes the place of the external program, ``--sequential_halves_recons`` calls half 2 after half 1.
- the last iteration (``--force_converge``) joins the halves and makes one call, without a half in the name.

``write_program`` makes the program; ``plain_iterations`` and ``only_half`` make one that breaks its word.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks

FLAGS = set(
    """--auto_refine --split_random_halves --external_reconstruct --blush --sequential_halves_recons --force_converge
    --ctf --firstiter_cc --flatten_solvent --norm --scale --zero_mask --dont_combine_weights_via_disc --preread_images
    """.split()  # noqa: SIM905
)
VALUES = set(
    """--o --i --ref --continue --ini_high --particle_diameter --sym --low_resol_join_halves --auto_iter_max
    --oversampling --random_seed --pad --healpix_order --auto_local_healpix_order --offset_range --offset_step
    --sigma_ang --solvent_mask --strict_highres_exp --j --pool --gpu""".split()  # noqa: SIM905
)


def write_program(folder: Path, version: str = "5.0.1", plain_iterations: str = "", only_half: str = "") -> str:
    """Writes the program and returns its path.

    Args:
        version: whose rules it follows.
        plain_iterations: iterations without a call whatever the command line says, e.g. "1,3".
        only_half: the one that calls; empty: both.
    """
    program = folder / f"relion_refine_mpi-{version}"
    program.write_text(
        f'#!/bin/sh\nSTANDIN="{version};{plain_iterations};{only_half}" exec {sys.executable} {__file__} "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


def forgets(version: str) -> bool:
    """Whether a continued run takes the flag from the command line alone."""
    return tuple(map(int, version.split("."))) >= (4, 0, 2)


def parse(words: list[str]) -> dict[str, str]:
    """Option -> value; what RELION does not know is warned of."""
    options: dict[str, str] = {}
    for place, word in enumerate(words):
        if word in FLAGS:
            options[word] = ""
        elif word in VALUES:
            options[word] = words[place + 1]
        elif word.startswith("--"):
            sys.stderr.write(f"WARNING: Option {word}\tis not a valid RELION argument\n")
    return options


class Run:
    """One start of the program."""

    def __init__(self, options: dict[str, str]) -> None:
        self.version, plain, self.only_half = os.environ["STANDIN"].split(";")
        self.plain = {int(word) for word in plain.split(",") if word}
        self.root = options["--o"].removeprefix("./")
        self.options, self.iteration = options, 0
        self.external = "--external_reconstruct" in options
        if (optimiser := options.get("--continue")) is not None:
            self._read(optimiser)
            return
        self.source, self.diameter = options["--i"], options["--particle_diameter"]
        reference = read_map(options["--ref"])
        self.pixel_A = reference.pixel_size_A
        self.maps = {half: reference.data.astype(np.float64) for half in (1, 2)}
        self.write("_it000")

    def _read(self, optimiser: str) -> None:
        table = {block.name: block for block in read_blocks(optimiser)}["optimiser_general"].columns
        self.iteration, self.diameter = int(table["rlnCurrentIteration"][0]), table["rlnParticleDiameter"][0]
        if not forgets(self.version):
            self.external = bool(int(table["rlnDoExternalReconstruct"][0]))
        self.source = table["rlnExperimentalDataStarFile"][0]
        model = read_blocks(table["rlnModelStarFile"][0])
        self.pixel_A = float(model[0].columns["rlnPixelSize"][0])
        stem = table["rlnModelStarFile"][0].removesuffix("_half1_model.star")
        self.maps = {h: read_map(f"{stem}_half{h}_class001.mrc", self.pixel_A).data.astype(float) for h in (1, 2)}

    def refine(self) -> None:
        while self.iteration < int(self.options["--auto_iter_max"]):
            self.iteration += 1
            last = "--force_converge" in self.options
            print(f" Auto-refine: Iteration= {self.iteration}\n Auto-refine: Resolution= 20 (no gain for 0 iter)")
            if last:
                print(
                    " Auto-refine: Refinement has converged, entering last iteration where two halves will be combined"
                )
            print(" Oversampling= 0 NrHiddenVariableSamplingPoints= 9\n OrientationalSampling= 7.5 NrOrientations= 9")
            print(f" Expectation iteration {self.iteration}", flush=True)
            self._maximise(last)
            self.write("" if last else f"_it{self.iteration:03d}")
            if last:
                return

    def _maximise(self, last: bool) -> None:
        if not self.external or "--blush" in self.options or self.iteration in self.plain:
            return
        stem = f"{self.root}_it{self.iteration:03d}"
        if last:
            self._call(f"{stem}_class001", sum(self.maps.values()) / 2)
            return
        results: dict[int, np.ndarray] = {}

        def one(half: int) -> None:
            results[half] = self._call(f"{stem}_half{half}_class001", self.maps[half])

        halves = [half for half in (1, 2) if str(half) in (self.only_half or "12")]
        threads = [threading.Thread(target=one, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
            if "--sequential_halves_recons" in self.options:
                thread.join()
        for thread in threads:
            thread.join()
        if set(results) != set(halves):
            sys.exit(1)
        self.maps |= results

    def _call(self, stem: str, volume: np.ndarray) -> np.ndarray:
        """What RELION hands to the program and reads back; the weights are 1, the prior is weak, padding is 1."""
        stem += "_external_reconstruct"
        box = len(volume)
        axis = np.arange(box) - box // 2
        radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
        data = np.fft.rfftn(np.fft.ifftshift(volume * np.sinc(radius / box) ** 2)) / box**2
        weight = np.ones(data.shape)
        parts = {"data_real": data.real, "data_imag": data.imag, "weight": weight}
        for name, values in parts.items():
            write_map(f"{stem}_{name}.mrc", values.astype(np.float32), 1.0)
        general = {
            "rlnExtReconsDataReal": f"{stem}_data_real.mrc",
            "rlnExtReconsDataImag": f"{stem}_data_imag.mrc",
            "rlnExtReconsWeight": f"{stem}_weight.mrc",
            "rlnExtReconsResult": f"{stem}.mrc",
            "rlnExtReconsResultStarfile": f"{stem}_out.star",
            "rlnTau2FudgeFactor": "1.000000",
            "rlnPaddingFactor": "1.000000",
            "rlnReferenceDimensionality": "3",
            "rlnOriginalImageSize": str(box),
            "rlnCurrentImageSize": str(box),
        }
        if int(self.version.split(".")[0]) >= 5:
            general |= {"rlnPixelSize": f"{self.pixel_A:.6f}", "rlnParticleDiameter": self.diameter}
        shells = [str(shell) for shell in range(box // 2 + 1)]
        tau2 = {
            "rlnSpectralIndex": shells,
            "rlnReferenceTau2": ["1.0e9"] * len(shells),
            "rlnGoldStandardFsc": ["0.9"] * len(shells),
        }
        blocks = [("external_reconstruct_general", False, {k: [v] for k, v in general.items()}),
                  ("external_reconstruct_tau2", True, tau2)]  # fmt: skip
        write_blocks(f"{stem}.star", [StarBlock(*block) for block in blocks])
        program = os.environ.get("RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE", "relion_external_reconstruct")
        if subprocess.run(f"{program} {stem}.star", shell=True, stdin=subprocess.DEVNULL).returncode:
            sys.stderr.write("ERROR: there was something wrong with system call\n")
            os._exit(1)
        return read_map(f"{stem}.mrc", self.pixel_A).data.astype(np.float64)

    def write(self, iteration: str) -> None:
        """The files of an iteration; "": those of the end."""
        stem, joined = f"{self.root}{iteration}", not iteration
        particles = [block for block in read_blocks(self.source) if block.name in ("optics", "particles")]
        rows = len(particles[-1].columns["rlnImageName"])
        for name in ("AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst"):
            particles[-1].columns[f"rln{name}"] = [f"{self.iteration:.6f}"] * rows
        particles[-1].columns["rlnNormCorrection"] = ["1.000000"] * rows
        write_blocks(f"{stem}_data.star", particles)
        general = {"rlnCurrentResolution": "20.0", "rlnPixelSize": f"{self.pixel_A:.6f}", "rlnAveragePmax": "0.5",
                   "rlnLogLikelihood": "1.0"}  # fmt: skip
        shells = {"rlnSpectralIndex": ["0", "1"], "rlnGoldStandardFsc": ["1.0", "0.9"]}
        model = [StarBlock("model_general", False, {k: [v] for k, v in general.items()}),
                 StarBlock("model_class_1", True, shells)]  # fmt: skip
        for half in (1, 2):
            write_map(f"{stem}_half{half}_class001{'_unfil' if joined else ''}.mrc", self.maps[half], self.pixel_A)
            if not joined:
                write_blocks(f"{stem}_half{half}_model.star", model)
        if joined:
            write_blocks(f"{stem}_model.star", model)
            return
        sampling = {"rlnHealpixOrder": ["3"], "rlnSymmetryGroup": ["C1"]}
        write_blocks(f"{stem}_sampling.star", [StarBlock("sampling_general", False, sampling)])
        optimiser = {
            "rlnOutputRootName": self.root, "rlnModelStarFile": f"{stem}_half1_model.star",
            "rlnExperimentalDataStarFile": f"{stem}_data.star", "rlnCurrentIteration": str(self.iteration),
            "rlnSolventMaskName": "None", "rlnParticleDiameter": self.diameter,
            "rlnChangesOptimalOrientations": "3.5", "rlnChangesOptimalOffsets": "1.0",
            "rlnOverallAccuracyRotations": "2.0", "rlnDoExternalReconstruct": str(int(self.external)),
        }  # fmt: skip
        write_blocks(f"{stem}_optimiser.star", [StarBlock("optimiser_general", False,
                                                          {k: [v] for k, v in optimiser.items()})])  # fmt: skip


if __name__ == "__main__":
    if "--version" in sys.argv:
        print(f"RELION version: {os.environ['STANDIN'].split(';')[0]}")
    else:
        Run(parse(sys.argv[1:])).refine()
