"""Files of other programs that no store of ours would name."""

from __future__ import annotations

import os
import stat

from distckpt.errors import DamagedError
from distckpt.storage.oserrors import reading


def read_hidden(folder: str, name: str, most: int) -> bytes | None:
    """The file of a local folder whose ``name`` begins with a dot; None if there is no file of that name.

    DamagedError for one of more than ``most`` bytes; StorageError if it cannot be read.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    with reading(path), open(path, "rb") as content:
        size = os.fstat(content.fileno()).st_size
        if size > most or not stat.S_ISREG(os.fstat(content.fileno()).st_mode):
            raise DamagedError(path, f"{size} bytes, where {most} are the most")
        return content.read(most)
