"""Atomic models (PDB, mmCIF, packed or not) as densities at a resolution, read and rasterised by gemmi.

Hydrogens, waters and alternative conformations go; electron form factors and temperature factors stay (International
Tables C, 4.3.2.2, as gemmi has them). The resolution is a Gaussian blur of sigma = 0.225 x resolution, as ChimeraX
molmap does it.
"""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.confidence import ModelChoice, select_chains, source_of, use_confidence
from cryoiso.io.modelcheck import (
    count_once,
    cut_repeats,
    has_pdb_columns,
    one_model,
    require_numbers,
    without_empty,
    without_markers,
    without_solvent,
)
from cryoiso.io.regular_file import require_regular_file

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("cryoiso")

SIGMA_OF_RESOLUTION = 0.225
B_RANGE_A2 = (30.0, 150.0)
"""Refined temperature factors outside this range say more about the refinement than about the density."""
MODEL_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")


def is_model(path: object) -> bool:
    """Whether a file is an atomic model by its name (``.pdb``, ``.ent``, ``.cif``, ``.mmcif``, each also ``.gz``).

    The PDB's files of biological assemblies, ``.pdb1``, ``.pdb2`` ..., are as well.
    """
    name = str(path).lower().removesuffix(".gz")
    return name.endswith(MODEL_SUFFIXES) or re.search(r"\.pdb\d+$", name) is not None


def read_model(path: object, assembly: str = "auto") -> Any:
    """The model of a file as a gemmi.Model without hydrogens, waters, alternative conformations and marker atoms.

    Several MODELs are joined if they lie side by side (an assembly); of alternatives the first is taken.

    Args:
        path: PDB or mmCIF, may be gzipped.
        assembly: "auto" (biological assembly 1 if it is made by more than one operator), "none" (as deposited) or the
            name of an assembly.

    Raises:
        InputError: no such file, unreadable, no atoms, an atom without usable numbers or of no known element, unknown
            assembly, MODELs that are neither an assembly nor alternatives.
    """
    return _read(path, ModelChoice(assembly=assembly), cut=False)[0]


def load_model(path: object, choice: ModelChoice | None = None) -> tuple[Any, dict[str, Any]]:
    """The chosen part of a model, as ``read_model``, without the residues of which a prediction is not sure.

    Args:
        choice: chains, assembly, and how confident a residue must be.

    Returns:
        gemmi.Model, whose occupancies are weights, and what was chosen, for JSON (`cryoiso.io.confidence`).

    Raises:
        InputError: as ``read_model``; no such chain; no residue as confident as asked.
    """
    return _read(path, choice or ModelChoice(), cut=True)


def _read(path: object, choice: ModelChoice, cut: bool) -> tuple[Any, dict[str, Any]]:
    import gemmi

    require_regular_file(path)
    pdb = has_pdb_columns(path)
    kind = gemmi.CoorFormat.Pdb if pdb else gemmi.CoorFormat.Mmcif
    try:
        structure = gemmi.read_structure(str(path), format=kind)
    except Exception as error:  # whatever the parser stumbles over
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"not a readable atomic model: {message}", file=path, expected="a PDB or mmCIF file", code="model-malformed"
        ) from None
    if not len(structure) or all(model.count_atom_sites() == 0 for model in structure):
        raise InputError(
            "there are no atoms in it",
            file=path,
            expected="a PDB or mmCIF file with coordinates",
            code="model-malformed",
        )
    try:
        require_numbers(structure, path, pdb)
        select_chains(structure, choice.chains, path)
        model = _cleaned(structure, choice, path)
        facts: dict[str, Any] = {"chains": list(choice.chains), "atoms": model.count_atom_sites()}
        return model, facts | use_confidence(model, source_of(structure, path, pdb), choice, path, cut)
    except UnicodeDecodeError:
        raise InputError(
            "the name of an atom, residue or chain is not text", file=path, code="model-malformed"
        ) from None


def _cleaned(structure: Any, choice: ModelChoice, path: object) -> Any:
    """What of a file's MODELs is one molecule, at full occupancy, without all that is no part of it."""
    model, joined = one_model(structure, path)
    without_markers(model, path)
    count_once(model, path)
    if not joined or choice.assembly not in ("auto", "none"):
        model = _assembled(structure, model, choice.assembly, path, bool(choice.chains))
    cut_repeats(model)
    model.remove_alternative_conformations()
    model.remove_hydrogens()
    without_solvent(model)
    model.remove_waters()
    if model.count_atom_sites() == 0:
        raise InputError("there are no atoms in it but water, hydrogen and markers", file=path, code="model-malformed")
    without_empty(model)
    for chain in model:
        for residue in chain:
            for atom in residue:
                atom.occ = 1.0
    return model


