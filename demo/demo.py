"""The main job, on one machine: train on two ranks, kill one while it saves, go on with three, evaluate all along.

    make demo             # checkpoints go to a folder
    make demo STORE=gs    # to a bucket: a server for it is started here; or STORE=s3

Every claim that is printed has been checked; a check that fails ends the demo with exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checks import (
    Check,
    check_bits,
    check_crash,
    check_curve,
    check_readings,
    check_restored,
    check_samples,
    read_again,
    read_by_evaluation,
)
from children import Child, Children
from record import Commit, Record
from report import draw, print_checks, print_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from stores import STORES, served

import distckpt

DEMO = Path(__file__).parent
EXAMPLES = DEMO.parent / "examples"
OUTPUT = DEMO.parent / "demo-output"
STEPS, SAVE_EVERY, KEEP, BATCH = 100, 10, 5, 12
CRASH_STEP, CRASH_RANK = 50, 1
PHASE_SECONDS = 240.0
LOOK_SECONDS = 0.25


class DemoError(Exception):
    """The demo cannot go on; ``children`` are those whose logs may say why."""

    def __init__(self, message: str, *children: Child) -> None:
        super().__init__(message)
        self.children = children


@dataclass
class Demo:
    """What the two phases share."""

    console: Console
    children: Children
    record: Record
    began: float = field(default_factory=time.monotonic)
    evaluation: Child | None = None

    def say(self, text: str) -> None:
        """A line with the seconds since the beginning in front."""
        self.console.print(f"[dim]{time.monotonic() - self.began:5.0f} s[/dim]  {text}", highlight=False)

    def start_evaluation(self) -> None:
        """One process that follows the run from outside until its last checkpoint."""
        options = [
            "--directory",
            self.record.directory,
            "--until",
            str(STEPS),
            "--out",
            str(self.record.evaluations_path),
        ]
        self.evaluation = self.children.start("evaluation", [str(DEMO / "evaluation.py"), *options])
        self.say(f"checkpoints go to [bold]{self.record.directory}[/bold]")
        self.say("evaluation follows the directory through [bold]checkpoints_iterator[/bold]")

    def train(self, phase: str, ranks: int, *more: str) -> Child:
        """Run training.py on that many ranks until it ends, showing what happens."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        options = ["--directory", self.record.directory, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
        options += ["--keep", str(KEEP), "--events", str(self.record.events_path)]
        options += ["--digests", str(OUTPUT / "digests"), *more]
        child = self.children.start(f"train-on-{ranks}", [*torchrun, str(DEMO / "training.py"), *options])
        self.follow(child, f"{phase}, {ranks} ranks")
        return child

    def follow(self, child: Child, title: str) -> None:
        """Show what happens until the child has ended. DemoError if that takes too long or the evaluation fails."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        bars = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bars as progress:
            bar = progress.add_task(title, total=STEPS, loss="starting")
            deadline = time.monotonic() + PHASE_SECONDS
            ended = False
            while not ended:
                ended = child.ended(LOOK_SECONDS)
                for news in self.record.look():
                    self.show(news)
                    if isinstance(news, dict) and news.get("event") == "step":
                        progress.update(bar, completed=news["step"], loss=f"loss {news['loss']:.3f}")
                self.check_evaluation()
                if time.monotonic() > deadline:
                    raise DemoError(f"{title}: not done after {PHASE_SECONDS:g} s", child)

    def show(self, news: dict[str, Any] | Commit) -> None:
        """Tell of a commit, an evaluation or a start; steps are shown by the bar."""
        if isinstance(news, Commit):
            loss = next(event["loss"] for event in reversed(self.record.steps) if event["step"] == news.number)
            times = f"stall {1e3 * news.stall:.0f} ms, commit {1e3 * news.decided:.0f} ms"
            self.say(f"[green]{news.name} committed[/green]  {news.world_size} ranks, loss {loss:.3f}, {times}")
        elif "checkpoint" in news:
            name = news["checkpoint"].rpartition("/")[2]
            self.say(f"[yellow]{name} evaluated[/yellow]  held-out loss {news['loss']:.4f}")
        elif news["event"] == "started" and news["rank"] == 0:
            source = f"from [bold]{news['restored'].rpartition('/')[2]}[/bold]" if news["restored"] else "afresh"
            self.say(f"training on {news['world_size']} ranks {source}")

    def check_evaluation(self) -> None:
        """DemoError if it has ended with an error."""
        if self.evaluation is not None and self.evaluation.ended(0) and self.evaluation.process.returncode != 0:
            raise DemoError("the evaluation failed", self.evaluation)


def run(demo: Demo) -> list[Check]:
    """Both phases, the table and the picture. Returns what was checked."""
    record = demo.record
    demo.start_evaluation()
    crash = ("--die-at-step", str(CRASH_STEP), "--die-rank", str(CRASH_RANK))
    first = demo.train("phase 1", 2, *crash)
    if first.process.returncode == 0:
        raise DemoError("phase 1 was to be killed, but ended well", first)
    resumed = newest_commit(record, first)
    demo.say(
        f"[red]rank {CRASH_RANK} killed[/red] while ckpt-{CRASH_STEP} was being saved; newest commit: {resumed.name}"
    )
    expected = [f"ckpt-{step}" for step in range(SAVE_EVERY, CRASH_STEP, SAVE_EVERY)]
    checks = [check_crash(record, CRASH_STEP, CRASH_RANK, expected)]

    second = demo.train("phase 2", 3)
    if second.process.returncode != 0:
        raise DemoError("phase 2 failed", second)
    wait_for_evaluation(demo)
    demo.say("comparing every checkpoint with what the ranks had when they saved it")
    kept = set(retained(record.directory))
    whole = {commit.path: read_again(record, commit) for commit in record.commits if commit.path in kept}
    partial = {commit.path: read_by_evaluation(record, commit) for commit in record.commits}
    checks += [
        check_restored(record, resumed, 3),
        check_bits(record, resumed, 3),
        check_samples(record, BATCH),
        check_curve(record, resumed.number + 1, CRASH_STEP),
        check_readings(f"the {len(whole)} kept checkpoints read back bit for bit", list(whole.values())),
        check_readings("evaluation read each model bit for bit while training went on", list(partial.values())),
    ]
    demo.console.print()
    print_table(demo.console, record, whole, partial)
    print_checks(demo.console, checks)
    draw(record, CRASH_STEP, resumed, OUTPUT / "loss.png")
    return checks


def newest_commit(record: Record, child: Child) -> Commit:
    """The newest committed checkpoint, by the log."""
    path = distckpt.latest_checkpoint(record.directory)
    for commit in record.commits:
        if commit.path == path:
            return commit
    raise DemoError(f"nothing to resume from: the newest checkpoint is {path}", child)


def retained(directory: str) -> tuple[str, ...]:
    """What retention has left."""
    state = distckpt.get_checkpoint_state(directory)
    return tuple(state.all_model_checkpoint_paths) if state is not None else ()


def wait_for_evaluation(demo: Demo) -> None:
    """Until it has seen the last checkpoint, and so has ended."""
    if demo.evaluation is not None:
        demo.follow(demo.evaluation, "evaluation")


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", choices=STORES, default="local", help="where the checkpoints go")
    store = parser.parse_args().store
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    (OUTPUT / "digests").mkdir(parents=True)
    console = Console(width=None if sys.stdout.isatty() else 118)
    try:
        with served(store, OUTPUT / "checkpoints") as (directory, variables):
            os.environ.update(variables)
            return show(console, Record(OUTPUT, directory))
    except DemoError as error:
        console.print(f"[bold red]The demo failed:[/bold red] {error}")
        for child in error.children:
            console.print(f"[bold]The end of {child.log}:[/bold]")
            console.print(child.log_tail(), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; all processes have been ended")
        return 130


def show(console: Console, record: Record) -> int:
    """Run both phases and say what came of them; the exit status."""
    # Short, because Ray puts sockets there. With a folder of its own it finds no cluster that runs here already.
    with tempfile.TemporaryDirectory(prefix="demo-") as ray, Children(OUTPUT, environment(ray)) as children:
        demo = Demo(console, children, record)
        checks = run(demo)
    return conclude(demo, checks)


def environment(ray_folder: str) -> dict[str, str]:
    """For the children: one thread each, a Ray that is nobody else's, and the examples, whose parts they use."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = {"RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [inherited.get("PYTHONPATH")])])
    return {**inherited, **ray, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def conclude(demo: Demo, checks: list[Check]) -> int:
    """The last lines, and the exit status."""
    picture = os.path.relpath(OUTPUT / "loss.png")
    if all(check.holds for check in checks):
        demo.console.print(
            f"\n[bold green]Lost: nothing that was committed.[/bold green] ckpt-{CRASH_STEP} was in flight when rank "
            f"{CRASH_RANK} was killed; it was not committed, and the steps since ckpt-{CRASH_STEP - SAVE_EVERY} were "
            "trained again.",
            highlight=False,
        )
        status = 0
    else:
        failed = sum(not check.holds for check in checks)
        demo.console.print(f"\n[bold red]{failed} of {len(checks)} checks failed.[/bold red]", highlight=False)
        status = 1
    demo.console.print(f"{time.monotonic() - demo.began:.0f} s in all. Picture: {picture}", highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
