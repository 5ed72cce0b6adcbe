"""The objects of a real S3 server, as another program than ours sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

from distckpt.testing.observing import MIB
from tests.support.servers import KEY, SECRET, Server


def options_for(url: str, **more: Any) -> Mapping[str, Any]:
    """What a user of s3fs would say to get to a server here, with small parts."""
    ours = {"timeout": 20, "patience": 20, "part_size": 5 * MIB}
    return {"key": KEY, "secret": SECRET, "endpoint_url": url, **ours, **more}


class Bucket:
    """A bucket of a server, or of that at a port here, below a folder, as botocore's client sees it."""

    def __init__(self, server: Server | int, name: str, folder: str) -> None:
        self.name = name
        self._prefix = f"{folder}/" if folder else ""
        self.client: Any = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{server if isinstance(server, int) else server.port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}),
        )

    def read(self, path: str) -> bytes | None:
        """See Outside."""
        try:
            answer = self.client.get_object(Bucket=self.name, Key=self._prefix + path)
        except ClientError:
            return None
        with answer["Body"] as body:
            return bytes(body.read())

    def write(self, path: str, data: bytes) -> None:
        """See Outside."""
        self.client.put_object(Bucket=self.name, Key=self._prefix + path, Body=data)

    def names(self) -> list[str]:
        """Of all objects in the bucket."""
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())]

    def uploads(self) -> list[str]:
        """The keys of all uploads that nobody has finished."""
        found = self.client.list_multipart_uploads(Bucket=self.name)
        return [upload["Key"] for upload in found.get("Uploads", ())]