def _assembled(structure: Any, model: Any, assembly: str, path: object, selected: bool) -> Any:
    """
    Args:
        selected: only some chains of the file are left; the assembly is made of these.
    """
    import gemmi

    if assembly == "none":
        return model
    wanted = "1" if assembly == "auto" else assembly
    chosen = next((a for a in structure.assemblies if a.name == wanted), None)
    if chosen is None:
        if assembly == "auto":
            return model
        names = ", ".join(a.name for a in structure.assemblies) or "none"
        raise InputError(
            "no such biological assembly",
            file=path,
            expected=f"one of: {names}",
            found=assembly,
            code="assembly-unavailable",
        )
    operators = sum(len(g.operators) for g in chosen.generators)
    if assembly == "auto" and operators < 2:
        return model
    if selected:
        _restrict(chosen, model)
    try:
        assembled = gemmi.make_assembly(chosen, model, gemmi.HowToNameCopiedChain.AddNumber)
    except RuntimeError as error:
        raise InputError(
            f"its biological assembly {wanted} cannot be built: {error}",
            file=path,
            hint="Set reference.assembly (--assembly) to none.",
            code="assembly-unavailable",
        ) from None
    if assembly == "auto" and assembled.count_atom_sites() <= model.count_atom_sites():
        return model
    logger.info("%s: biological assembly %s, %d operators", path, wanted, operators)
    return assembled


def _restrict(assembly: Any, model: Any) -> None:
    """Leaves in the generators of an assembly what is in the model, in place."""
    chains = {chain.name for chain in model}
    parts = {part.subchain_id() for chain in model for part in chain.subchains()}
    for generator in assembly.generators:
        generator.chains = [name for name in generator.chains if name in chains]
        generator.subchains = [name for name in generator.subchains if name in parts]


