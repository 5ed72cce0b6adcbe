"""The way to one bucket, found when it is needed."""

from __future__ import annotations

from urllib.parse import urlsplit

from distckpt.storage.remote.http import Endpoint, NoAnswer, Request
from distckpt.storage.remote.s3_options import S3Options
from distckpt.storage.remote.s3_signing import Bucket, S3Authority, certificates, locate

_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")


class S3Bucket:
    """The bucket ``name``, and the region that it is in: Amazon is asked for that once, others are not."""

    def __init__(self, name: str, options: S3Options) -> None:
        self.name = name
        self._options = options
        self._verify = certificates(options)
        self._first = self._endpoint_at(locate(name, options))
        self._found: Endpoint | None = None

    def endpoint(self) -> Endpoint:
        """Where to ask. NoAnswer if Amazon does not say where the bucket is."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> Endpoint:
        """Threads that come here at once find the same."""
        if not (urlsplit(self._first.url).hostname or "").endswith(_AMAZON):
            return self._first
        try:
            region = self._first.ask(Request("HEAD", "/")).headers.get("x-amz-bucket-region", "")
        except NoAnswer:
            return self._first  # whoever asks next is told what is wrong
        here = locate(self.name, self._options)
        return (
            self._first if region in ("", here.region) else self._endpoint_at(locate(self.name, self._options, region))
        )

    def _endpoint_at(self, bucket: Bucket) -> Endpoint:
        return Endpoint(
            bucket.url,
            S3Authority(bucket, self._options),
            timeout=self._options.timeout,
            patience=self._options.patience,
            bandwidth=self._options.bandwidth,
            verify=self._verify,
        )
