"""Where the demo's checkpoints go: a folder, or a bucket of a server that is started for the demo on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STORES = ("local", "gs", "s3")
BUCKET = "demo"


@contextmanager
def served(store: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The directory to save to, and what a process must have in its environment to find the server of it.

    Whoever has a real bucket has its credentials there instead, and no other line of the program changes.
    """
    if store == "local":
        yield str(folder), {}
        return
    from tests.support import servers  # those that the tests use

    with servers.fake_gcs() if store == "gs" else servers.moto() as server:
        server.make_bucket(BUCKET)
        yield f"{store}://{BUCKET}/checkpoints", _environment(store, server.url)


def _environment(store: str, url: str) -> dict[str, str]:
    if store == "gs":
        return {"STORAGE_EMULATOR_HOST": url}
    keys = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}
    return {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **keys}
