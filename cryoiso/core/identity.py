"""What an unfinished computation was begun with, so that it is resumed with nothing else.

An identity is a dict of plain values by name; arrays enter it as digests. It goes into every checkpoint. What a
resumption brings is compared with it key by key, and whatever differs is named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import DensityMap, Particles

Identity = dict[str, Any]
MARK = "blake2b:"
SAMPLE_IMAGES = 16
"""Images whose pixels are compared; those of the lowest uids."""
ORDER = "row order"
_NOT_CTF = ("uid", "optics", "stack", "index", "rotation", "shift_A", "half")
_SETS = ("number", "uids")
"""Where these differ, all the rest of a particle set differs as well."""
HINT = "Give what it was begun with, or begin anew: without --resume, or in another folder."


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
    """Identity of a particle set: uids, half-sets, optics and CTF by uid, whatever the order of the rows.

    Args:
        poses: also the poses, where a computation starts from them.
        ordered: also the order, where the result depends on it.
    """
    order = np.argsort(particles.uid, kind="stable")
    ctf = [f.name for f in fields(Particles) if f.name not in _NOT_CTF]
    columns = [getattr(particles, name) for name in ctf]
    optics = [{k: v for k, v in asdict(group).items() if k not in ("number", "name")} for group in particles.groups]
    found: Identity = {
        "number": len(particles),
        "uids": _by_uid(particles.uid, order),
        "half-sets": _by_uid(particles.half, order),
        "optics groups": MARK + digest_of(particles.optics[order].astype(np.int64), *optics),
        "CTF": MARK + digest_of(*(column[order] for column in columns if isinstance(column, np.ndarray))),
    }
    if poses:
        found["poses"] = MARK + digest_of(*(pose[order] for pose in particles.require_poses()))
    if ordered:
        found[ORDER] = MARK + digest_of(particles.uid)
    return found


def _by_uid(column: np.ndarray | None, order: np.ndarray) -> str:
    return "none" if column is None else MARK + digest_of(column[order].astype(np.int64))


def of_images(source: ImageSource) -> str:
    """Digest of the pixels of a few images, the same whatever the order of the rows."""
    rows = np.argsort(source.particles.uid, kind="stable")[:SAMPLE_IMAGES]
    return MARK + digest_of(np.stack([source.read(np.array([row]))[0] for row in rows]))


def of_map(density: DensityMap | None) -> Any:
    """Grid and digest of a map; "none" where there is none."""
    if density is None:
        return "none"
    return {"pixel_size_A": density.pixel_size_A, "density": MARK + digest_of(density.data.astype(np.float32))}


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
            "the checkpoint does not say which particles, reference and settings it was made from", file=file,
            hint="An earlier version wrote it. Begin anew: without --resume, or in another folder.",
        )  # fmt: skip
    found = list(differences(was, plain(now)))
    if found:
        raise InputError(
            f"the checkpoint is of another {what}: {'; '.join(found)}", file=file, hint=HINT
        )  # fmt: skip


def differences(was: Identity, now: Identity, above: str = "") -> Iterator[str]:
    """In words, every key whose values differ."""
    keys = list(dict.fromkeys((*was, *now)))
    if any(was.get(key) != now.get(key) for key in _SETS if key in keys):
        keys = [next(key for key in _SETS if was.get(key) != now.get(key))]
    for key in keys:
        one, two = was.get(key, "not noted"), now.get(key, "not noted")
        name = f"{above}{key}"
        if isinstance(one, dict) and isinstance(two, dict):
            yield from differences(one, two, f"{name}: ")
        elif json.dumps(one) != json.dumps(two):
            if all(isinstance(value, str) and value.startswith(MARK) for value in (one, two)):
                yield f"{name} differ" if key.endswith("s") else f"{name} differs"
            else:
                yield f"{name} was {_shown(one)}, is {_shown(two)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "another one"
    return "given" if isinstance(value, str) and value.startswith(MARK) else f"{value}"


def rows_by_uid(was: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(n,) row of every present particle among those of a checkpoint; both have the same uids, each once."""
    place = np.argsort(was, kind="stable")
    return place[np.searchsorted(was[place], now)]
