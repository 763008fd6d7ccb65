"""What is sent to cryoSPARC, so that it can be sent again.

cryosparc-tools (5.0.3) repeats a request whose connection broke, but reads what it sends from a generator, which is
exhausted by then: the second attempt sends nothing, and a file of no bytes counts as uploaded. Here every attempt reads
from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 8 << 20


class Chunks:
    """The bytes of a file, from the beginning each time they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


def file_to_send(path: Path) -> Any:
    """A file as ``cryosparc.stream.Stream``."""
    from cryosparc.stream import Stream

    class RepeatableFile(Stream):  # type: ignore[misc]
        def stream(self) -> Any:
            return Chunks(path)

        def save(self, file: Any) -> None:
            with open(file, "wb") as target:
                target.writelines(Chunks(path))

    return RepeatableFile(iterator=iter(()))


def table_to_send(table: Any) -> Any:
    """A table as ``cryosparc.dataset.Dataset``.

    Args:
        table: the same; a copy is made.
    """
    from cryosparc.dataset import Dataset

    class RepeatableTable(Dataset):  # type: ignore[misc]
        def stream(self, compression: Any = None) -> Any:
            return list(super().stream(compression))

    return RepeatableTable(table)
