"""Shards that lie in another store than log and manifest: whoever reads them has been told which."""

from __future__ import annotations

from distckpt.directory.locate import Located, located
from distckpt.errors import DamagedError, DataElsewhereError, StorageError
from distckpt.format.json.log import State
from distckpt.storage import Store, mark_of, parts_of


def require_shards(where: Located) -> None:
    """DataElsewhereError if the checkpoint's shards were put where ``where.store`` does not look for them.

    They may have been moved: then they are looked for.
    """
    manifest = where.manifest
    if manifest.data in ("", mark_of(where.store)) or not manifest.shards:
        return
    first = manifest.shards[0]
    if where.store.stat(where.shard_path(first.rank, first.shard)) is None:
        _, *data = parts_of(where.store)
        found = f"not in {data[0].url}" if data else "in another place than the directory"
        raise DataElsewhereError(
            f"{where.path}: its shards are {found}. Give data=... (for the command line --data), the path or URL that the "
            "manager which saved it was given, or to which they were moved"
        )


def require_shards_of_newest(store: Store, state: State) -> None:
    """As ``require_shards``, of the newest checkpoint, if its manifest can be read. For who goes on with a run."""
    newest = state.newest()
    if newest is None:
        return
    try:
        where = located(store, newest)
    except (DamagedError, StorageError):
        return
    require_shards(where)
