"""``distckpt report`` and ``serve``: a page that shows a run, as a file or for a browser to ask for."""

from __future__ import annotations

import contextlib
import http.server
import os
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import click

from distckpt.cli import options, text
from distckpt.cli.overview.gather import gather
from distckpt.cli.overview.page import page
from distckpt.errors import DistckptError
from distckpt.storage import LocalStore, Store, open_store

REFRESH_SECONDS = 30


@click.command("report")
@click.argument("directory", metavar="DIR")
@click.option("-o", "output", required=True, metavar="FILE", type=click.Path(dir_okay=False), help="The page to write.")
@options.storage_options_in_full
@click.pass_context
def write_report(ctx: click.Context, directory: str, output: str, storage_options: Mapping[str, Any]) -> None:
    """Write a page that shows the run of a directory: one HTML file, which needs no server and no network.

    Checkpoints, sizes and metrics over time, where runs failed, what saves cost, groups, leases, and what is damaged, from
    storage alone. A FILE that is there is replaced; a pipe or a device is written to. Exit status 1 if something is wrong,
    which the page names.
    """
    found = gather(open_store(directory, storage_options), time.time())
    _put(page(found), output)
    for one in found.wrong:
        click.echo(one, err=True)
    if found.wrong:
        ctx.exit(1)


def _put(content: str, output: str) -> None:
    if output == "-":
        click.echo(content, nl=False)
        return
    folder, name = os.path.split(os.path.realpath(output))
    if not os.path.isdir(folder):
        raise ValueError(f"{output}: there is no folder {folder}")
    # A pipe or a device is not replaced: what reads it wants the page. And a store takes no name that begins with a dot.
    directly = name.startswith(".") or (os.path.exists(output) and not os.path.isfile(output))
    try:
        if not directly:
            _replace(content, folder, name)
            return
        with open(output, "w", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f"{output}: {error.strerror or error}") from error


def _replace(content: str, folder: str, name: str) -> None:
    """Whole or not at all: where there is no room for it, the page that was there stays. It keeps its mode."""
    output, mode = os.path.join(folder, name), None
    if os.path.exists(output):
        with open(output, "rb") as before:
            mode = os.fstat(before.fileno()).st_mode & 0o7777
    LocalStore(folder).replace(name, content.encode())
    if mode is not None:
        os.chmod(output, mode)


@click.command("serve")
@click.argument("directory", metavar="DIR")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen. Whoever reaches it may see the page."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@options.storage_options
def serve_page(directory: str, host: str, port: int, storage_options: Mapping[str, Any]) -> None:
    """Show the page that `report` writes to browsers, read anew each time they ask, until Ctrl-C."""
    store = open_store(directory, storage_options)
    gather(store, time.time())  # what is wrong with the directory is said before anybody looks
    with _listening(host, port, store) as server:
        address = f"[{host}]" if ":" in host else host
        text.console().print(f"http://{address}:{server.server_address[1]}/ shows {store.url}", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _listening(host: str, port: int, store: Store) -> http.server.HTTPServer:
    try:
        return http.server.ThreadingHTTPServer((host, port), _handler(store))
    except OSError as error:
        reason = f"{host} port {port}: cannot listen there: {error.strerror or error}"
        raise ValueError(f"{reason}. Give another --port, 0 for any that is free, or another --host") from error


def _handler(store: Store) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers every GET of ``/`` with the page as it is now."""

        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                content, status = page(gather(store, time.time()), REFRESH_SECONDS).encode(), HTTPStatus.OK
            except DistckptError as error:
                content, status = f"{error}\n".encode(), HTTPStatus.SERVICE_UNAVAILABLE
            kind = "text/html" if status is HTTPStatus.OK else "text/plain"
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nobody wants to read who has looked."""

    return Handler
