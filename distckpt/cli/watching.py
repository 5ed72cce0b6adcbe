"""``distckpt watch``: run a command for each checkpoint, as a worker of a group."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import click

from distckpt.cli import options
from distckpt.directory.lease import LEASE_SECONDS
from distckpt.directory.strays import read_run
from distckpt.evaluation.command import CommandRunner, NotStartedError, as_it_is, exported_within
from distckpt.evaluation.watch import BACKOFF, watch
from distckpt.evaluation.watched import WatchedCheckpoint
from distckpt.format.json.group import MODES, ON_LAGS, STARTS
from distckpt.reader import CheckpointReader
from distckpt.storage import Store, open_store

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.command("watch", context_settings={"ignore_unknown_options": False})
@click.argument("directory", metavar="DIR")
@click.option("--group", required=True, metavar="G", help="Workers of one group share the checkpoints. Made if new.")
@click.option("--mode", type=click.Choice(MODES), help="Each checkpoint, or (a new group's default) the newest only.")
@click.option("--start", type=click.Choice(STARTS), help="Where a new group begins; default: earliest.")
@click.option(
    "--max-attempts", type=int, metavar="N", help="So many failures, and a checkpoint is set aside; default 3."
)
@click.option("--max-backlog", type=int, metavar="N", help="So many waiting ones are kept from retention; default 16.")
@click.option("--on-lag", type=click.Choice(ON_LAGS), help="What becomes of those beyond; default: skip.")
@click.option("--worker", metavar="TEXT", help="Who this is, for people; default: host and process.")
@click.option(
    "--timeout", metavar="AGE", callback=options.optional_seconds, help="End when so long nothing came: 0, 90, 12h."
)
@click.option("--backoff", default=f"{BACKOFF:g}", metavar="AGE", callback=options.seconds, show_default=True,
              help="How long something that failed waits before the next try; doubled each time.")  # fmt: skip
@click.option("--lease", default=f"{LEASE_SECONDS:g}", metavar="AGE", callback=options.seconds, show_default=True,
              help="A worker that gives no sign for so long is replaced.")  # fmt: skip
@click.option(
    "--safetensors", metavar="KEY", help="{path} is a folder with the weights below KEY as model.safetensors."
)
@click.option(
    "--export",
    metavar="AGE",
    callback=options.optional_seconds,
    help="{path} is what was exported from the checkpoint, for which so long is waited.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@options.storage_options
def watch_directory(
    directory: str,
    group: str,
    timeout: float | None,
    lease: float,
    safetensors: str | None,
    export: float | None,
    command: tuple[str, ...],
    storage_options: Mapping[str, Any],
    **settings: Any,
) -> None:
    """Run COMMAND for each checkpoint of a directory that is this worker's to evaluate; {path} in it is the checkpoint.

    \b
        distckpt watch /shared/run-7 --group eval --mode all -- python evaluate.py {path}

    It is kept from retention while the command runs. Exit status 0 acknowledges it. Any other status gives it back, with
    the last lines of the error output, to be tried again. SIGINT, SIGTERM, SIGQUIT, and SIGHUP unless it is ignored, as
    under nohup, go on to the command and give its checkpoint back; a worker that is killed is replaced by another one of
    the group. Ends when the run has said that it is over and everything is done.
    """
    if safetensors is not None and export is not None:
        raise click.UsageError("{path} is one thing: give --safetensors or --export")
    watching = watch(
        directory, group=group, timeout=timeout, lease_seconds=lease, storage_options=storage_options, **settings
    )

    @contextlib.contextmanager
    def weights(checkpoint: WatchedCheckpoint) -> Iterator[str]:
        from distckpt.export.alone import weights_of  # it imports torch

        key = safetensors or ""
        with checkpoint.open() as reader:
            _check_key(reader, key)
            with weights_of(reader, key) as folder:
                yield folder

    prepare = exported_within(export) if export is not None else weights if safetensors is not None else as_it_is
    runner = CommandRunner(watching, command, prepare, _tell)
    waiting = _waiting(open_store(directory, storage_options))
    stopped = _run_until_signalled(runner, lambda: _tell(waiting))
    if stopped:
        click.get_current_context().exit(128 + stopped)


def _check_key(reader: CheckpointReader, key: str) -> None:
    """NotStartedError if the checkpoint has nothing below it: who has mistyped it is to blame, and no checkpoint."""
    keys = list(reader.keys())
    if not any(name.startswith(f"{key}.") for name in keys):
        known = ", ".join(sorted({name.partition(".")[0] for name in keys})) or "nothing"
        raise NotStartedError(f"--safetensors {key}: {reader.path} holds nothing below that key; it has: {known:.500}")


def _waiting(store: Store) -> str:
    """What it waits for, and where; who has mistyped the path sees that there is nothing."""
    nothing = ": nothing has been saved there yet" if read_run(store).entry is None else ""
    return f"waiting for checkpoints in {store.url}{nothing}"


def _run_until_signalled(runner: CommandRunner, began: Callable[[], object]) -> int:
    """The signal that has ended it, 0 if none. ``began`` is called once signals are heard.

    In another thread, so that a signal finds this one doing nothing else.
    """
    failed: list[BaseException] = []
    signals: list[int] = []

    def run() -> None:
        try:
            runner.run()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            failed.append(error)

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        runner.stop(number)

    before = {number: signal.signal(number, stop) for number in STOPPING if not _is_to_outlive(number)}
    try:
        began()
        running = threading.Thread(target=run, name="distckpt-watch", daemon=True)
        running.start()
        while running.is_alive():
            running.join(0.2)  # a signal is handled between two of them
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise failed[0]
    return signals[0] if signals else 0


def _is_to_outlive(number: signal.Signals) -> bool:
    """Whether it is a SIGHUP that whoever has started us, as nohup does, has made us ignore."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _tell(said: str) -> None:
    click.echo(said, err=True)
