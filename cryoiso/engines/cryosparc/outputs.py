"""What goes into cryoSPARC: outputs of an external job, and the columns of their tables.

Which fields a table has is cryoSPARC's to say (``alloc_output``); of ours, those are filled in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError

SLOTS = {
    "particles": ("particle", ["blob", "ctf", "alignments3D"]),
    "volume": ("volume", ["map"]),
    "mask": ("mask", ["mask"]),
}  # fmt: skip
"""Output of the external job, which is also the input of the refinement -> its type and slots."""
NEEDED = {
    "particles": ("blob/path", "blob/idx", "ctf/df1_A", "alignments3D/split", "alignments3D/pose"),
    "volume": ("map/path",),
    "mask": ("mask/path",),
}  # fmt: skip
"""Fields without which the tables would not say what they must."""
REFERENCE, MASK = products.REFERENCE, products.MASK


@dataclass(frozen=True)
class Shipment:
    """Files and tables of one round."""

    rows: np.ndarray
    """(n,) fields of the particles, as a .cs file has them; blob/path: on this machine."""
    maps: tuple[tuple[str, Path], ...]
    """Name in the job's folder, and file, of the reference and the mask."""
    box_px: int
    pixel_size_A: float

    @property
    def stacks(self) -> tuple[tuple[str, Path], ...]:
        """Name in the job's folder, and file, of every stack of images."""
        paths = sorted(set(_texts(self.rows["blob/path"])))
        return tuple((f"images/{i:04d}_{os.path.basename(name)}", Path(name)) for i, name in enumerate(paths, 1))

    def columns(self, name: str, images: str, job: str) -> dict[str, Any] | None:
        """Field -> values of an output; None: there is none.

        Args:
            name: key of ``SLOTS``.
            images: uid of the job that the stacks were uploaded to; empty: cryoSPARC reads them where they are.
            job: uid of the job with the maps.
        """
        if name == "particles":
            return self._particles(images)
        file, field = (REFERENCE, "map") if name == "volume" else (MASK, "mask")
        if file not in dict(self.maps):
            return None
        return {
            "uid": np.array([1], np.uint64),
            f"{field}/path": [f"{job}/{file}"],
            f"{field}/idx": np.zeros(1, np.uint32),
            f"{field}/shape": np.full((1, 3), self.box_px, np.uint32),
            f"{field}/psize_A": np.array([self.pixel_size_A], np.float32),
        }

    def _particles(self, images: str) -> dict[str, Any]:
        slots = SLOTS["particles"][1]
        names = [name for name in self.rows.dtype.names or () if name == "uid" or name.partition("/")[0] in slots]
        columns: dict[str, Any] = {name: self.rows[name] for name in names}
        paths = _texts(columns["blob/path"])
        if images:
            there = {str(path): f"{images}/{name}" for name, path in self.stacks}
            paths = [there[path] for path in paths]
        return columns | {"blob/path": paths, "ctf/type": _texts(columns["ctf/type"])}


def filled(table: Any, columns: dict[str, Any], name: str) -> Any:
    """The table with our values in the fields that it has.

    Raises:
        CryoisoError: it lacks one that is needed, or we have none for it.
    """
    fields = set(table.fields())
    missing = [field for field in NEEDED[name] if field not in fields or field not in columns]
    if missing:
        raise CryoisoError(
            f"cryoSPARC's table of {name} has no field {missing[0]}: this version of cryoSPARC is not known here. "
            "Use engine = 'files'",
            code="cryosparc-refused",
        )
    for field, values in columns.items():
        if field in fields and field != "uid":
            table[field] = values
    return table


def _texts(values: np.ndarray) -> list[str]:
    return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v) for v in values.tolist()]
