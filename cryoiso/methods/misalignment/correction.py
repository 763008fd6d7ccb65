"""The correction that an engine calls between its iterations: half-maps in, isotropic references out.

keep low resolution -> whitening -> FSC weighting -> anisotropy correction -> low-pass -> grey scale; each step on one
half at a time. What crosses from one half to the other: the half-map FSC, the 3DFSC and, where the engine has none, a
mask made from both references; in mode ``paired`` also the network.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.config import CorrectSection, RealignSection
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import HalfMaps
from cryoiso.core.rng import generator
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.io.atomic import write_text
from cryoiso.methods.anisotropy.filter import band
from cryoiso.methods.misalignment import networks
from cryoiso.methods.misalignment.steps import fsc_weight, keep_low_resolution, lowpass_at, match_scale, whiten
from cryoiso.metrics.directional_fsc import fsc3d
from cryoiso.metrics.half_maps import check_half_maps
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.partition import root_of_half

logger = logging.getLogger("cryoiso")
EPOCHS = {"paper": 5, "small": 3}
"""Passes over the sub-maps in one iteration, by preset."""
STEP_TOLERANCE = 1.01
EDGE_SHELLS = 3.0
"""Width of the low-pass filters' edge, here and in the anisotropy correction."""


class MapCorrection:
    """``core.protocols.ReferenceCorrection`` with a network that removes the anisotropy of the references."""

    def __init__(self, realign: RealignSection, correct: CorrectSection, seed: int = 0) -> None:
        self.realign = realign
        self.correct = correct.model_copy(update={"mode": realign.mode})
        self.seed = seed

    def facts(self) -> dict[str, Any]:
        """What a refinement writes down about its correction."""
        shared = bool(self.realign.correct and self.realign.mode == "paired")
        return {**self.realign.model_dump(), "halves_share_a_network": shared}

    def identity(self) -> dict[str, Any]:
        """Everything that decides what it makes of an iteration's maps."""
        return {"realign": self.realign.model_dump(), "correct": self.correct.model_dump(), "seed": self.seed}

    def why_not(self, state: HalfMaps) -> str:
        """Why it leaves the references of this iteration alone; empty if it does not."""
        r = self.realign
        if state.step_deg > r.start_step_deg * STEP_TOLERANCE:
            return f"the angular sampling of {state.step_deg:.3g}° is coarser than {r.start_step_deg:g}°"
        if r.start_resolution_A is not None and not state.resolution_A <= r.start_resolution_A:
            return f"the resolution of {state.resolution_A:.1f} Å is not better than {r.start_resolution_A:g} Å"
        return ""

    def wants(self, state: HalfMaps) -> bool:
        """Whether it works on this iteration; the same on every rank, since the state is."""
        return not self.why_not(state)

    def __call__(self, state: HalfMaps, comm: Any) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
        """Next references and numbers for the iteration's record. Collective; see ``core.protocols``."""
        mask = on_root(comm, support, state)
        fsc_filter = on_root(comm, self._transfer, state, mask)
        inputs = self._by_half(comm, lambda half: self._prepared(state, half, mask))
        facts: dict[str, Any] = {"applied": True, "mean_transfer": _rounded(mean_inside(fsc_filter, state))}
        if self.realign.correct:
            inputs, learnt = self._without_anisotropy(state, inputs, self._known(state, fsc_filter), mask, comm)
            facts |= learnt
        corrected_maps = self._by_half(comm, lambda half: self._finished(state, half, inputs[half], fsc_filter, mask))
        facts["scale"] = {str(half): extremes(corrected_maps[half][1], state) for half in HALVES}
        if comm.rank == 0:
            logger.info("iteration %d: references corrected%s", state.iteration, _in_words(facts))
        return {half: corrected_maps[half][0] for half in HALVES}, facts

    def _by_half(self, comm: Any, make: Any) -> dict[int, Any]:
        """half -> make(half), made on the half's root and given to all (collective)."""
        size = comm.size
        own_maps = {half: make(half) if comm.rank == root_of_half(half, size) else None for half in HALVES}
        return {half: comm.bcast(own_maps[half], root_of_half(half, size)) for half in HALVES}

    def _transfer(self, state: HalfMaps, mask: np.ndarray) -> np.ndarray:
        """3DFSC of the half-maps as they are: nothing that both halves share has been put into them yet."""
        for words in check_half_maps(state.maps[1], state.maps[2]):
            logger.warning("iteration %d: %s", state.iteration, words)
        shells = int(np.ceil(shell_of(state) + EDGE_SHELLS / 2))
        measured = fsc3d(
            state.maps[1], state.maps[2], mask, cone_deg=self.correct.cone_deg, max_shell=min(shells, len(mask) // 2)
        )  # fmt: skip
        clipped: np.ndarray = np.clip(measured, 0.0, 1.0)
        return clipped

    def _known(self, state: HalfMaps, fsc_filter: np.ndarray) -> np.ndarray:
        """What the correction need not infer: the measured directions, and all of the low resolution that was kept."""
        kept_A = self.realign.keep_lowres_A
        return np.maximum(fsc_filter, band(len(fsc_filter), state.pixel_size_A, kept_A)) if kept_A else fsc_filter

    def _prepared(self, state: HalfMaps, half: int, mask: np.ndarray) -> np.ndarray:
        """What the network gets to see of a half."""
        r, pixel = self.realign, state.pixel_size_A
        volume = (state.maps if r.source == "maps" else state.references)[half]
        if r.keep_lowres_A:
            if state.initial is None:
                raise InputError(
                    "this engine does not return its first reference, so low resolution cannot be kept",
                    code="options-conflict",
                )
            volume = keep_low_resolution(volume, state.initial[half], pixel, r.keep_lowres_A, mask=mask)
        if r.whitening:
            volume = whiten(volume, pixel, r.whitening_from_A, state.resolution_A, mask=mask)
        if r.fsc_weighting:
            volume = fsc_weight(volume, state.fsc)
        return volume

    def _finished(
        self, state: HalfMaps, half: int, volume: np.ndarray, fsc_filter: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next reference and the factors of its shells."""
        r, original, limit = self.realign, state.references[half], (state.pixel_size_A, state.resolution_A)
        if not r.correct:  # a correction has the same limit already
            volume = lowpass_at(volume, *limit)
        last_shell = int(shell_of(state) - EDGE_SHELLS / 2)
        volume, factor = match_scale(
            volume, original, fsc_filter, mask=mask, by_shell=r.match_scale, last_shell=last_shell
        )  # fmt: skip
        return (volume if r.lowpass else volume + original - lowpass_at(original, *limit)), factor

    def _without_anisotropy(
        self, state: HalfMaps, inputs: dict[int, np.ndarray], fsc_filter: np.ndarray, mask: np.ndarray, comm: Any
    ) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
        from cryoiso.methods.anisotropy.correct import correct_halves
        from cryoiso.methods.anisotropy.settings import agreed, resolve

        retrain = self.realign.retrain
        settings = agreed(resolve(self.correct, comm.device()), comm)
        settings = replace(settings, epochs=self.realign.epochs or EPOCHS[settings.preset])
        known = on_root(comm, networks.before, state.folder, state.iteration, first=retrain == "never")
        warm = None if retrain == "afresh" else known
        if warm and retrain == "never":
            settings = replace(settings, epochs=0)
        work = state.folder / f"correction-{state.iteration:03d}"
        resume = on_root(comm, _open, work, fingerprint(inputs, fsc_filter, mask, settings, warm))
        corrected = correct_halves(
            {half: DensityMap(inputs[half], state.pixel_size_A) for half in HALVES}, fsc_filter, mask, settings, comm,
            work, seed=int(generator(self.seed, "misalignment", state.iteration).integers(2**31)), resume=resume,
            warm=warm, resolution_A=state.resolution_A,
        )  # fmt: skip
        network_files = corrected.network if settings.epochs else {}
        names = on_root(comm, networks.keep, state.folder, state.iteration, network_files)
        on_root(comm, shutil.rmtree, work, ignore_errors=True)
        names = names or sorted(path.name for path in (warm or {}).values())
        return corrected.maps, {"networks": names, "warm": bool(warm), "loss": losses(corrected.history)}


def support(state: HalfMaps) -> np.ndarray:
    """Where the particle is: the engine's mask, else a soft one around the mean of both references."""
    from cryoiso.physics.masks import soft_mask_from_map, sphere_mask

    if state.mask is not None:
        return state.mask
    mean = (state.references[1] + state.references[2]) / 2
    try:
        lowpass_A = max(15.0, 1.5 * state.resolution_A)
        return np.asarray(soft_mask_from_map(mean, state.pixel_size_A, lowpass_A, extend_A=4.5), np.float32)
    except InputError:
        return np.asarray(sphere_mask(len(mean), 0.4 * len(mean), 0.08 * len(mean)), np.float32)


def mean_inside(fsc_filter: np.ndarray, state: HalfMaps) -> float:
    """Mean of a centred filter over all coefficients up to the resolution: 1 if every direction was measured."""
    axis2 = (np.arange(len(fsc_filter)) - len(fsc_filter) // 2.0) ** 2
    r2 = axis2[:, None, None] + axis2[:, None] + axis2
    inside = (r2 > 0) & (r2 <= shell_of(state) ** 2)
    return float(fsc_filter[inside].mean()) if inside.any() else 1.0


def shell_of(state: HalfMaps) -> float:
    """The resolution in Fourier pixels."""
    return len(state.maps[1]) * state.pixel_size_A / state.resolution_A


def extremes(factor: np.ndarray, state: HalfMaps) -> list[float]:
    """Smallest and largest factor of the shells up to the resolution."""
    last = max(1, int(shell_of(state)))
    return [_rounded(float(x)) for x in (factor[1 : last + 1].min(), factor[1 : last + 1].max())]


def fingerprint(
    inputs: dict[int, np.ndarray], fsc_filter: np.ndarray, mask: np.ndarray, settings: Any, warm: Any
) -> str:
    """A hash of everything that a training depends on, so that an interrupted one goes on only with the same.

    Not the precision: it stays what it was when the training began, on whatever device it goes on.
    """
    digest = hashlib.blake2b(digest_size=16)
    for array in (*inputs.values(), fsc_filter, mask):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(f"{replace(settings, bfloat16=False)} {sorted((warm or {}).items())}".encode())
    return digest.hexdigest()


def _open(work: Path, print_: str) -> bool:
    """Makes the folder of a training; True if an interrupted one of the same inputs lies in it."""
    note = work / "inputs.txt"
    if note.exists() and note.read_text(encoding="utf-8").strip() == print_:
        return True
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_text(note, print_ + "\n")
    return False


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def losses(history: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Network -> first and last loss that its training wrote down."""
    curves = {name: [r["loss"] for r in records if r.get("loss") is not None] for name, records in history.items()}
    return {name: [_rounded(values[0]), _rounded(values[-1])] for name, values in curves.items() if values}


def _in_words(facts: dict[str, Any]) -> str:
    trained = "".join(f", loss {first:.4g} to {last:.4g}" for first, last in facts.get("loss", {}).values())
    return f" (measured directions {100 * facts['mean_transfer']:.0f} %{trained})"
