"""What an unfinished computation was begun with, so that it is resumed with nothing else.

An identity is a dict of plain values by name. It goes into every checkpoint. What a resumption brings is compared with
it key by key, and whatever differs is named. What comes from files as it is enters as a digest; what was computed, and
may have other last bits on another processor, as a sketch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import DensityMap, Particles

Identity = dict[str, Any]
MARK = "blake2b:"
SKETCH = "sketch"
PIECES = 16
"""Parts of an array in its sketch."""
SKETCH_TOLERANCE = 1e-3
"""About the relative change of an array that a sketch does not notice; rounding makes 1e-6."""
NUMBER_TOLERANCE = 1e-6
SAMPLE_IMAGES = 16
"""Images whose pixels are compared; those of the lowest uids."""
ORDER = "row order"
_NOT_CTF = (
    "uid", "optics", "stack", "index", "rotation", "shift_A", "half", "micrograph", "signal_scale", "noise_level",
)  # fmt: skip
_SETS = ("number", "uids")
"""Where these differ, all the rest of a particle set differs as well."""
HINT = "Give the same inputs and settings, or start again without --resume or in another folder."


def digest_of(*parts: object) -> str:
    """Digest of arrays (by type, shape and bytes) and other values (by their text)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        array = part if isinstance(part, np.ndarray) else None
        digest.update((repr(part) if array is None else f"{array.dtype}{array.shape}").encode() + b"\0")
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def of_particles(particles: Particles, *, poses: bool = False, ordered: bool = False) -> Identity:
    """Identity of a particle set: uids, half-sets, optics, CTF and offsets by uid, whatever the order of the rows.

    Args:
        poses: also the views, where a computation starts from them.
        ordered: also the order, where the result depends on it.
    """
    order = np.argsort(particles.uid, kind="stable")
    ctf = [f.name for f in fields(Particles) if f.name not in _NOT_CTF]
    columns = [getattr(particles, name) for name in ctf]
    optics = [{k: v for k, v in asdict(group).items() if k not in ("number", "name")} for group in particles.groups]
    identity: Identity = {
        "number": len(particles),
        "uids": _by_uid(particles.uid, order),
        "half-sets": _by_uid(particles.half, order),
        "optics groups": MARK + digest_of(particles.optics[order].astype(np.int64), *optics),
        "CTF": MARK + digest_of(*(column[order] for column in columns if isinstance(column, np.ndarray))),
    }
    shifts = particles.shift_A  # every search begins at the offsets; none is the same as zero
    has_shifts = shifts is not None and bool(np.any(shifts))
    identity["offsets"] = (
        MARK + digest_of(np.round(shifts[order], 3) + 0.0) if has_shifts and shifts is not None else "none"
    )
    if poses:
        identity["poses"] = MARK + digest_of(np.round(particles.require_poses()[0][order], 4) + 0.0)
    if ordered:
        identity[ORDER] = MARK + digest_of(particles.uid)
    return identity


def particle_identity(particles: Particles) -> str:
    """Hash of which particles a file holds and of their half-sets, whatever its format, columns and order of rows.

    A half-set number that all particles share is none, as in a .cs file.
    """
    order = np.argsort(particles.uid, kind="stable")
    half = np.zeros(len(order), np.int64) if particles.half is None else particles.half.astype(np.int64)
    if len(np.unique(half)) == 1:
        half = np.zeros(len(order), np.int64)
    return digest_of(particles.uid[order].astype(np.uint64), half[order])


def _by_uid(column: np.ndarray | None, order: np.ndarray) -> str:
    return "none" if column is None else MARK + digest_of(column[order].astype(np.int64))


