"""The objects of real servers, as another program than ours sees them."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import quote

from tests.support.servers import Server


class Files:
    """The files below a folder, as any other program sees them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes | None:
        """See Outside."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def write(self, path: str, data: bytes) -> None:
        """See Outside."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


class GcsBucket:
    """The objects of a bucket of a fake GCS, or of that at a port here, below a folder."""

    def __init__(self, server: Server | int, name: str, folder: str) -> None:
        self._port = server if isinstance(server, int) else server.port
        self._name = name
        self._prefix = f"{folder}/" if folder else ""

    def read(self, path: str) -> bytes | None:
        """See Outside."""
        status, body = self._request(
            "GET", f"/storage/v1/b/{self._name}/o/{quote(self._prefix + path, safe='')}?alt=media"
        )
        return body if status == 200 else None

    def write(self, path: str, data: bytes) -> None:
        """See Outside."""
        name = quote(self._prefix + path, safe="")
        status, body = self._request("POST", f"/upload/storage/v1/b/{self._name}/o?uploadType=media&name={name}", data)
        assert status == 200, body

    def names(self) -> set[str]:
        """Of all objects there are, hidden ones too."""
        _, body = self._request("GET", f"/storage/v1/b/{self._name}/o?prefix={quote(self._prefix, safe='')}")
        return {each["name"].removeprefix(self._prefix) for each in json.loads(body).get("items", ())}

    def _request(self, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request(method, target, body)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found
