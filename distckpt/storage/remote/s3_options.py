"""What users of s3fs say about an S3, and what we ask on top of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distckpt.storage.remote.budget import CONNECTIONS
from distckpt.storage.remote.http import PATIENCE, TIMEOUT
from distckpt.storage.remote.options import endpoint_url, flag, in_header, mapping, positive, whole

MIB = 1 << 20
PART_BYTES = 16 * MIB
"""Of a large object, so many bytes go up in one request."""

LEAST_PART_BYTES = 5 * MIB
"""S3 takes no smaller part but the last."""

KNOWN = (
    *("anon", "key", "secret", "token", "username", "password", "profile", "endpoint_url", "use_ssl"),
    *(
        "client_kwargs",
        "config_kwargs",
        "requester_pays",
        "s3_additional_kwargs",
        "timeout",
        "patience",
        "connections",
        "bandwidth",
        "part_size",
    ),
)
_OF_CLIENT = (
    *("region_name", "endpoint_url", "use_ssl", "verify"),
    *("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
)
_OF_CONFIG = ("region_name", "signature_version", "s3", "use_dualstack_endpoint", "use_fips_endpoint")
_FLAGS_OF_S3 = ("payload_signing_enabled", "use_accelerate_endpoint", "use_dualstack_endpoint")
_OF_S3 = ("addressing_style", "us_east_1_regional_endpoint", *_FLAGS_OF_S3)
_WRITE_HEADERS = {
    "ACL": "x-amz-acl",
    "BucketKeyEnabled": "x-amz-server-side-encryption-bucket-key-enabled",
    "SSEKMSEncryptionContext": "x-amz-server-side-encryption-context",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
}


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach an S3, and as whom. None is what botocore finds in the environment and in ``~/.aws``.

    ``config`` goes to botocore's Config. ``write_headers`` go with everything that is created. ``part_bytes`` is a
    multiple of 1 MiB.
    """

    anon: bool = False
    key: str | None = None
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    use_ssl: bool = True
    verify: bool | str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    requester_pays: bool = False
    write_headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = TIMEOUT
    patience: float = PATIENCE
    connections: int = CONNECTIONS
    bandwidth: float | None = None
    part_bytes: int = PART_BYTES

    def reaches_as(self, other: S3Options) -> bool:
        """Whether the server and the credentials are those of ``other``; regions may differ."""
        reached = ("anon", "key", "secret", "token", "profile", "endpoint_url", "use_ssl", "requester_pays")
        return all(getattr(self, name) == getattr(other, name) for name in reached)


def s3_options(given: Mapping[str, Any]) -> S3Options:
    """From ``storage_options`` as s3fs takes them. ValueError for what is not known here, instead of ignoring it.

    Ours are ``timeout`` (seconds a try), ``patience`` (seconds until a write is given up), ``connections`` and
    ``bandwidth`` (of a node; the latter in bytes a second, each way) and ``part_size`` (bytes).
    """
    _refuse_unknown("storage_options", given, KNOWN)
    client, config = mapping(given, "client_kwargs"), mapping(given, "config_kwargs")
    _refuse_unknown("client_kwargs", client, _OF_CLIENT)
    _check_config(config)
    anon = flag(given, "anon")
    signature = config.pop("signature_version", None)
    if signature not in (None, "s3v4", "v4"):
        raise ValueError(f"config_kwargs: only signature_version s3v4 is spoken here, not {signature!r}")
    region = config.pop("region_name", None)
    key = in_header(given.get("key") or given.get("username") or client.get("aws_access_key_id"), "key")
    secret = in_header(given.get("secret") or given.get("password") or client.get("aws_secret_access_key"), "secret")
    if not anon and bool(key) != bool(secret):
        raise ValueError("storage_options: key and secret go together, and one of them is missing")
    return S3Options(
        anon=anon,
        key=key,
        secret=secret,
        token=in_header(given.get("token") or client.get("aws_session_token"), "token"),
        profile=given.get("profile"),
        endpoint_url=endpoint_url(given.get("endpoint_url") or client.get("endpoint_url")),
        region=client.get("region_name") or region,
        use_ssl=flag(given, "use_ssl", default=flag(client, "use_ssl", default=True, where="client_kwargs")),
        verify=client.get("verify"),
        config=config,
        requester_pays=flag(given, "requester_pays"),
        write_headers=_write_headers(mapping(given, "s3_additional_kwargs")),
        timeout=positive(given, "timeout", TIMEOUT),
        patience=positive(given, "patience", PATIENCE),
        connections=whole(given, "connections", CONNECTIONS),
        bandwidth=given.get("bandwidth"),
        part_bytes=_part_bytes(positive(given, "part_size", PART_BYTES)),
    )


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"s3:// would ignore {', '.join(unknown)} in {where}; what it takes is {', '.join(known)}")


def _check_config(config: Mapping[str, Any]) -> None:
    _refuse_unknown("config_kwargs", config, _OF_CONFIG)
    for name in ("use_dualstack_endpoint", "use_fips_endpoint"):
        flag(config, name, where="config_kwargs")
    where = "config_kwargs['s3']"
    s3 = mapping(config, "s3", where="config_kwargs")
    _refuse_unknown(where, s3, _OF_S3)
    for name in _FLAGS_OF_S3:
        flag(s3, name, where=where)
    regional = s3.get("us_east_1_regional_endpoint")
    if regional not in (None, "legacy", "regional"):
        raise ValueError(f"{where}: us_east_1_regional_endpoint is legacy or regional, not {regional!r}")


def _write_headers(given: Mapping[str, Any]) -> dict[str, str]:
    where = "s3_additional_kwargs"
    _refuse_unknown(where, given, sorted(_WRITE_HEADERS))
    return {
        _WRITE_HEADERS[name]: str(value).lower()
        if isinstance(value, bool)
        else in_header(str(value), name, where=where)
        for name, value in given.items()
    }


def _part_bytes(size: float) -> int:
    if size < LEAST_PART_BYTES or size % MIB:
        raise ValueError(f"storage_options: part_size is a multiple of 1 MiB, and at least 5 MiB, not {size:g} bytes")
    return int(size)
