"""Connections to one server: through the proxy and with the certificates of the environment, kept while they are good."""

from __future__ import annotations

import contextlib
import os
import ssl
import time
import weakref
from collections import deque
from collections.abc import Mapping
from urllib.request import getproxies, proxy_bypass

from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig
from urllib3.util import make_headers, parse_url
from urllib3.util.ssl_ import create_urllib3_context
from urllib3.util.url import Url

from distckpt.storage.remote.options import endpoint_url, without_password

IDLE_SECONDS = 20.0
"""A connection that nobody used for so long may be dead without a word: a fresh one is cheaper than to find that out."""

CONNECT_SECONDS = 10.0
"""To one address of the server."""

Connection = HTTPConnection | HTTPSConnection


class Connections:
    """Opens connections to the server at ``url``, an ``http`` or ``https`` URL, and keeps those that come back.

    Proxies are those of the environment (``https_proxy``, ``no_proxy`` and so on); a server on this machine is spoken
    to directly. ``verify`` is True for the certificates of ``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE`` or else of the
    system, a path for a bundle or a folder, False for none. Threads may share it; a forked child opens its own.
    ValueError if the URL or the proxy's is none of HTTP.
    """

    def __init__(
        self, url: str, *, verify: bool | str = True, client_cert: str | tuple[str, str] | None = None
    ) -> None:
        parsed = _http_url(endpoint_url(url) or "", "an endpoint")
        self._secure = parsed.scheme == "https"
        self._host = (parsed.host or "").strip("[]")
        self._port = parsed.port or (443 if self._secure else 80)
        default = parsed.port in (None, 443 if self._secure else 80)
        self.host_header = parsed.host + ("" if default else f":{parsed.port}") if parsed.host else ""
        self.base_path = (parsed.path or "").rstrip("/")
        self._proxy = _proxy_for(parsed)
        self._context = _context(verify, client_cert) if self._secure or _is_secure(self._proxy) else None
        # A deque, as no lock is to be held while a process forks.
        self._idle: deque[tuple[float, Connection]] = deque()
        self._pid = os.getpid()
        weakref.finalize(self, _close_all, self._idle)

    @property
    def forwarded(self) -> str:
        """What a proxy that passes requests on wants before each target, and '' if there is no such proxy."""
        return f"http://{self.host_header}" if self._proxy is not None and not self._secure else ""

    @property
    def forward_headers(self) -> Mapping[str, str]:
        """What such a proxy wants in each request."""
        return _proxy_headers(self._proxy) if self.forwarded and self._proxy is not None else {}

    def kept(self) -> Connection | None:
        """A connection that was used before and seems to be alive, or None."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.close()  # what the parent has open is not ours to speak on
        while True:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < IDLE_SECONDS and connection.is_connected:
                return connection
            connection.close()

    def opened(self, deadline: float) -> Connection:
        """A new connection. OSError, or urllib3's HTTPError, if there is none by ``deadline``, by the monotonic clock."""
        timeout = max(min(deadline - time.monotonic(), CONNECT_SECONDS), 0.001)
        host, port = self._host, self._port
        config = None
        if self._proxy is not None:
            host = (self._proxy.host or "").strip("[]")
            port = self._proxy.port or (443 if _is_secure(self._proxy) else 80)
            config = ProxyConfig(self._context, False, None, None)
        connection: Connection
        if self._secure or _is_secure(self._proxy):
            connection = HTTPSConnection(
                host, port, timeout=timeout, proxy=self._proxy, proxy_config=config, ssl_context=self._context
            )
        else:
            connection = HTTPConnection(host, port, timeout=timeout, proxy=self._proxy, proxy_config=config)
        try:
            if self._proxy is not None and self._secure:
                headers = _proxy_headers(self._proxy)
                connection.set_tunnel(self._host, self._port, headers, "https" if _is_secure(self._proxy) else "http")
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    def keep(self, connection: Connection) -> None:
        """Take a connection back on which nothing is under way."""
        self._idle.append((time.monotonic(), connection))

    def close(self) -> None:
        """Close all that nobody uses. Who forgets to has it done for him."""
        _close_all(self._idle)


def _close_all(idle: deque[tuple[float, Connection]]) -> None:
    while idle:
        with contextlib.suppress(IndexError):  # another thread has just taken the last one
            idle.pop()[1].close()


def _http_url(url: str, what: str) -> Url:
    parsed = parse_url(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{without_password(url)!r} is not {what}: an http or https URL is wanted")
    return parsed


def _proxy_for(parsed: Url) -> Url | None:
    host = (parsed.host or "").strip("[]")
    proxies = getproxies()
    proxy = proxies.get(parsed.scheme or "", proxies.get("all"))
    if not proxy or host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    return _http_url(proxy if "://" in proxy else f"http://{proxy}", "a proxy that can be used")


def _is_secure(url: Url | None) -> bool:
    return url is not None and url.scheme == "https"


def _proxy_headers(proxy: Url) -> dict[str, str]:
    return dict(make_headers(proxy_basic_auth=proxy.auth)) if proxy.auth else {}


def _context(verify: bool | str, client_cert: str | tuple[str, str] | None) -> ssl.SSLContext:
    context = create_urllib3_context()
    bundle = verify if isinstance(verify, str) else None
    if verify is True:
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif bundle is None:
        context.load_default_certs()
    elif os.path.isdir(bundle):
        context.load_verify_locations(capath=bundle)
    else:
        context.load_verify_locations(cafile=bundle)
    if client_cert is not None:
        context.load_cert_chain(*([client_cert] if isinstance(client_cert, str) else client_cert))
    return context
