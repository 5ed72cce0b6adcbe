"""From what a user passes as a directory to a canonical location and the store that serves it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from distckpt.errors import StoreUnsuitableError
from distckpt.storage.cache import CACHE_BYTES, cache_in
from distckpt.storage.cached import CachedStore
from distckpt.storage.interface import Store, SupportsSiblings
from distckpt.storage.local import LocalStore
from distckpt.storage.memory import MemoryStore
from distckpt.storage.mounts import warn_of_late_views
from distckpt.storage.paths import PathLike
from distckpt.storage.patience import PatientStore
from distckpt.storage.split import SplitStore
from distckpt.storage.spread import DIGITS, SPREAD, SpreadStore, is_spread

logger = logging.getLogger(__name__)

Opener = Callable[[str, Mapping[str, Any]], Store]

_told: set[str] = set()
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def open_store(directory: PathLike, storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store whose root is ``directory``, patient with reads; opening it touches nothing there.

    Options for all stores: ``cache_dir`` (else the environment's DISTCKPT_CACHE_DIR), a directory of this host that keeps
    what was downloaded of shards, at most ``cache_bytes`` (else DISTCKPT_CACHE_BYTES, else 64 GiB). Local directories are
    read as they are. ``data``, a path or URL, is where shards are if not in the directory, and ``data_options`` are for
    the store there. ``{spread}`` in that URL has each shard below one of sixteen prefixes, a hex digit in its place.

    Options for local paths: ``direct_io`` (bool), whether large files go around the page cache; by default those for
    which memory has no room. A URL that has no store of its own is fsspec's, which gets the options as they are; whether
    that is safe is for the probe to say. StoreUnsuitableError names a scheme that nothing serves, ValueError an option
    that is not known.
    """
    options = dict(storage_options or {})
    is_asked_for = bool(options.get("cache_dir"))
    cache = _cache_of(options)
    location = canonical(directory)
    if is_spread(location):
        raise ValueError(
            f"{location}: only shards can be spread, in a place of their own: data='s3://bucket/{SPREAD}/run'"
        )
    if is_asked_for and "://" not in f"{location} {options.get('data')}" and location not in _told:
        _told.add(location)
        logger.warning("%s is a local directory: it is read as it is, without the cache", location)
    data, data_options = options.pop("data", None), options.pop("data_options", None)
    if not data:
        if data_options:
            raise ValueError("data_options are for the store that data names, and there is none")
        return _behind(cache, _opened(location, options))
    place = canonical(data)
    if place == location:
        raise ValueError(f"data is another place for shards than the directory, not {location!r} too")
    return SplitStore(
        _behind(cache, _opened(location, options)), _behind(cache, _opened_place(place, data_options or {}))
    )


def with_patience(directory: PathLike, storage_options: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    """``storage_options``, and ``patience`` of so many seconds for each store that knows such an option and has none given."""
    location, options = canonical(directory), dict(storage_options or {})
    if options.get("data"):
        options["data_options"] = with_patience(options["data"], options.get("data_options"), seconds)
    scheme = _scheme(location)
    is_patient = scheme in _PATIENT or scheme not in _OPENERS  # fsspec's are
    return {**({"patience": seconds} if is_patient else {}), **options}


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
    found = above(location)
    if found is None:
        raise ValueError(f"{location!r} has no directory above it")
    return found


def above(location: str) -> tuple[str, str] | None:
    """As ``split_path``, of what is canonical; None if nothing is above it, as above a bucket, whatever that is called."""
    directory, _, folder = location.rpartition("/")
    return (directory or "/", folder) if folder and not directory.endswith(":/") else None


def placed(
    storage_options: Mapping[str, Any] | None,
    *,
    cache_dir: PathLike | None = None,
    data: PathLike | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """``storage_options`` with those of what else was given; None if nothing was. Paths mean the same in any process."""
    given = {"cache_dir": cache_dir, "data": data, "data_options": data_options}
    options = {**(storage_options or {}), **{name: value for name, value in given.items() if value is not None}}
    if options.get("cache_dir"):
        options["cache_dir"] = _absolute(options["cache_dir"])
    if options.get("data"):
        options["data"] = canonical(options["data"])
    return options or None


def placed_among(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same of a manager's keyword arguments."""
    named = {name: arguments.get(name) for name in ("cache_dir", "data", "data_options")}
    return placed(arguments.get("storage_options"), **named)


def _opened(location: str, options: Mapping[str, Any]) -> Store:
    return _OPENERS.get(_scheme(location), _open_fsspec)(location, options)


def _opened_place(place: str, options: Mapping[str, Any]) -> Store:
    if SPREAD not in place:
        return _opened(place, options)
    if not is_spread(place):
        raise ValueError(f"{place}: {SPREAD} is for buckets, and this is a local directory")
    bucket, _, folder = place.partition("://")[2].partition("/")
    if SPREAD in bucket or folder.count(SPREAD) != 1:
        raise ValueError(f"{place}: {SPREAD} stands once below the bucket, as in 's3://bucket/{SPREAD}/run'")
    first = _opened(place.replace(SPREAD, DIGITS[0]), options)

    def store_of(url: str) -> Store:
        if isinstance(first, SupportsSiblings):
            return first.sibling(url.partition("://")[2].partition("/")[2])
        return _opened(url, options)

    return SpreadStore(place, store_of)


def _scheme(location: str) -> str:
    return location.partition("://")[0] if "://" in location else "file"


def _behind(cache: tuple[str, int] | None, store: Store) -> Store:
    if cache is not None and "://" in store.url:
        store = CachedStore(store, cache_in(*cache))
    return PatientStore(store)


def _cache_of(options: dict[str, Any]) -> tuple[str, int] | None:
    """Directory and limit, as ``options``, from which they are taken, and the environment say. None for no cache."""
    directory = options.pop("cache_dir", os.environ.get("DISTCKPT_CACHE_DIR"))
    limit = options.pop("cache_bytes", None) or os.environ.get("DISTCKPT_CACHE_BYTES") or CACHE_BYTES
    if isinstance(limit, bool) or not str(limit).isdecimal() or not int(limit):
        raise ValueError(f"cache_bytes is a number of bytes above 0, not {limit!r}")
    return (_absolute(directory), int(limit)) if directory else None


def _absolute(directory: PathLike) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(directory)))


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
    if direct_io is not None and not isinstance(direct_io, bool):
        raise ValueError(f"storage_options: direct_io is True, False or None, not {direct_io!r}")
    return LocalStore(location, direct_io=direct_io)


def _open_memory(location: str, options: Mapping[str, Any]) -> Store:
    if options:
        raise ValueError(f"memory:// has no storage options, but was given {', '.join(sorted(options))}")
    return MemoryStore.named(location.partition("://")[2])


def _open_gcs(location: str, options: Mapping[str, Any]) -> Store:
    from distckpt.storage.remote.gcs_options import open_gcs

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
