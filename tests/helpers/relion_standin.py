"""A stand-in for relion_refine_mpi with the rules of RELION 3.1 to 5.0, for tests of the protocol where no RELION is.

It reads and writes the files of an auto-refinement under RELION's names and calls the external reconstruction of both
halves as RELION does, but aligns nothing: its maximisation step leaves a half's reference as it is. So a map tells how
often it went through a correction. What differs by version is in ``relion_rules.py``; common to all are:

- MPI processes (RANKS, given by the launcher): at least three and an odd number with half-sets.
- the external program is called for half 1 and half 2 at the same time, with ``--sequential_halves_recons`` for half 2
  after half 1, once without a half in the name in the last iteration (``--force_converge``), which joins them and has
  its number in that name but none in those of the files it writes, and without half-sets (``--iter``, ``--K``) once for
  each class.
- ``--blush`` takes the place of the external program: relion_python_blush must print "success".
- ``--auto_refine`` has one class, and without ``--auto_iter_max`` it converges: here after two iterations.

``write_program`` makes the program; ``plain_iterations`` and ``only_half`` make one that breaks its word.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from relion_rules import NOT_LISTED, Rules

from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks

POSE = ("AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst")


def write_program(
    folder: Path, version: str = "5.0.1", plain_iterations: str = "", only_half: str = "", dies_in: int = 0
) -> str:
    """Writes the program and returns its path.

    Args:
        version: whose rules it follows.
        plain_iterations: iterations without a call whatever the command line says, e.g. "1,3".
        only_half: the one that calls; empty: both.
        dies_in: the iteration before whose maximisation it ends, the first time.
    """
    program = folder / f"relion_refine_mpi-{version}"
    how = f"{version};{plain_iterations};{only_half};{dies_in}"
    program.write_text(f'#!/bin/sh\nSTANDIN="{how}" exec {sys.executable} {__file__} "$@"\n')
    program.chmod(0o755)
    return str(program)


def fail(message: str) -> None:
    """As RELION ends with an error of one of its processes, and the launcher with it."""
    sys.stderr.write(f"in: x.cpp, line 1\nERROR: \n{message}\n=== Backtrace  ===\n")
    sys.stderr.flush()
    os._exit(1)


def parse(words: list[str], rules: Rules) -> dict[str, str]:
    """Option -> value; what RELION does not know is warned of."""
    options: dict[str, str] = {}
    continued = "--continue" in words
    for place, word in enumerate(words):
        if word in rules.flags(continued):
            options[word] = ""
        elif word in rules.values(continued):
            options[word] = words[place + 1]
        elif word.startswith("--"):
            options |= {word: ""} if word in NOT_LISTED else {}
            sys.stderr.write(f"WARNING: Option {word}\tis not a valid RELION argument\n")
    return options


def list_block(name: str, values: dict[str, str]) -> StarBlock:
    return StarBlock(name, False, {key: [value] for key, value in values.items()})


class Run:
    """One start of the program."""

    def __init__(self, options: dict[str, str], rules: Rules) -> None:
        _, plain, self.only_half, dies_in = os.environ["STANDIN"].split(";")
        self.dies_in = int(dies_in)
        self.rules = rules
        self.plain = {int(word) for word in plain.split(",") if word}
        self.root = options.get("--o", "run")
        self.options, self.iteration = options, 0
        self.external = "--external_reconstruct" in options
        self.halves = "--split_random_halves" in options
        self.maps: dict[str, np.ndarray] = {}
        """End of a map's name -> map."""
        if (optimiser := options.get("--continue")) is not None:
            self._read(optimiser)
        else:
            self._begin()
        ranks = int(os.environ.get("RANKS", "3"))
        if self.halves and ranks <= 2:
            fail("at least 3 MPI processes are required when splitting data into random halves")
        if self.halves and ranks % 2 == 0:
            fail("the number of MPI processes must be an odd number")
        self.joined = "--force_converge" in options
        self.write(f"_it{self.iteration:03d}")

    def _begin(self) -> None:
        options = self.options
        self.source, self.diameter = options["--i"], options["--particle_diameter"]
        classes = int(options.get("--K", "1"))
        if self.halves and classes > 1:
            fail("no comparison of two halves with more than one class")
        reference = read_map(options["--ref"])
        self.pixel_A = reference.pixel_size_A
        for name in [f"half{h}_class001" for h in (1, 2)] if self.halves else self._classes(classes):
            own = options["--ref"]
            if self.rules.reads_reference_of_half and self.halves:
                own = re.sub("half[12]", name[:5], own)
            self.maps[name] = read_map(own).data.astype(np.float64)

    def _classes(self, count: int) -> list[str]:
        return [f"class{number:03d}" for number in range(1, count + 1)]

    def _read(self, optimiser: str) -> None:
        table = {block.name: block for block in read_blocks(optimiser)}["optimiser_general"].columns
        self.iteration, self.diameter = int(table["rlnCurrentIteration"][0]), table["rlnParticleDiameter"][0]
        self.halves = bool(int(table["rlnDoSplitRandomHalves"][0]))
        if not self.rules.forgets:
            self.external = bool(int(table["rlnDoExternalReconstruct"][0]))
        self.source = table["rlnExperimentalDataStarFile"][0]
        if not Path(table["rlnOrientSamplingStarFile"][0]).exists():
            fail(f"File {table['rlnOrientSamplingStarFile'][0]} cannot be read.")
        for key in ("rlnModelStarFile", "rlnModelStarFile2") if self.halves else ("rlnModelStarFile",):
            if not table.get(key, [""])[0]:
                fail(f"{key} not found in optimiser_general table")
            model = {block.name: block.columns for block in read_blocks(table[key][0])}
            self.pixel_A = float(model["model_general"]["rlnPixelSize"][0])
            for file in model["model_classes"]["rlnReferenceImage"]:
                name = re.search(r"(half\d_)?class\d+(?=\.mrc)", file)
                assert name is not None, file
                self.maps[name[0]] = read_map(file, self.pixel_A).data.astype(np.float64)

    def refine(self) -> None:
        limit = "--iter" if "--iter" in self.options else "--auto_iter_max"
        while self.iteration < int(self.options.get(limit, "999")):
            self.iteration += 1
            self.joined |= self.iteration > 2 and limit not in self.options
            last = self.joined
            print(f" Auto-refine: Iteration= {self.iteration}\n Auto-refine: Resolution= 20 (no gain for 0 iter)")
            if last:
                print(
                    " Auto-refine: Refinement has converged, entering last iteration where two halves will be combined"
                )
            print(" Oversampling= 0 NrHiddenVariableSamplingPoints= 9\n OrientationalSampling= 7.5 NrOrientations= 9")
            print(f" Expectation iteration {self.iteration}", flush=True)
            if self.iteration == self.dies_in and not Path("died").exists():
                Path("died").touch()
                fail("out of memory")
            self._maximise(last)
            self.write("" if last else f"_it{self.iteration:03d}")
            if last:
                return

    def _maximise(self, last: bool) -> None:
        blush = "--blush" in self.options
        print(f" Maximization{' (with Blush regularization)' if blush else ''}...", flush=True)
        if not (self.external or blush) or self.iteration in self.plain:
            return
        stem = f"{self.root}_it{self.iteration:03d}"
        if last and self.halves:
            self._call(f"{stem}_class001", sum(self.maps.values()) / 2)
            return
        results: dict[str, np.ndarray] = {}

        def one(name: str) -> None:
            results[name] = self._call(f"{stem}_{name}", self.maps[name])

        names = [name for name in self.maps if not self.only_half or name.startswith(f"half{self.only_half}")]
        threads = [threading.Thread(target=one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
            if "--sequential_halves_recons" in self.options:
                thread.join()
        for thread in threads:
            thread.join()
        if set(results) != set(names):
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
        if self.rules.tells_pixel_size:
            general |= {"rlnPixelSize": f"{self.pixel_A:.6f}", "rlnParticleDiameter": self.diameter}
        shells = [str(shell) for shell in range(box // 2 + 1)]
        tau2 = {
            "rlnSpectralIndex": shells,
            "rlnReferenceTau2": ["1.0e9"] * len(shells),
            "rlnGoldStandardFsc": ["0.9"] * len(shells),
        }
        blocks = [
            list_block("external_reconstruct_general", general),
            StarBlock("external_reconstruct_tau2", True, tau2),
        ]
        self._write_star(f"{stem}.star", blocks)
        self._start_program(f"{stem}.star")
        return read_map(f"{stem}.mrc", self.pixel_A).data.astype(np.float64)

    def _start_program(self, star: str) -> None:
        if "--blush" in self.options:
            command = f"relion_python_blush {star}  --gpu -1 "
            done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            if done.stdout.strip() != "success":
                sys.stderr.write("\nSomething went wrong in the external Python call...\n")
                sys.stderr.write(f"Command: {command}\n{done.stdout}\n")
                sys.stderr.flush()
                os._exit(1)
            return
        program = os.environ.get("RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE", "relion_external_reconstruct")
        if subprocess.run(f"{program} {star}", shell=True, stdin=subprocess.DEVNULL).returncode:
            fail(f" ERROR: there was something wrong with system call: {program} {star}")

    def _write_star(self, path: str, blocks: list[StarBlock], head: str = "") -> None:
        """With the version above every table, as RELION has it since 3.1."""
        write_blocks(path, blocks)
        text = re.sub(r"(?m)^# version.*\n\n?", "", Path(path).read_text())
        text = re.sub(r"(?m)^data_", f"\n# version {self.rules.star_version}\n\ndata_", text)
        Path(path).write_text(head + text)

    def write(self, iteration: str) -> None:
        """The files of an iteration; "": those of the end.

        A start writes those of the iteration before once more, and with ``--force_converge`` as if the half-sets were
        joined already; the models of both stay beside them, but the optimiser file does not name them any more.
        """
        stem, final = f"{self.root}{iteration}", not iteration
        particles = [block for block in read_blocks(self.source) if block.name in ("optics", "particles")]
        rows = len(particles[-1].columns["rlnImageName"])
        for name in POSE:
            particles[-1].columns[f"rln{name}"] = [f"{self.iteration:.6f}"] * rows
        particles[-1].columns["rlnNormCorrection"] = ["1.000000"] * rows
        self._write_star(f"{stem}_data.star", particles)
        names = ["class001"] if self.joined else list(self.maps)
        if self.joined:
            write_map(f"{stem}_class001.mrc", sum(self.maps.values()) / 2, self.pixel_A)
        for name, volume in self.maps.items() if final or not self.joined else ():
            write_map(f"{stem}_{name}{'_unfil' if final else ''}.mrc", volume, self.pixel_A)
        models = ["half1_", "half2_"] if self.halves and not self.joined else [""]
        for prefix in models:
            references = [f"{stem}_{name}.mrc" for name in names if name.startswith(prefix)]
            self._write_model(f"{stem}_{prefix}model.star", references)
        sampling = {"rlnIs3DSampling": "1", "rlnHealpixOrder": "3", "rlnSymmetryGroup": "C1"}
        self._write_star(f"{stem}_sampling.star", [list_block("sampling_general", sampling)])
        if not final or self.rules.ends_with_optimiser:
            self._write_optimiser(stem, models, final)

    def _write_model(self, path: str, references: list[str]) -> None:
        general = {
            "rlnDataDimensionality": "2", "rlnCurrentResolution": "20.0", "rlnPixelSize": f"{self.pixel_A:.6f}",
            "rlnAveragePmax": "0.5", "rlnLogLikelihood": "1.0",
        }  # fmt: skip
        shells = {"rlnSpectralIndex": ["0", "1"], "rlnGoldStandardFsc": ["1.0", "0.9"]}
        blocks = [list_block("model_general", general),
                  StarBlock("model_classes", True, {"rlnReferenceImage": references})]  # fmt: skip
        tables = [StarBlock(f"model_class_{k}", True, shells) for k in range(1, len(references) + 1)]
        self._write_star(path, [*blocks, *tables])

    def _write_optimiser(self, stem: str, models: list[str], final: bool) -> None:
        files = [*(f"{stem}_{prefix}model.star" for prefix in models), ""][:2]
        optimiser = {
            "rlnOutputRootName": self.root, "rlnModelStarFile": files[0],
            **({"rlnModelStarFile2": files[1]} if self.halves and not final else {}),
            "rlnExperimentalDataStarFile": f"{stem}_data.star",
            **({"rlnTomoTomogramsFile": ""} if self.rules.number >= (5,) else {}),
            "rlnOrientSamplingStarFile": f"{stem}_sampling.star",
            "rlnCurrentIteration": "-1" if final else str(self.iteration),
            "rlnDoSplitRandomHalves": str(int(self.halves and not final)),
            "rlnSolventMaskName": self.options.get("--solvent_mask", "None"), "rlnParticleDiameter": self.diameter,
            "rlnChangesOptimalOrientations": "3.5", "rlnChangesOptimalOffsets": "1.0",
            "rlnOverallAccuracyRotations": "2.0", "rlnHasConverged": str(int(self.joined)),
            "rlnDoExternalReconstruct": str(int(self.external)),
        }  # fmt: skip
        head = f"# RELION optimiser; version {self.rules.version}\n# {' '.join(sys.argv[1:])} \n"
        self._write_star(f"{stem}_optimiser.star", [list_block("optimiser_general", optimiser)], head)


if __name__ == "__main__":
    RULES = Rules(os.environ["STANDIN"].split(";")[0])
    if "--version" in sys.argv:
        print(f"RELION version: {RULES.version} \nPrecision: BASE=double\n")
    else:
        Run(parse(sys.argv[1:], RULES), RULES).refine()
