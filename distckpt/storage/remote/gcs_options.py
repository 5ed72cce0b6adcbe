"""What users say of a bucket of Google Cloud Storage, as those of gcsfs know it, and the store that comes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distckpt.storage.remote.budget import CONNECTIONS, budget_of
from distckpt.storage.remote.gcs import PART_BYTES, GcsStore
from distckpt.storage.remote.gcs_credentials import authority
from distckpt.storage.remote.http import PATIENCE, TIMEOUT, Endpoint
from distckpt.storage.remote.options import positive, whole

OPTIONS = {
    *("project", "access", "token", "endpoint_url", "requester_pays", "requests_timeout"),
    *("timeout", "patience", "connections", "bandwidth", "part_size", "verify"),
}
_ACCESS = ("full_control", "read_write", "read_only")


def open_gcs(location: str, options: Mapping[str, Any]) -> GcsStore:
    """The store of ``gs://bucket/folder``. Options are those of gcsfs for credentials, endpoint and who pays; and

    ``timeout`` (seconds for one try), ``patience`` (seconds until a write is given up), ``connections`` and ``bandwidth``
    (of a node; the latter in bytes a second, each way), ``part_size`` (bytes of large objects in one request) and
    ``verify`` (certificates: a path, or False). ValueError for one that would be ignored. Nothing is asked of anybody.
    """
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        known = ", ".join(sorted(OPTIONS))
        raise ValueError(f"gs:// has no storage option {', '.join(unknown)}; it has {known}")
    url = options.get("endpoint_url") or _endpoint_of_environment()
    project = options.get("project") or os.environ.get("GCSFS_DEFAULT_PROJECT") or None
    who = authority(url, project, _access(options), options.get("token"))
    endpoint = Endpoint(
        url,
        who,
        timeout=positive(options, "timeout", positive(options, "requests_timeout", TIMEOUT)),
        patience=positive(options, "patience", PATIENCE),
        bandwidth=options.get("bandwidth"),
        verify=options.get("verify", True),
    )
    pays = _who_pays(options)
    if pays is True and not project:
        raise ValueError(
            "requester_pays=True needs the option project, which pays; or name the project instead of True"
        )
    bucket, _, folder = location.partition("://")[2].partition("/")
    budget = budget_of(endpoint.url, whole(options, "connections", CONNECTIONS))
    payer = project if pays is True else pays or None
    part_bytes = whole(options, "part_size", PART_BYTES)
    return GcsStore(endpoint, bucket, folder, budget, payer=payer, part_bytes=part_bytes)


def _access(options: Mapping[str, Any]) -> str:
    access = options.get("access", _ACCESS[0])
    if access not in _ACCESS:
        raise ValueError(f"storage_options: access is one of {', '.join(_ACCESS)}, not {access!r}")
    return str(access)


def _who_pays(options: Mapping[str, Any]) -> bool | str:
    pays = options.get("requester_pays") or False
    if not isinstance(pays, bool | str) or str(pays) in ("true", "false"):
        raise ValueError(f"storage_options: requester_pays is True, False or the name of a project, not {pays!r}")
    return pays


def _endpoint_of_environment() -> str:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if emulator not in ("", "default"):
        return emulator if emulator.startswith(("http://", "https://")) else f"http://{emulator}"
    return f"https://storage.{os.environ.get('GOOGLE_CLOUD_UNIVERSE_DOMAIN', 'googleapis.com')}"
