"""Attacks whole processes and directories for as long as one says, and tells at the end what was tried and what broke.

``python -m tests.soak SECONDS`` plays each attack for its share of the time. What breaks is told at once, with the
command that does the same again, and is the exit status in the end: 1 if anything broke.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distckpt.testing.system_calls import NoCompilerError
from tests.soak.attack import Attack, Attacked, Broken, Siege
from tests.soak.calls import Calls
from tests.soak.evaluation import Evaluation
from tests.soak.flips import Flips
from tests.soak.histories import Histories
from tests.soak.kills import Kills
from tests.soak.power import Power
from tests.soak.ranks import Ranks
from tests.soak.requests import Requests
from tests.soak.stores import Stores

ATTACKS: tuple[Attack, ...] = (
    *(Kills(), Calls(), Power(), Flips(), Ranks(), Stores()),
    *(Requests("gs"), Requests("s3"), Requests("moto"), Kills("gs"), Kills("moto")),
    *(Evaluation(), Evaluation("memory"), Evaluation("moto", commits=60), Histories()),
)

console = Console(highlight=False, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__, formatter_class=_Formatter)
    every = ",".join(attack.name for attack in ATTACKS)
    parser.add_argument("seconds", type=float, nargs="?", default=600.0, help="how long, all attacks together")
    parser.add_argument("--only", default=every, help=f"some of {every}")
    parser.add_argument("--seed", type=int, help="where the dice begin; a new one each time")
    parser.add_argument("--play", metavar="CASE", help="play this case of the one attack that is named, and no other")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in, on the file system to be attacked")
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def tell(broken: Broken) -> None:
    """What broke, and how to see it again."""
    console.print(f"[red]BROKEN[/red] {broken.attack}, {broken.kind}:", markup=True)
    console.print(f"{broken.what}\nThe same again: {broken.replay}\n", markup=False)


def table(attacked: list[Attacked]) -> Table:
    """What was tried, how many of it, and what broke."""
    shown = Table("attack", "what was tried", title="make soak")
    shown.add_column("how many", justify="right")
    shown.add_column("broken", justify="right")
    for one in attacked:
        broken = one.broken_by_kind
        for at, (kind, count) in enumerate(sorted(one.outcome.tried.items())):
            shown.add_row("" if at else one.title, kind, f"{count:,}", f"{broken[kind]:,}")
        total, lost = one.outcome.tried.total(), len(one.outcome.broken)
        shown.add_row("", "all", f"{total:,}", f"{lost:,}", style="bold", end_section=not one.outcome.seen)
        for kind, count in one.outcome.seen.items():
            shown.add_row("", kind, f"{count:,}", "", style="dim", end_section=True)
    return shown


def main(arguments: list[str]) -> int:
    """The exit status."""
    given = make_parser().parse_args(arguments)
    chosen = [attack for attack in ATTACKS if attack.name in given.only.split(",")]
    folder = given.folder or Path(tempfile.mkdtemp(prefix="distckpt-soak-"))
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    console.print(f"seed {seed}, in {folder}")
    attacked: list[Attacked] = []
    try:
        for attack in chosen:
            console.print(f"{attack.name} ...")
            siege = Siege(attack, folder / attack.name)
            if given.play is None:
                attacked.append(siege.run(random.Random(f"{seed} {attack.name}"), given.seconds / len(chosen), tell))
                continue
            attacked.append(Attacked(attack.name, siege.play(given.play)))
            for one in attacked[-1].outcome.broken:
                tell(one)
    except NoCompilerError as error:
        console.print(str(error), markup=False)
        return 2
    console.print(table(attacked))
    broken = [one for each in attacked for one in each.outcome.broken]
    for one in broken:
        console.print(f"broken: {one.replay}", markup=False)
    console.print(f"{len(broken)} broken{f'; what is left of it is in {folder}' if broken else ''}")
    if not broken:
        shutil.rmtree(folder)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