def sketch_of(array: np.ndarray) -> Identity:
    """A few numbers that tell arrays apart, and are the same for one whose last bits differ.

    The array in 16 pieces, each summed with signs that look random, over what white noise of the array's power would
    give: a change by a share e of the array's root mean square moves the numbers by about e. First the logarithm of
    that root mean square.
    """
    flat = np.asarray(array).reshape(-1)
    rms = float(np.sqrt(np.mean(np.square(flat, dtype=np.float64)))) if flat.size else 0.0
    numbers = [float(np.log(rms)) if rms > 0 else 0.0]
    edges = np.linspace(0, flat.size, PIECES + 1).astype(np.int64)
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        index = np.arange(start, stop, dtype=np.uint64)
        signs = 1.0 - 2.0 * ((index * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) & np.uint64(1)).astype(np.float64)
        scale = rms * np.sqrt(max(stop - start, 1))
        numbers.append(float(np.dot(signs, flat[start:stop].astype(np.float64)) / scale) if scale > 0 else 0.0)
    return {SKETCH: [round(number, 6) for number in numbers]}


def of_images(source: ImageSource) -> Identity:
    """Sketch of the pixels of a few images, the same whatever the order of the rows."""
    rows = np.argsort(source.particles.uid, kind="stable")[:SAMPLE_IMAGES]
    return sketch_of(np.stack([source.read(np.array([row]))[0] for row in rows]))


def of_map(density: DensityMap | None) -> Any:
    """Grid and sketch of a map; "none" where there is none."""
    if density is None:
        return "none"
    return {"pixel_size_A": density.pixel_size_A, "box_px": density.box_px, "density": sketch_of(density.data)}


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def require_same(was: Any, now: Identity, file: object, what: str = "refinement") -> None:
    """Stops where an unfinished computation was begun with something else.

    Args:
        was: the identity that lies in ``file``; None where the file has none.
        what: the kind of computation, for the message.

    Raises:
        InputError: names every key that differs, with both values.
    """
    if not isinstance(was, dict):
        raise InputError(
            "the checkpoint does not record its particles, reference and settings", file=file,
            hint="Written by an earlier version. Start again without --resume, or in another folder.",
            code="checkpoint-not-continuable",
        )  # fmt: skip
    changes = list(differences(was, plain(now)))
    if changes:
        raise InputError(
            f"the checkpoint is of another {what}: {'; '.join(changes)}", file=file, hint=HINT,
            code="checkpoint-of-another-run",
        )  # fmt: skip


def differences(was: Identity, now: Identity, above: str = "") -> Iterator[str]:
    """In words, every key whose values differ."""
    keys = list(dict.fromkeys((*was, *now)))
    if any(was.get(key) != now.get(key) for key in _SETS if key in keys):
        keys = [next(key for key in _SETS if was.get(key) != now.get(key))]
    for key in keys:
        before, after = was.get(key, "not noted"), now.get(key, "not noted")
        name = f"{above}{key}"
        if isinstance(before, dict) and isinstance(after, dict) and SKETCH not in {*before, *after}:
            yield from differences(before, after, f"{name}: ")
        elif not _same(before, after):
            if all(_is_digest(value) for value in (before, after)):
                yield f"{name} differ" if key.endswith("s") else f"{name} differs"
            else:
                yield f"{name} was {_shown(before)}, is {_shown(after)}"


def _same(first: Any, two: Any) -> bool:
    if isinstance(first, dict) and isinstance(two, dict):
        before, after = (np.asarray(value.get(SKETCH, []), np.float64) for value in (first, two))
        return before.shape == after.shape and bool(np.allclose(before, after, rtol=0, atol=SKETCH_TOLERANCE))
    if isinstance(first, list) and isinstance(two, list):
        return len(first) == len(two) and all(map(_same, first, two))
    if isinstance(first, float) and isinstance(two, float):
        return math.isclose(first, two, rel_tol=NUMBER_TOLERANCE)
    return json.dumps(first) == json.dumps(two)


def _is_digest(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.startswith(MARK))


def _shown(value: Any) -> str:
    return "given" if _is_digest(value) else f"{value}"


def rows_by_uid(was: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(n,) row of every present particle among those of a checkpoint; both have the same uids, each once."""
    place = np.argsort(was, kind="stable")
    return place[np.searchsorted(was[place], now)]
