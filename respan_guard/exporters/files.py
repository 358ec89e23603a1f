"""A file that records are appended to, and put aside when it is large."""

from __future__ import annotations

import os
import re
from pathlib import Path

from respan_guard.errors import ConfigurationError
from respan_guard.exporters.base import ExportFailed

__all__ = ["GrowingFile"]

_TAIL = 1 << 16


class GrowingFile:
    """Whole lines only: what a crash or a full disk cut off is taken away before the next line is written.

    Args:
        path: The file; its directory has to be there.
        max_bytes: From which size on it is put aside as NAME.1.SUFFIX, NAME.2.SUFFIX, ... and a new one begun.
        header: What each file begins with.

    Raises:
        ConfigurationError: There is no such directory, or the size can't work.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int, header: str = "") -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        self._header = header.encode()
        if max_bytes < 1:
            raise ConfigurationError(f"max_bytes must be a number of bytes from 1, got {max_bytes}")
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"there is no directory {self.path.parent} for {self.path.name}")

    def append(self, text: str) -> None:
        """Append lines, in one write, and return once they are on the disk. Blocks.

        Raises:
            ExportFailed: The disk did not take them; the file is as it was.
        """
        try:
            self._rotate()
            self._write(text.encode())
        except OSError as error:
            raise ExportFailed(f"{self.path.name} can't be written: {error.strerror or error}") from error

    def _write(self, data: bytes) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        try:
            size = _whole_lines(file)
            if size == 0:
                data = self._header + data
            try:
                written = os.write(file, data)
                while written < len(data):  # a signal, or a disk that just got full: then this raises
                    written += os.write(file, data[written:])
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def _rotate(self) -> None:
        try:
            if self.path.stat().st_size < self._max_bytes:
                return
        except FileNotFoundError:
            return
        stem, suffix = self.path.stem, self.path.suffix
        aside = re.compile(rf"{re.escape(stem)}\.([0-9]+){re.escape(suffix)}")
        names = [aside.fullmatch(path.name) for path in self.path.parent.iterdir()]
        number = max((int(found[1]) for found in names if found is not None), default=0) + 1
        while os.path.lexists(target := self.path.with_name(f"{stem}.{number}{suffix}")):
            number += 1  # a file system whose names have no case: one that is there is never written over
        self.path.rename(target)


def _whole_lines(file: int) -> int:
    """The size of the file once a line that was not finished is gone."""
    size = os.lseek(file, 0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - _TAIL)
        os.lseek(file, start, os.SEEK_SET)
        place = os.read(file, end - start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end