def positions(model: Any) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Coordinates (n, 3) in Å (x, y, z) and atomic masses (n,)."""
    atoms = [(a.pos.x, a.pos.y, a.pos.z, a.element.weight) for chain in model for residue in chain for a in residue]
    table = np.array(atoms, np.float64)
    return table[:, :3], table[:, 3]


def model_to_map(
    path: object,
    box_px: int,
    pixel_size_A: float,
    resolution_A: float,
    centre: bool = True,
    assembly: str = "auto",
    align_symmetry_axis: str = "",
    placement: tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]] | None = None,
) -> DensityMap:
    """Density of an atomic model; of a predicted one, without what it is not sure of (``load_model``).

    Args:
        path: PDB or mmCIF.
        box_px, pixel_size_A: the grid.
        resolution_A: of the map; finer than two pixels is cut off at Nyquist.
        centre: put the centre of mass on voxel D//2; else coordinates are kept, with (0, 0, 0) on voxel D//2.
        assembly: see ``read_model``.
        align_symmetry_axis: a point group such as "C3": turn the model into that group's standard frame (Cn about z).
        placement: rotation R (3, 3) and shift d (3,) in Å, applied after that: a point x goes to R x + d.

    Returns:
        DensityMap: float32 (z, y, x), in units of gemmi's electrostatic density per Å^3.

    Raises:
        InputError: an unreadable model, one that does not fit the box, or one without the symmetry asked for.
    """
    model = load_model(path, ModelChoice(assembly=assembly))[0]
    return loaded_model_to_map(
        model, path, box_px, pixel_size_A, resolution_A, centre, align_symmetry_axis, placement
    )  # fmt: skip


def loaded_model_to_map(
    model: Any,
    path: object,
    box_px: int,
    pixel_size_A: float,
    resolution_A: float,
    centre: bool = True,
    align_symmetry_axis: str = "",
    placement: tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]] | None = None,
) -> DensityMap:
    """As ``model_to_map``, of a gemmi.Model that was read before, and stays as it is.

    Args:
        path: for messages.
    """
    xyz, mass = positions(model)
    rotation, offset = np.eye(3), np.zeros(3)
    if align_symmetry_axis and align_symmetry_axis.upper() != "C1":
        from cryoiso.io.symmetryframe import symmetry_frame

        rotation, axis_point = symmetry_frame(model, align_symmetry_axis, path)
        along = np.average((xyz - axis_point) @ rotation.T, axis=0, weights=mass)
        keep = np.array([0.0, 0.0, 1.0 if align_symmetry_axis.upper().startswith("C") else 0.0])
        offset = -rotation @ axis_point - keep * along
    elif centre:
        offset = -np.average(xyz, axis=0, weights=mass)
    if placement is not None:
        turn, shift_A = (np.asarray(part, np.float64) for part in placement)
        rotation, offset = turn @ rotation, turn @ offset + shift_A
    reach = float(np.abs(xyz @ rotation.T + offset).max())
    side = box_px * pixel_size_A
    if reach > side / 2:
        raise InputError(
            "the model does not fit into the box",
            file=path,
            expected=f"at least {math.ceil(2 * reach / pixel_size_A)} px of {pixel_size_A:g} Å",
            found=f"{box_px} px",
            code="model-exceeds-box",
        )
    density = fine_density(model.clone(), box_px, pixel_size_A, resolution_A, rotation, offset)
    return DensityMap(density, float(pixel_size_A))


def fine_density(
    model: Any, box_px: int, pixel_size_A: float, resolution_A: float, rotation: np.ndarray, offset_A: np.ndarray
) -> Float[np.ndarray, "box box box"]:
    """(D, D, D) density of a gemmi.Model, which is moved: an atom at x goes to R x + d, counted from voxel D//2."""
    _transform(model, rotation, offset_A + (box_px // 2) * pixel_size_A)
    return _rasterise(model, box_px, pixel_size_A, resolution_A)


def _transform(model: Any, rotation: np.ndarray, offset: np.ndarray) -> None:
    """Moves the atoms and makes their temperature factors usable: isotropic, within ``B_RANGE_A2``."""
    import gemmi

    transform = gemmi.Transform()
    transform.mat.fromlist(rotation.tolist())
    transform.vec.fromlist(offset.tolist())
    model.transform_pos_and_adp(transform)
    low, high = B_RANGE_A2
    for chain in model:
        for residue in chain:
            for atom in residue:
                atom.b_iso = min(max(atom.b_iso, low), high)
                if atom.aniso.nonzero():
                    atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)


def fine_grid_px(box_px: int, pixel_size_A: float, resolution_A: float) -> int:
    """Side of the grid on which atoms are drawn, fine enough that what folds back below Nyquist is under a thousandth.

    Sampling at spacing d adds the transform at 1/d - s to that at s; with the blur exp(-2 pi^2 sigma^2 s^2) that is
    1e-3 at sigma s = 0.592.
    """
    from scipy.fft import next_fast_len

    edge = 0.592 / (SIGMA_OF_RESOLUTION * resolution_A) + 0.5 / pixel_size_A
    return int(next_fast_len(max(box_px, math.ceil(box_px * pixel_size_A * edge)), real=True))


def _rasterise(model: Any, box_px: int, pixel_size_A: float, resolution_A: float) -> np.ndarray:
    import gemmi
    from scipy import fft

    side = box_px * pixel_size_A
    fine = fine_grid_px(box_px, pixel_size_A, resolution_A)
    structure = gemmi.Structure()
    structure.cell = gemmi.UnitCell(side, side, side, 90, 90, 90)
    structure.spacegroup_hm = "P 1"
    structure.add_model(model)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(structure.cell)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
    calculator.grid.set_size(fine, fine, fine)
    calculator.blur = 8 * math.pi**2 * (SIGMA_OF_RESOLUTION * resolution_A) ** 2
    calculator.add_model_density_to_grid(structure[0])
    spectrum = fft.rfftn(np.array(calculator.grid, copy=False))
    return _crop_spectrum(spectrum, fine, box_px)


def _crop_spectrum(spectrum: np.ndarray, fine: int, box_px: int) -> np.ndarray:
    """The transform of a fine (x, y, z) grid, cut at the Nyquist sphere of the coarse one, as a (z, y, x) density."""
    from scipy import fft

    full = np.fft.fftfreq(box_px, 1 / box_px).round().astype(int)
    half = np.arange(box_px // 2 + 1)
    small = spectrum[np.ix_(full % fine, full % fine, half)]
    radius2 = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
    small[radius2 >= (box_px / 2) ** 2] = 0
    density = fft.irfftn(small, s=(box_px,) * 3) * (box_px / fine) ** 3
    return np.ascontiguousarray(density.transpose(2, 1, 0), np.float32)
