"""Files that are complete or as they were before: cores and saved domains.

What is written stands beside the file until it is complete and on the disk, and then takes its place; a crash leaves
the old one or the new. A symbolic link stays one, and what it leads to is written. A device is written to as it is.
Anything else that is there already was not made for this and is refused.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, cast

BUFFER: Final = 1 << 20


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """What is written in the block is at `path` after it; an exception leaves what was there. Raises OSError."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        with open(path, "wb", opener=lambda name, flags: os.open(name, os.O_WRONLY | os.O_NOCTTY)) as device:
            yield device
        return
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is neither a file nor a device")
    target = path.resolve()
    # Its name may be as long as names may be.
    prefix = f".{target.name[:100]}."
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=prefix, delete=False, buffering=BUFFER) as file:
        aside = Path(file.name)
        try:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
            aside.replace(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems have nothing to do for a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
