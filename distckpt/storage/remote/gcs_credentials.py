"""Who we are for Google: the credentials that gcsfs would find, with tokens that are renewed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from distckpt.errors import StorageError
from distckpt.storage.remote.http import Anonymous, Answer, Authority, NoAnswer, Request

GOOGLE = "googleapis.com"
_JUST_NOW = 10.0


def authority(endpoint_url: str, project: str | None, access: str, token: Any) -> Authority:
    """Who ``token`` stands for, as gcsfs has it: None (search), "google_default", "cloud", "cache", "anon", a file, a
    dict, a raw token, or google-auth's Credentials. Nothing is asked of anybody before the first request.

    None is nobody where the endpoint is not Google's.
    """
    if token == "anon" or (token is None and GOOGLE not in endpoint_url):
        return Anonymous()
    return GoogleAuthority(endpoint_url, project, access, token)


class GoogleAuthority:
    """A bearer token of gcsfs's credentials in each request. For many threads; a forked child looks for its own."""

    def __init__(self, endpoint_url: str, project: str | None, access: str, token: Any) -> None:
        self._endpoint_url = endpoint_url
        self._project = project
        self._access = access
        self._token = token
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._found: Any = None
        self._renewed_at = -_JUST_NOW

    def headers(self, request: Request) -> Mapping[str, str]:
        """``Authorization`` with a token that is good for some minutes.

        StorageError if there are no credentials, NoAnswer if they could not be renewed now.
        """
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        headers: dict[str, str] = {}
        credentials = self._credentials()
        try:
            credentials.apply(headers)
        except (GoogleAuthError, HttpError, OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, GoogleAuthError) else error
            reason = f"credentials for {self._endpoint_url} could not be renewed: {cause}"
            is_final = isinstance(cause, GoogleAuthError) and not cause.retryable
            raise NoAnswer(reason, is_final=is_final) from error
        return headers

    def renewed(self, answer: Answer) -> bool:
        """Whether the server did not take the token any more, and there is another one."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request as Transport

        if answer.status != 401:
            return False
        credentials = self._credentials().credentials
        with self._lock:
            if time.monotonic() - self._renewed_at < _JUST_NOW:
                return True  # for another thread, which had the same answer
            if credentials is None:
                return False
            try:
                credentials.refresh(Transport())
            except (GoogleAuthError, OSError):
                return False
            self._renewed_at = time.monotonic()
        return True

    def _credentials(self) -> Any:
        if self._pid != os.getpid():
            # Locks in it may be held by threads that are not there.
            self._pid, self._lock, self._found = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> Any:
        from gcsfs.credentials import GoogleCredentials
        from google.auth.exceptions import GoogleAuthError

        try:
            return GoogleCredentials(self._project, self._access, self._token)
        except (GoogleAuthError, OSError, ValueError, KeyError) as error:
            kind = self._token if isinstance(self._token, str) and len(self._token) < 32 else type(self._token).__name__
            message = f"no credentials from token={kind!r}, as gcsfs understands it: {error}"
            raise StorageError(self._endpoint_url, message) from error
