"""Writing of shards; ``io.shards`` reads them and says what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.errors import CryoisoError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.atomic import atomic_path, is_full, write_text
from cryoiso.io.hdf5_file import Sink
from cryoiso.io.imagenames import distinct
from cryoiso.io.shards import COLUMNS, FORMAT, VERSION, groups_to_json, read_attributes, shard_name

HDF5_CHUNK_BYTES = 2**20
LIBVER = ("v110", "v110")


def hdf5_chunk(box_px: int, storage: str) -> int:
    """Whole images in an HDF5 chunk of about 1 MiB."""
    return max(1, HDF5_CHUNK_BYTES // (box_px * box_px * np.dtype(storage).itemsize))


def write_shard_file(
    path: Path,
    blocks: Any,
    n: int,
    box_px: int,
    storage: str,
    columns: dict[str, np.ndarray],
    attributes: dict[str, Any],
) -> None:
    """Writes one shard atomically; the same input gives the same bytes.

    Args:
        path: final name.
        blocks: iterator of (m, D, D) float arrays, n images in all.
        columns: arrays of length n (and ``stacks``, the list of stack names).
        attributes: scalars, texts and arrays of the root group.

    Raises:
        DiskFullError: nothing is left behind.
    """
    import h5py

    need = n * box_px * box_px * np.dtype(storage).itemsize + n * 128 + 2**16
    with atomic_path(path, need) as part:
        sink = Sink(part)
        try:
            with h5py.File(sink, "w", libver=LIBVER) as file:
                for name, value in attributes.items():
                    file.attrs[name] = value
                for name, values in columns.items():
                    file.create_dataset(name, data=values, track_times=False)
                chunk = (min(hdf5_chunk(box_px, storage), n), box_px, box_px)
                images = file.create_dataset("images", (n, box_px, box_px), storage, chunks=chunk, track_times=False)
                done = 0
                for block in blocks:
                    images[done : done + len(block)] = block
                    done += len(block)
                    sink.check()
            sink.check()
        except Exception as error:
            if sink.error is not None and not is_full(sink.error):
                raise CryoisoError(f"{path}: cannot be written: {sink.error.strerror}", code="write-failed") from error
            raise (sink.error or error) from None
        finally:
            with suppress(OSError):
                sink.close()


def row_columns(particles: Particles, start: int, stop: int) -> dict[str, np.ndarray]:
    """The metadata of rows start..stop as a shard keeps it; -1 where the source says nothing."""
    columns: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        values = getattr(particles, name)
        columns[name] = np.full(stop - start, -1, np.int8) if values is None else np.asarray(values)[start:stop]
    stacks, inverse = distinct(particles.stack[start:stop])
    columns["stacks"] = np.char.encode(stacks.astype(str), "utf-8")
    columns["stack"] = inverse.astype(np.int32)
    return columns


def shard_attributes(
    digest: str, bounds: tuple[int, int], box_px: int, groups: tuple[OpticsGroup, ...], **origin: Any
) -> dict[str, Any]:
    """Root attributes of a shard of rows ``bounds`` of the set that ``digest`` names.

    Args:
        origin: normalisation, inverted, source, source_sha256.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan": digest,
        "start": bounds[0],
        "stop": bounds[1],
        "box_px": box_px,
        "pixel_size_A": np.array([g.pixel_size_A for g in groups]),
        "groups": json.dumps(groups_to_json(groups)),
        **origin,
    }


def shard_matches(folder: Path, number: int, digest: str, bounds: tuple[int, int]) -> bool:
    """Whether this shard is there and of this set (a shard under its final name is always complete)."""
    attributes = read_attributes(folder / shard_name(number))
    return (attributes.get("plan"), attributes.get("start"), attributes.get("stop")) == (digest, *bounds)


def write_index(
    folder: Path, digest: str, particles: Particles, box_px: int, storage: str, shards: Any,
    hashes: Mapping[str, str] | None = None, **origin: Any,
) -> Path:  # fmt: skip
    """Writes index.json when all shards are there; removes what an earlier set left behind.

    Args:
        shards: (start, stop) of each.
        hashes: SHA-256 of each by name, where they are known.
        origin: normalisation, inverted, sign, contrast_standard_errors, source, source_sha256.

    Raises:
        CryoisoError: a shard is missing.
    """
    names = [shard_name(k) for k in range(len(shards))]
    missing = [name for k, name in enumerate(names) if not shard_matches(folder, k, digest, shards[k])]
    if missing:
        raise CryoisoError(
            f"{folder}: {len(missing)} shards are missing, first {missing[0]}; run the same command again",
            code="shards-missing",
        )
    for stale in folder.glob("shard-*.h5*"):
        if stale.name not in names:
            stale.unlink()
    index = {
        "format": FORMAT,
        "version": VERSION,
        "writer": f"cryoiso {__version__}",
        "plan": digest,
        "images": len(particles),
        "box_px": box_px,
        "storage": storage,
        **origin,
        "groups": groups_to_json(particles.groups),
        "shards": [
            {"file": name, "start": a, "stop": b, "bytes": (folder / name).stat().st_size}
            | ({"sha256": hashes[name]} if hashes else {})
            for name, (a, b) in zip(names, shards, strict=True)
        ],
    }
    path = folder / products.INDEX
    write_text(path, json.dumps(index, indent=1) + "\n")
    return path
