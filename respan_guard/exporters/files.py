"""A file that records are appended to, and put aside when it is large."""

from __future__ import annotations

import os
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
        taken = [path.suffixes[-2:-1] for path in self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")]
        numbers = [int(part[0][1:]) for part in taken if part and part[0][1:].isdecimal()]
        self.path.rename(self.path.with_name(f"{self.path.stem}.{max(numbers, default=0) + 1}{self.path.suffix}"))


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
