"""``distckpt report`` and ``serve``: a page that shows a run, as a file or for a browser to ask for."""

from __future__ import annotations

import contextlib
import http.server
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import click

from distckpt.cli import options, text
from distckpt.cli.overview.gather import gather
from distckpt.cli.overview.page import page
from distckpt.errors import DistckptError
from distckpt.storage import Store, open_store

REFRESH_SECONDS = 30


@click.command("report")
@click.argument("directory", metavar="DIR")
@click.option("-o", "output", required=True, metavar="FILE", type=click.Path(dir_okay=False), help="The page to write.")
@options.storage_options_in_full
@click.pass_context
def write_report(ctx: click.Context, directory: str, output: str, storage_options: Mapping[str, Any]) -> None:
    """Write a page that shows the run of a directory: one HTML file, which needs no server and no network.

    Checkpoints, sizes and metrics over time, where runs failed, what saves cost, groups, leases, and what is damaged, from
    storage alone. A FILE that is there is replaced. Exit status 1 if something is wrong, which the page names.
    """
    found = gather(open_store(directory, storage_options), time.time())
    with click.open_file(output, "w", encoding="utf-8", atomic=output != "-") as file:
        file.write(page(found))
    for one in found.wrong:
        click.echo(one, err=True)
    if found.wrong:
        ctx.exit(1)


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
    with http.server.ThreadingHTTPServer((host, port), _handler(store)) as server:
        address = f"[{host}]" if ":" in host else host
        text.console().print(f"http://{address}:{server.server_address[1]}/ shows {store.url}", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


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
