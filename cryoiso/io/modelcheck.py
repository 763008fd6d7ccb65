"""What can be wrong with the atoms of a PDB or mmCIF file, found before a density is made of them.

gemmi reads numbers leniently: a coordinate of ``********`` or blanks becomes 0, ``?`` becomes NaN, of a chain whose
residue numbers repeat only the first copy outlives the removal of alternative conformations. Here such atoms are named.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.packed import packing_of, unpacking
from cryoiso.io.regular_file import open_regular

logger = logging.getLogger("cryoiso")

MARKERS = frozenset({"DUM", "MEM", "VRT", "EMB", "UNX"})
"""Residues that are no matter: the membrane planes of OPM and MEMEMBED (DUM), Rosetta's membrane and virtual residues,
and the wwPDB's unknown atom."""
SOLVENT = frozenset({"HOH", "WAT", "DOD", "H2O", "SOL", "TIP", "TIP3", "TIP4", "T3P", "T4P", "SPC", "SPCE"})
"""Water, as the wwPDB and molecular dynamics programs call it."""
FARTHEST_A = 1e5
OVERLAP_A = 2.0
"""Atoms of different molecules do not come nearer, but for a few bonds across chains."""
APART, TOGETHER = 0.05, 0.2
"""Share of a model's atoms within ``OVERLAP_A`` of an earlier model: below the first they are parts of one assembly,
above the second alternatives of one another."""
COPY_RMSD_A = 0.5
RENAMED, FEWEST_RESIDUES = "~", 10
"""Mark of the second and later atoms of one name in a residue; a chain with so many such residues holds copies."""
_COORDINATES = (("x", 30, 38), ("y", 38, 46), ("z", 46, 54))
_OTHERS = (("occupancy", 54, 60), ("temperature factor", 60, 66))
_CIF = {
    "Cartn_x": "x", "Cartn_y": "y", "Cartn_z": "z", "occupancy": "occupancy", "B_iso_or_equiv": "temperature factor",
}  # fmt: skip


def require_numbers(structure: Any, path: object, is_pdb: bool) -> None:
    """Stops at the first atom whose coordinates, occupancy or temperature factor are no usable numbers.

    Args:
        structure: gemmi.Structure of the file.
        is_pdb: the file has PDB's columns.

    Raises:
        InputError: names row (PDB), atom and value.
    """
    if is_pdb:
        _check_columns(path)
    for model in structure:
        for chain, residue, atom in atoms_of(model):
            values = (*atom.pos.tolist(), atom.occ, atom.b_iso)
            usable = all(math.isfinite(v) for v in values) and max(map(abs, values[:3])) <= FARTHEST_A
            if usable and atom.occ >= 0:
                continue
            name = next(
                n for n, v in zip(_CIF.values(), values)
                if not math.isfinite(v) or (n in "xyz" and abs(v) > FARTHEST_A) or (n == "occupancy" and v < 0)
            )  # fmt: skip
            value = values[list(_CIF.values()).index(name)]
            raise _bad(path, None, name, _text_of(path, is_pdb, name) or f"{value:g}", _words(chain, residue, atom))


