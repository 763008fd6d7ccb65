"""A file for HDF5 to write into whose errors do not reach HDF5."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Sink(io.RawIOBase):
    """A file for HDF5 to write into that never fails under it: the first error is kept for the caller to raise.

    HDF5 cannot close a file after a failed write (it leaks it and may crash at exit); so it is told that all is well.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += self._file.write(view[done:]) or 0
            except OSError as error:
                self.error = error
        if self.error is not None:
            self._file.seek(len(view) - done, os.SEEK_CUR)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def check(self) -> None:
        if self.error is not None:
            raise self.error
