"""Who we are for Google: the credentials that gcsfs would find, with tokens that are renewed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from distckpt.errors import StorageError
from distckpt.storage.remote.http import Anonymous, Answer, Authority, NoAnswer, Request
from distckpt.storage.remote.options import in_header, without

GOOGLE = "googleapis.com"
_JUST_NOW = 10.0
_WORDS = {"google_default", "cloud", "cache", "browser"}
_OF_SERVICE = {"client_email", "token_uri", "private_key"}
_OF_USER = {"client_id", "client_secret", "refresh_token"}
_IN_JSON = f"{', '.join(sorted(_OF_SERVICE))} of a service account, or {', '.join(sorted(_OF_USER))} of a user"


def authority(endpoint_url: str, project: str | None, access: str, token: Any) -> Authority:
    """Who ``token`` stands for, as gcsfs has it: None (search), "google_default", "cloud", "cache", "anon", a file, a
    dict, a raw token, or google-auth's Credentials. Nothing is asked of anybody before the first request.

    None is nobody where the endpoint is not Google's. ValueError for a token that cannot be one, which is not shown.
    """
    if not (isinstance(token, str) and os.path.exists(token)):
        in_header(token, "token")
    if isinstance(token, Mapping) and not any(fields <= token.keys() for fields in (_OF_SERVICE, _OF_USER)):
        raise ValueError(f"storage_options: token is a dict, which has to have {_IN_JSON}")
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
            # None of the errors below it is shown: they may have the token in the URL at which it was looked up.
            raise StorageError(self._endpoint_url, self._without_any(error)) from None

    def _without_any(self, error: Exception) -> str:
        """What to say of a token that gave no credentials, without a word of what may be secret in it."""
        token = self._token
        is_name = isinstance(token, str) and (token in _WORDS or token.endswith(".json") or os.path.exists(token))
        if token is None or is_name:
            said, reason = f"token={token!r}", str(error)
        elif isinstance(token, str):
            said = "the text in token, which is no word of gcsfs's and no file that is there"
            reason = without(str(error), token)
        else:
            said, reason = f"the {type(token).__name__} in token", str(error)
        if isinstance(error, KeyError):
            reason = f"it has to have {_IN_JSON}, and lacks some or has a private_key that cannot be read"
        return f"no credentials from {said}, as gcsfs understands it: {reason}"
