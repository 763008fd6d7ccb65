"""What must hold before a folder of shards is used: it may come from anywhere.

HDF5 can read from other files behind a program's back (external and soft links, external storage, virtual data sets),
and unpack a few bytes into any amount (filters, data sets of which nothing is stored). A shard that ``io.shard_writer``
writes has none of that, so all of it is refused; then index and columns are compared with each other.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup
from cryoiso.io.contained_path import contained_path

HDF5_ERRORS = (
    OSError, KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, OverflowError, MemoryError,
)  # fmt: skip
"""What h5py raises at damaged files."""
AGAIN = "Run ingest again."
STORAGE = ("float16", "float32")
LARGEST_BOX_PX = 32768
LONGEST_NAME_BYTES = 4096
"""PATH_MAX."""
WHOLE = ("uid", "optics", "index", "half", "stack")
"""Columns of whole numbers."""
HALVES = (-1, 0, 1, 2)
"""-1: the source has no half-sets; 0: not known of this particle."""


def check_index(index: dict[str, Any], folder: Path, path: Path) -> None:
    """Makes sure that index.json has everything that is used of it, in a form that can be used.

    Args:
        index: the decoded file. folder: of the shards. path: of the index, for messages.

    Raises:
        InputError: names the key, what it should be and what it is.
    """

    def need(key: str, what: str, good: bool) -> None:
        if not good:
            raise InputError(f"'{key}' is wrong or missing", file=path, expected=what,
                             found=repr(index.get(key))[:120], hint=AGAIN, code="shards-damaged")  # fmt: skip

    need("plan", "a text", isinstance(index.get("plan"), str))
    need("images", "a number of images", _is_count(index.get("images"), 1))
    need("box_px", f"a side of 2 to {LARGEST_BOX_PX} pixels", _is_count(index.get("box_px"), 2, LARGEST_BOX_PX))
    need("storage", " or ".join(STORAGE), index.get("storage") in STORAGE)
    need("groups", "a list of optics groups", isinstance(index.get("groups"), list) and bool(index["groups"]))
    for number, group in enumerate(index["groups"], start=1):
        if wrong := _wrong_in_group(group):
            raise InputError(f"optics group {number}: {wrong}", file=path, hint=AGAIN, code="shards-damaged")
    need("shards", "a list of shards", isinstance(index.get("shards"), list) and bool(index["shards"]))
    end = 0
    for number, shard in enumerate(index["shards"]):
        if not isinstance(shard, dict) or not all(_is_count(shard.get(key), 0) for key in ("start", "stop")):
            raise InputError(f"shard {number} is not described", file=path, expected="file, start and stop",
                             found=repr(shard)[:120], hint=AGAIN, code="shards-damaged")  # fmt: skip
        contained_path(folder, shard.get("file"), path)
        if shard["start"] != end or shard["stop"] <= end:
            raise InputError(f"shard {number} is not contiguous with the one before it", file=path,
                             expected=f"rows from {end}", found=f"{shard['start']} to {shard['stop']}",
                             hint=AGAIN, code="shards-damaged")  # fmt: skip
        end = shard["stop"]
    need("images", f"{end}, as the shards have", index["images"] == end)


def _is_count(value: object, least: int, most: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _wrong_in_group(group: object) -> str:
    """What is wrong with an optics group as index.json has it; empty: nothing."""
    if not isinstance(group, dict):
        return f"not an object (found {group!r:.60})"
    known = {f.name: f for f in fields(OpticsGroup)}
    if unknown := sorted(group.keys() - known.keys()):
        return f"unknown key '{unknown[0]}'; it may be of another version"
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - group.keys()):
        return f"'{missing[0]}' is missing"
    for key, value in group.items():
        default = known[key].default
        sample: Any = 0.0 if str(known[key].type) == "float" else 0 if str(known[key].type) == "int" else default
        numbers = value if isinstance(value, list) else [value]
        of_numbers = isinstance(sample, float | int | tuple) and not isinstance(sample, bool)
        if of_numbers and isinstance(value, list) != isinstance(sample, tuple):
            return f"'{key}' is wrong (found {value!r:.60})"
        if of_numbers and not all(_is_finite(number) for number in numbers):
            return f"'{key}' is no finite number (found {value!r:.60})"
    bounds = {"pixel_size_A": (0, 1e4), "voltage_kV": (0, 1e5)}
    for key, (low, high) in bounds.items():
        if not low < group[key] < high:
            return f"'{key}' is out of range (expected above {low} and below {high:g}, found {group[key]:g})"
    return ""


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def open_shard(path: Path) -> Any:
    """The file, opened for reading by h5py, without anything that leads out of it at its top.

    Raises:
        OSError: HDF5 cannot open it.
    """
    import h5py

    return h5py.File(path, "r", locking=False)


def plain_dataset(file: Any, name: str, path: Path) -> Any:
    """A data set that lies in the file itself, every byte of it, as this program writes them.

    Raises:
        InputError: it is a link, lies in another file, is made of other data sets, is packed by a filter, or is not
            stored whole.
        KeyError: it is not there.
    """
    import h5py

    link = file.get(name, getlink=True)
    if link is None:
        raise KeyError(f"no data set '{name}'")
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    problem = ""
    if dataset is None:
        problem = f"is a link ({type(link).__name__})"
    elif not isinstance(dataset, h5py.Dataset):
        problem = "is no data set"
    elif dataset.external:
        problem = "lies in another file (external storage)"
    elif dataset.is_virtual:
        problem = "is virtual: made of data sets of other files"
    elif dataset.id.get_create_plist().get_nfilters():
        problem = "is packed by a filter"
    elif dataset.dtype.hasobject or dataset.dtype.kind not in "iufS":
        problem = f"has values of another kind ({dataset.dtype})"
    elif dataset.id.get_storage_size() < dataset.size * dataset.dtype.itemsize:
        problem = (
            f"is not stored whole ({dataset.id.get_storage_size()} of {dataset.size * dataset.dtype.itemsize} bytes)"
        )
    if problem:
        raise InputError(f"the data set '{name}' {problem}", file=path, expected="a data set as ingest writes it",
                         hint=AGAIN, code="shards-damaged")  # fmt: skip
    return dataset


def check_images(file: Any, path: Path, rows: int, index: dict[str, Any]) -> None:
    """Makes sure of the form of a shard's images; the values are looked at when they are read.

    Raises:
        InputError: as ``plain_dataset``, or another shape or number format than index.json says.
        KeyError: no images.
    """
    images = plain_dataset(file, "images", path)
    box = index["box_px"]
    if images.shape != (rows, box, box) or images.dtype != np.dtype(index["storage"]):
        raise InputError(
            "the images are not as index.json says",
            file=path,
            hint=AGAIN,
            expected=f"{rows} of {box} x {box} px in {index['storage']}",
            found=f"{' x '.join(map(str, images.shape))} in {images.dtype}",
            code="shards-damaged",
        )


def read_columns(file: Any, path: Path, rows: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The columns of a shard, and ``stack``: (rows,) each.

    Raises:
        InputError: as ``plain_dataset``, or a column of another length or kind, or with a value that cannot be.
        KeyError: a column is not there.
    """
    columns = {}
    for name in (*names, "stack"):
        dataset = plain_dataset(file, name, path)
        if dataset.shape != (rows,) or dataset.dtype.kind not in ("iu" if name in WHOLE else "iuf"):
            raise InputError(f"the column '{name}' has another shape or type", file=path, expected=f"{rows} numbers",
                             found=f"{dataset.shape} of {dataset.dtype}", hint=AGAIN,
                             code="shards-damaged")  # fmt: skip
        columns[name] = dataset[()]
        if columns[name].dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(columns[name]))):
            raise InputError(f"the column '{name}' has a value that is not a number", file=path, row=int(bad[0]) + 1,
                             found=float(columns[name][bad[0]]), hint=AGAIN, code="shards-damaged")  # fmt: skip
    stacks = plain_dataset(file, "stacks", path)
    if stacks.ndim != 1 or stacks.dtype.kind != "S" or stacks.dtype.itemsize > LONGEST_NAME_BYTES:
        raise InputError("the names of the stacks have another shape or type", file=path, expected="a list of texts",
                         found=f"{stacks.shape} of {stacks.dtype}", hint=AGAIN, code="shards-damaged")  # fmt: skip
    _require_within(columns["stack"], 0, len(stacks) - 1, "stack", path)
    names_of_stacks = np.char.decode(stacks[()], "utf-8")
    columns["stack"] = np.array(names_of_stacks.tolist(), dtype=object)[columns["stack"]]
    return columns


