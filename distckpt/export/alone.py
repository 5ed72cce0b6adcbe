"""The weights of one checkpoint as safetensors in a folder of this host, for whoever wants just that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from distckpt.export.contents import contents
from distckpt.export.recipes import Export, Recipe
from distckpt.reader import CheckpointReader
from distckpt.storage import scratch_folder


@contextlib.contextmanager
def weights_of(reader: CheckpointReader, key: str) -> Iterator[str]:
    """A folder that has what is below ``key`` as ``model.safetensors``, or as several files and their index; gone on exit.

    ValueError if the checkpoint holds nothing there, DamagedError if it is not what was written, ImportError without
    safetensors.
    """
    with scratch_folder() as folder:
        for name, write in contents(reader, Recipe(key, Export(key=key))):
            write(os.path.join(folder, name))
        yield folder
