"""From what a user passes as a directory to a canonical location and the store that serves it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from distckpt.errors import StoreUnsuitableError
from distckpt.storage.interface import Store
from distckpt.storage.local import LocalStore
from distckpt.storage.memory import MemoryStore
from distckpt.storage.mounts import warn_of_late_views
from distckpt.storage.paths import PathLike
from distckpt.storage.patience import PatientStore

Opener = Callable[[str, Mapping[str, Any]], Store]

_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def open_store(directory: PathLike, storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store whose root is ``directory``, patient with reads; opening it touches nothing there.

    Options for local paths: ``direct_io`` (bool), whether large files go around the page cache; by default those for
    which memory has no room. A URL that has no store of its own is fsspec's, which gets the options as they are; whether
    that is safe is for the probe to say. StoreUnsuitableError names a scheme that nothing serves, ValueError an option
    that is not known.
    """
    location = canonical(directory)
    scheme = location.partition("://")[0] if "://" in location else "file"
    opener = _OPENERS.get(scheme, _open_fsspec)
    return PatientStore(opener(location, storage_options or {}))


def with_patience(directory: PathLike, storage_options: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """``storage_options``, and ``patience`` of so many seconds for a store that knows such an option and has none given."""
    location = canonical(directory)
    scheme = location.partition("://")[0] if "://" in location else "file"
    is_patient = scheme in _PATIENT or scheme not in _OPENERS  # fsspec's are
    return {**({"patience": seconds} if is_patient else {}), **(storage_options or {})}


def canonical(directory: PathLike) -> str:
    """One spelling for one directory: an absolute local path, or a URL with no slash at its end.

    ``~`` is expanded, ``file://`` taken off, and symbolic links are followed as far as the path exists, so that two
    ways to a directory are one directory. What is returned means the same after ``os.chdir``, and after a link was
    pointed elsewhere. ValueError for what is neither a path nor a URL.
    """
    text = os.fspath(directory)
    if not isinstance(text, str):
        raise TypeError(f"a directory is a str or a path of str, not {type(text).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"not a directory: {text!r}")
    if text.lower().startswith("file:/"):
        return os.path.realpath(_file_url_path(text))
    if "://" in text:
        return _canonical_url(text)
    if _ONE_SLASH.match(text):
        raise ValueError(f"{text!r} looks like a URL that lost a slash, as in pathlib.Path: pass the URL as a str")
    return os.path.realpath(os.path.expanduser(text))


def join(location: str, *parts: str) -> str:
    """``location`` with ``parts`` below it; both paths and URLs take a slash."""
    return "/".join((location.rstrip("/") if location != "/" else "", *parts)) if parts else location


def split_path(path: PathLike) -> tuple[str, str]:
    """The directory and the last part of a checkpoint's path, ``("/data/run-7", "ckpt-42")``.

    The directory is canonical. ValueError if nothing is above the last part.
    """
    location = canonical(path)
    directory, _, folder = location.rpartition("/")
    if not folder or directory.endswith(":/"):
        raise ValueError(f"{location!r} has no directory above it")
    return directory or "/", folder


def _file_url_path(url: str) -> str:
    path = unquote(url[len("file:") :])
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(f"{url!r} names a host; write file:///absolute/path")
        path = slash + path
    return path


def _canonical_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise ValueError(f"not a directory: {url!r}")
    return f"{scheme.lower()}://{'/'.join(parts)}"


def _open_local(location: str, options: Mapping[str, Any]) -> Store:
    unknown = sorted(options.keys() - {"direct_io"})
    if unknown:
        raise ValueError(f"local directories have no storage option {', '.join(unknown)}; they have direct_io")
    warn_of_late_views(location)
    direct_io = options.get("direct_io")
    return LocalStore(location, direct_io=None if direct_io is None else bool(direct_io))


def _open_memory(location: str, options: Mapping[str, Any]) -> Store:
    if options:
        raise ValueError(f"memory:// has no storage options, but was given {', '.join(sorted(options))}")
    return MemoryStore.named(location.partition("://")[2])


def _open_gcs(location: str, options: Mapping[str, Any]) -> Store:
    from distckpt.storage.remote.gcs import open_gcs

    return open_gcs(location, options)


def _open_s3(location: str, options: Mapping[str, Any]) -> Store:
    try:
        from distckpt.storage.remote.s3 import open_s3
    except ModuleNotFoundError as error:
        if error.name != "botocore":
            raise
        raise StoreUnsuitableError(
            location, "botocore is not installed, which finds credentials and endpoints: pip install 'distckpt[s3]'"
        ) from error
    return open_s3(location, options)


def _open_fsspec(location: str, options: Mapping[str, Any]) -> Store:
    from distckpt.storage.remote.generic import open_fsspec

    return open_fsspec(location, options)


_PATIENT = {"gs", "s3"}

_OPENERS: dict[str, Opener] = {
    "file": _open_local,
    "gs": _open_gcs,
    "memory": _open_memory,
    "s3": _open_s3,
}