def check_columns(columns: dict[str, np.ndarray], index: dict[str, Any], path: Path) -> None:
    """Makes sure that the columns of all shards fit each other and the optics groups.

    Args:
        columns: (n,) each, of all shards.
        path: of the index, for messages.

    Raises:
        InputError: names the first row that does not.
    """
    _require_within(columns["optics"], 0, len(index["groups"]) - 1, "optics", path)
    _require_within(columns["half"], HALVES[0], HALVES[-1], "half", path)
    if (columns["half"] < 0).any() and not (columns["half"] < 0).all():
        _require_within(columns["half"], 0, HALVES[-1], "half", path)
    _require_within(columns["index"], 0, 2**62, "index", path)
    box = index["groups"][int(columns["optics"][0])]["box_px"]  # images of other groups were brought to this one
    if box != index["box_px"]:
        raise InputError("the first particle's optics group has another box than the images", file=path, hint=AGAIN,
                         expected=index["box_px"], found=box, code="shards-damaged")  # fmt: skip
    order = np.argsort(columns["uid"], kind="stable")
    same = np.flatnonzero(columns["uid"][order][1:] == columns["uid"][order][:-1])
    if len(same):
        first, second = sorted(order[same[0] : same[0] + 2].tolist())
        raise InputError(
            f"rows {first + 1} and {second + 1} of the shards have the same uid",
            file=path,
            hint=AGAIN,
            expected="a uid of its own for every particle",
            found=int(columns["uid"][first]),
            code="shards-damaged",
        )


def _require_within(values: np.ndarray, low: int, high: int, name: str, path: Path) -> None:
    bad = np.flatnonzero((values < low) | (values > high))
    if len(bad):
        raise InputError(
            f"the column '{name}' has an impossible value",
            file=path,
            row=int(bad[0]) + 1,
            expected=f"{low} to {high}",
            found=values[bad[0]].item(),
            hint=AGAIN,
            code="shards-damaged",
        )


def first_not_finite(images: np.ndarray) -> int | None:
    """The first of (n, D, D) float images that has NaN or infinity; None if all are finite. A dot product, which is as
    fast as memory, tells nearly always."""
    flat = images.reshape(-1)
    with np.errstate(all="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return None
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2)))
    return int(bad[0]) if len(bad) else None