def atoms_of(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Chain, residue and atom of every atom."""
    for chain in model:
        for residue in chain:
            for atom in residue:
                yield chain, residue, atom


def _words(chain: Any, residue: Any, atom: Any) -> str:
    return f"atom {atom.name} of {residue.name} {residue.seqid} in chain {chain.name or '(blank)'}"


def _bad(path: object, row: int | None, name: str, value: str, atom: str) -> InputError:
    within = f" within {FARTHEST_A:g} Å" if name in ("x", "y", "z") else ", not negative" if name == "occupancy" else ""
    kind = "coordinate" if name in ("x", "y", "z") else ""
    return InputError(
        f"{atom} has no usable {name}{'-' + kind if kind else ''}", file=path, row=row, expected=f"a number{within}",
        found=repr(value), hint="Correct or remove the atom.", code="model-atom-invalid",
    )  # fmt: skip


def _check_columns(path: object) -> None:
    """The numbers of every ATOM and HETATM line: a shifted column would otherwise be read as another number."""
    with unpacking(path, "gzip") if packing_of(path) == "gzip" else open_regular(path) as stream:
        for row, raw in enumerate(stream, start=1):
            if raw[:4].upper() != b"ATOM" and raw[:6].upper() != b"HETATM":
                continue
            line = raw.decode("latin-1").rstrip("\r\n")
            for name, first, last in (*_COORDINATES, *_OTHERS):
                text = line[first:last].strip()
                if not text and name in ("occupancy", "temperature factor"):
                    continue
                if not _is_number(text) or (name == "occupancy" and float(text) < 0):
                    atom = f"atom {line[12:16].strip()} of {line[17:21].strip()} {line[22:27].strip()} in chain "
                    raise _bad(path, row, name, line[first:last], atom + (line[20:22].strip() or "(blank)"))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _text_of(path: object, is_pdb: bool, name: str) -> str:
    """What stands in an mmCIF file where a number of this kind is not one."""
    import gemmi

    if is_pdb:
        return ""
    column = next(k for k, v in _CIF.items() if v == name)
    values = gemmi.cif.read(str(path))[0].find_values(f"_atom_site.{column}")
    return next((v for v in values if not math.isfinite(gemmi.cif.as_number(v))), "")


def one_model(structure: Any, path: object) -> tuple[Any, bool]:
    """The model of a file, and whether it was joined from several MODELs.

    MODELs that lie side by side are the copies of a biological assembly, and are joined; MODELs that lie on one another
    are alternatives (an NMR ensemble, a trajectory), of which the first is taken. The log says which.

    Raises:
        InputError: neither is clear.
    """
    if len(structure) == 1:
        return structure[0], False
    places = [np.array([a.pos.tolist() for _, _, a in atoms_of(m)]).reshape(-1, 3) for m in structure]
    models = [m for m, p in zip(structure, places) if len(p)]
    places = [p for p in places if len(p)]
    if len(models) < 2:
        return (models or structure)[0], False
    shares = _overlaps(places)
    if min(shares) >= TOGETHER:
        logger.info(
            "%s: %d MODELs lie on one another (alternatives, as of an NMR ensemble): the first is taken",
            path, len(places),
        )  # fmt: skip
        return models[0], False
    if max(shares) < APART and _are_copies(places):
        logger.info("%s: %d MODELs lie side by side: taken together, as one assembly", path, len(places))
        return _joined(models), True
    raise InputError(
        f"it is not clear what its {len(places)} MODELs are", file=path,
        expected="copies side by side (an assembly), or alternatives in one place (an ensemble)",
        found=f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % of the atoms of the others within {OVERLAP_A:g} Å "
        "of an earlier one" + ("" if _are_copies(places) else ", and no rigid copies"),
        hint="Keep the MODELs that you mean, as chains of one.", code="model-ambiguous",
    )  # fmt: skip


def _overlaps(places: list[np.ndarray]) -> list[float]:
    """For every model but the first the share of its atoms that lie on an atom of an earlier one."""
    from scipy.spatial import cKDTree

    shares = []
    for number in range(1, len(places)):
        earlier = cKDTree(np.concatenate(places[:number]) if number < 9 else places[0])
        distance, _ = earlier.query(places[number], distance_upper_bound=OVERLAP_A)
        shares.append(float(np.isfinite(distance).mean()))
    return shares


def _are_copies(places: list[np.ndarray]) -> bool:
    """Whether all models of as many atoms as the first are rigid copies of it; others are other parts."""
    from cryoiso.io.symmetryframe import superpose

    same = [p for p in places[1:] if len(p) == len(places[0])]
    return all(superpose(p, places[0])[2] < COPY_RMSD_A for p in same)


def _joined(models: Any) -> Any:
    import gemmi

    joined = gemmi.Model(1)
    used: set[str] = set()
    for model in models:
        for chain in model:
            copy = chain.clone()
            copy.name = _free_name(chain.name, used)
            joined.add_chain(copy)
    return joined


def _free_name(name: str, used: set[str]) -> str:
    number, free_name = 1, name
    while free_name in used:
        number += 1
        free_name = f"{name}{number}"
    used.add(free_name)
    return free_name


def without_markers(model: Any, path: object) -> None:
    """Takes out marker residues, in place; the log says how many atoms those were.

    Raises:
        InputError: an atom elsewhere is of no known element.
    """
    import gemmi

    unknown = gemmi.Element("X")
    count: dict[str, int] = {}
    for chain in model:
        for index in reversed(range(len(chain))):
            residue = chain[index]
            if residue.name in MARKERS:
                count[residue.name] = count.get(residue.name, 0) + len(residue)
                del chain[index]
    for chain, residue, atom in atoms_of(model):
        if atom.element == unknown:
            raise InputError(
                f"{_words(chain, residue, atom)} is of no known element", file=path,
                expected="an element's symbol in columns 77-78 (PDB) or type_symbol (mmCIF)",
                found=repr(atom.element.name),
                hint="Correct or remove the atom.", code="model-atom-invalid",
            )  # fmt: skip
    for name, atoms in count.items():
        logger.warning("%s: %d marker atoms (%s) are no matter and are left out", path, atoms, name)
    _drop_empty_chains(model)


def _drop_empty_chains(model: Any) -> None:
    for index in reversed(range(len(model))):
        if len(model[index]) == 0:
            del model[index]


def without_empty(model: Any) -> None:
    """Takes out residues and chains without atoms, in place."""
    for chain in model:
        for index in reversed(range(len(chain))):
            if len(chain[index]) == 0:
                del chain[index]
    _drop_empty_chains(model)


def without_solvent(model: Any) -> None:
    """Takes out water by any of its names, in place."""
    for chain in model:
        for index in reversed(range(len(chain))):
            if chain[index].name in SOLVENT:
                del chain[index]
    _drop_empty_chains(model)


def count_once(model: Any, path: object) -> None:
    """Takes out atoms that stand twice in the same place, and gives others of one name in one residue their own names.

    Else the removal of alternative conformations would take them for such. Changes the model.
    """
    seen: set[tuple[float, ...]] = set()
    doubled = 0
    for chain in model:
        for residue in chain:
            names: dict[str, int] = {}
            for index in range(len(residue) - 1, -1, -1):
                atom = residue[index]
                if atom.altloc != "\0":
                    continue
                place = (*(round(v, 2) for v in atom.pos.tolist()), atom.element.atomic_number)
                if place in seen:
                    doubled += 1
                    del residue[index]
                seen.add(place)
            for atom in residue:
                if atom.altloc == "\0":
                    names[atom.name] = number = names.get(atom.name, 0) + 1
                    if number > 1:
                        atom.name = f"{atom.name}{RENAMED}{number}"
    if doubled:
        logger.warning("%s: %d atoms stand twice in the same place; each counts once", path, doubled)


def cut_repeats(model: Any) -> None:
    """Cuts a chain whose residue numbers begin again (copies under one identifier) into several, in place."""
    import gemmi

    used = {chain.name for chain in model}
    new = []
    for chain in model:
        new += _copies_in_residues(chain, used)
        pieces = _pieces(chain)
        for piece in pieces[1:]:
            copy = gemmi.Chain(_free_name(chain.name or "A", used))
            for index in piece:
                copy.add_residue(chain[index])
            new.append(copy)
        for index in sorted((i for piece in pieces[1:] for i in piece), reverse=True):
            del chain[index]
    for copy in new:
        model.add_chain(copy)


def _copies_in_residues(chain: Any, used: set[str]) -> list[Any]:
    """The second and later copies of a chain that the reader put into the residues of the first, taken out of it."""
    import gemmi

    copies: dict[str, Any] = {}
    if sum(any(RENAMED in atom.name for atom in residue) for residue in chain) < FEWEST_RESIDUES:
        return []
    for residue in chain:
        for number in sorted({atom.name.split(RENAMED)[1] for atom in residue if RENAMED in atom.name}):
            if number not in copies:
                copies[number] = gemmi.Chain(_free_name(chain.name or "A", used))
            copy = residue.clone()
            for index in reversed(range(len(copy))):
                name, _, of = copy[index].name.partition(RENAMED)
                if of == number:
                    copy[index].name = name
                else:
                    del copy[index]
            copies[number].add_residue(copy)
        for index in reversed(range(len(residue))):
            if RENAMED in residue[index].name:
                del residue[index]
    return [copies[number] for number in sorted(copies)]


def _pieces(chain: Any) -> list[list[int]]:
    """Indices of the residues of each copy in a chain whose numbers begin again; alternatives of a residue are none."""
    pieces: list[list[int]] = [[]]
    seen: set[str] = set()
    for index, residue in enumerate(chain):
        name = str(residue.seqid)
        if name in seen and all(atom.altloc == "\0" for atom in residue):
            pieces.append([])
            seen = set()
        seen.add(name)
        pieces[-1].append(index)
    return pieces


def has_pdb_columns(path: object) -> bool:
    """Whether a model's file has PDB's columns, by its name."""
    return not str(path).lower().removesuffix(".gz").endswith((".cif", ".mmcif"))
