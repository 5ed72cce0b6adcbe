"""All figures of distckpt, with its peers and the machine's own limits measured beside it in alternation.

    python benchmarks/run.py [--quick] [--only saves restores ...] [--json FILE]

Files go to bench-output/ in the current folder and are removed afterwards. A missed target is shown as such; the exit
status is 1 only if something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import agreeing as agreed
import coordination
import exporting
import gpu
import planning
import resizing as resized
import starting
import torch
import watching as followers
from buckets import buckets, limits, links, requests, transports, uploads
from figures import Figure, plain, ratio, table
from machine import describe_machine
from ranks import RankError, run_ranks
from rounds import in_all, longest, together

from distckpt.directory.news import MOST_PAUSE_OF_FILES

REPETITIONS = 5
QUICK_REPETITIONS = 3
SMALL_SAVES = 24
RESTARTS = 3
STARTS = 3
FOLLOWS = 3
MOST_GROWTH = 1.2
FOLDER = Path("bench-output")
MEMORY = Path("/dev/shm")
Results = Sequence[dict[str, Any]]
Measured = TypeVar("Measured")


def saves(folder: Path, repetitions: int) -> list[Figure]:
    """Saving 1.2 GB, two ranks, until it is durable and committed."""
    return _saves(folder, folder, repetitions, 3.5, 0.8)


def gpus(folder: Path, repetitions: int) -> list[Figure]:
    """One rank with a GPU and 3 GB on it, to and from the host's memory. Nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="distckpt-bench-") as memory:
        (result,) = run_ranks(1, "gpu:measure", folder, folder=memory, repetitions=repetitions)
    found = result["measured"]
    extra = [
        stall + after - alone
        for stall, after, alone in zip(
            found["stall of a save"], found["steps after a save"], found["steps alone"], strict=True
        )
    ]
    return [
        *(plain(name, "s", seconds) for name, seconds in found.items()),
        plain("optimizer's step waited", "s", result["optimizer's step waited"]),
        plain("bare copy, GB a second", "GB/s", [result["bytes"] / 1e9 / each for each in found[gpu.BARE]]),
        ratio("what a save costs training, compared with a bare copy", extra, found[gpu.BARE], 1.3),
        ratio("speed of a save, compared with torch.save", found["torch.save"], found["save to its commit"]),
        ratio("speed of a save, compared with dcp.save", found["dcp.save"], found["save to its commit"]),
        ratio("speed of a restore, compared with torch.load", found["torch.load"], found["restore"]),
        ratio("speed of a restore, compared with dcp.load", found["dcp.load"], found["restore"]),
    ]


def diskless(folder: Path, repetitions: int) -> list[Figure]:
    """The same saves into memory, where no disk hides what each of them costs by itself."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="distckpt-bench-") as memory:
        return _saves(folder, Path(memory), repetitions)


def _saves(
    logs: Path, folder: Path, repetitions: int, least_dcp: float | None = None, least_raw: float | None = None
) -> list[Figure]:
    results = run_ranks(2, "saving:save_state", logs, folder=str(folder.resolve()), repetitions=repetitions)
    measured, size = _measured(results), _bytes(results)
    done = {name: together(measured, name, "durable") for name, what in measured[0].items() if "durable" in what}
    raw = min((name for name in done if name.startswith("raw")), key=lambda name: statistics.median(done[name]))
    return [
        plain("distckpt save, durable and committed", "s", done["distckpt"]),
        *(plain(_LABELS.get(name, name), "s", seconds) for name, seconds in done.items() if name in _LABELS),
        *(plain(_raw_label(name), "s", done[name]) for name in done if name.startswith("raw")),
        plain("distckpt, GB a second", "GB/s", [size / 1e9 / seconds for seconds in done["distckpt"]]),
        plain(f"best bare writes ({_raw_label(raw)}), GB a second", "GB/s", [size / 1e9 / each for each in done[raw]]),
        ratio("speed, compared with dcp.save", done["dcp"], done["distckpt"], least_dcp, "at least"),
        ratio("speed, compared with the best bare writes", done[raw], done["distckpt"], least_raw, "at least"),
        ratio("speed of the best bare writes, compared with dcp.save", done["dcp"], done[raw]),
    ]


def stalls(folder: Path, repetitions: int) -> list[Figure]:
    """How long training stands still for a save of 1.2 GB on two ranks; more rounds, since copies are short."""
    where = str(folder.resolve())
    measured = _measured(run_ranks(2, "saving:stall", folder, folder=where, repetitions=3 * repetitions))
    stall = {name: longest(measured, name, "stall") for name in ("distckpt", "copy", "dcp-async")}
    return [
        plain("stall: distckpt", "ms", _ms(stall["distckpt"])),
        plain("stall: copying the same bytes once", "ms", _ms(stall["copy"])),
        plain("stall: dcp.async_save, process and shared memory", "ms", _ms(stall["dcp-async"])),
        ratio("stall, compared with one copy", stall["distckpt"], stall["copy"], 1.3),
        ratio("stall, compared with dcp.async_save", stall["distckpt"], stall["dcp-async"], 1.0),
    ]


_LABELS = {
    "dcp": "dcp.save",
    "dcp-2-threads": "dcp.save, two threads a rank",
    "dcp-async": "dcp.async_save, until it is done",
    "torch.save": "torch.save and fsync, a file a rank",
}


def _raw_label(name: str) -> str:
    _, files, how = name.split("-")
    return f"bare writes, {files} file{'s' * (files != '1')}, {'O_DIRECT' if how == 'direct' else 'buffered'}"


def training(folder: Path, repetitions: int) -> list[Figure]:
    """An FSDP2 transformer of 300 parameters with AdamW, 1.2 GB, two ranks, collecting included."""
    results = run_ranks(2, "saving:save_training", folder, folder=str(folder.resolve()), repetitions=repetitions)
    measured = _measured(results)
    stall = {name: longest(measured, name, "stall") for name in ("distckpt", "copy", "dcp-async")}
    return [
        plain("stall: distckpt", "ms", _ms(stall["distckpt"])),
        plain("stall: copying the same bytes once", "ms", _ms(stall["copy"])),
        plain("stall: get_state_dict and dcp.async_save", "ms", _ms(stall["dcp-async"])),
        ratio("stall, compared with one copy", stall["distckpt"], stall["copy"], 1.5),
        plain("until durable and committed", "s", together(measured, "distckpt", "durable")),
    ]


def restores(folder: Path, repetitions: int) -> list[Figure]:
    """Restoring 1.2 GB that two ranks wrote into live tensors; files in the page cache unless it says cold."""
    files = folder / "files"
    run_ranks(2, "restoring:write", folder, folder=str(files.resolve()))
    figures = []
    for ranks, least in ((2, 3.0), (4, 2.0), (1, 2.0)):
        figures += _restores(f"2 to {ranks}", _load(folder, files, ranks, repetitions, cold=False), least)
    return figures + _restores("2 to 2, cold", _load(folder, files, 2, repetitions, cold=True), None)


def _load(folder: Path, files: Path, ranks: int, repetitions: int, cold: bool) -> Results:
    return run_ranks(
        ranks,
        "restoring:load",
        folder,
        folder=str(files.resolve()),
        repetitions=repetitions,
        cold=cold,
        torch_load=ranks == 2,
    )


def _restores(how: str, results: Results, least: float | None) -> list[Figure]:
    measured, size = _measured(results), _bytes(results)
    seconds = {name: together(measured, name, "restore") for name in measured[0]}
    read = {name: [count / size for count in in_all(measured, name, "read")] for name in ("distckpt", "dcp")}
    labels = {"distckpt": "distckpt", "dcp": "dcp.load", "torch.load": "torch.load"}
    return [
        *(plain(f"{how}: {labels[name]}", "s", each) for name, each in seconds.items()),
        ratio(f"{how}: speed, compared with dcp.load", seconds["dcp"], seconds["distckpt"], least, "at least"),
        plain(f"{how}: bytes read for each byte needed", "x", read["distckpt"], None if least is None else 1.05),
        plain(f"{how}: the same, dcp.load", "x", read["dcp"]),
    ]


def restarts(folder: Path, repetitions: int) -> list[Figure]:
    """Restoring 1.2 GB that two ranks have just saved, in new processes on the same host, as after a crash."""
    small, files, figures = folder / "small", folder / "files", []
    run_ranks(2, "restoring:write", folder, folder=str(small.resolve()), small=True)
    for ranks in (2, 4):
        seconds: dict[str, list[float]] = {"distckpt": [], "dcp": []}
        for number in range(min(repetitions, RESTARTS)):
            shutil.rmtree(files, ignore_errors=True)
            run_ranks(2, "restoring:write", folder, folder=str(files.resolve()))
            where = {"folder": str(files.resolve()), "small": str(small.resolve())}
            measured = _measured(run_ranks(ranks, "restoring:restart", folder, **where, number=number))
            for name, found in seconds.items():
                found += together(measured, name, "restore")
        how = f"2 to {ranks}, right after the save"
        figures += [
            plain(f"{how}: distckpt", "s", seconds["distckpt"]),
            plain(f"{how}: dcp.load", "s", seconds["dcp"]),
            ratio(f"{how}: speed, compared with dcp.load", seconds["dcp"], seconds["distckpt"], 3.0, "at least"),
        ]
    return figures


def landing(folder: Path, repetitions: int) -> list[Figure]:
    """From the last write of the last shard to all ranks being told; small saves, two ranks."""
    results = run_ranks(
        2, "saving:save_small", folder, folder=str(folder.resolve()), repetitions=max(SMALL_SAVES, repetitions)
    )
    landed = results[0]["landed"]
    told = [max(times) for times in zip(*(result["told"] for result in results), strict=True)]
    spans = zip(*(result["durable"] for result in results), strict=True)
    durable = [max(end for _, end in each) - min(begin for begin, _ in each) for each in spans]
    return [
        plain(
            "from the last shard's last write to result()",
            "ms",
            [(after - before) / 1e6 for before, after in zip(landed, told, strict=True)],
            50.0,
        ),
        plain(f"a whole save of {_bytes(results) / 1e6:.0f} MB", "ms", _ms(durable)),
    ]


def coordinator(folder: Path, repetitions: int) -> list[Figure]:
    """The coordinator alone: ranks with 300 tensors each, no Ray; shards are stand-ins, log and index are real."""
    found = {ranks: coordination.measure(ranks, folder, repetitions) for ranks in coordination.RANKS}
    main = found[1024]
    layouts = [name for name in planning.LAYOUTS if name != "fsdp"]
    return [
        plain("1,024 ranks: cold plan", "s", [each.cold_plan for each in main], 2.0),
        *(
            plain(
                f"1,024 ranks: planner alone, {name}",
                "s",
                coordination.plan_alone(name, 1024, folder, repetitions),
                2.0,
            )
            for name in layouts
        ),
        plain("1,024 ranks: joining a warm save", "s", [each.warm_join for each in main]),
        plain("1,024 ranks: first receipt to committed", "s", [each.commit for each in main], 2.0),
        plain("1,024 ranks: memory above baseline", "MB", [each.memory for each in main], 500.0),
        *(
            plain(f"{ranks:,} ranks: cold plan and commit", "s", [each.cold_plan + each.commit for each in figures])
            for ranks, figures in found.items()
        ),
        _growth("growth of seconds with ranks: exponent", found, lambda each: each.cold_plan + each.commit),
        _growth("growth of memory with ranks: exponent", found, lambda each: each.memory),
    ]


def resizing(folder: Path, repetitions: int) -> list[Figure]:
    """What one rank pays to restore state of its own on another number of ranks than have saved theirs."""
    found = {ranks: resized.measure(ranks, folder, repetitions) for ranks in resized.RANKS}
    figures = [
        plain(f"{ranks:,} ranks", "s", [each.match + each.fill for each in runs], 2.0 if ranks == 1024 else None)
        for ranks, runs in found.items()
    ]
    return [*figures, _growth("growth of seconds with ranks: exponent", found, lambda each: each.match + each.fill)]


def _growth(name: str, found: dict[int, list[Measured]], what: Callable[[Measured], float]) -> Figure:
    """The exponent b where the cost is as ranks to the power b; 1 is linear. Fitted to all sizes, repetition by repetition."""
    sizes = [math.log(ranks) for ranks in found]
    repetitions = zip(*found.values(), strict=True)
    samples = [statistics.linear_regression(sizes, [math.log(what(each)) for each in run]).slope for run in repetitions]
    return plain(name, "", samples, MOST_GROWTH)


def starts(folder: Path, repetitions: int) -> list[Figure]:
    """Ten steps and a save of a two-rank torchrun script; from the second start on it restores first."""
    figures = []
    for what in ("no Ray", "a cluster", "busy CPUs"):
        runs: dict[str, list[starting.Start]] = {"distckpt": [], "dcp": [], "neither": []}
        where = folder / what.replace(" ", "-")
        where.mkdir(parents=True)
        with starting.surroundings(what) as environment:
            for number in range(1 + min(repetitions, STARTS)):
                for kind, found in runs.items():
                    once = starting.start(kind, where, environment)
                    if number:  # the first one has nothing to restore
                        found.append(once)
        ours = runs["distckpt"]
        most = 1.0 if what != "busy CPUs" else None
        figures += [
            plain(f"{what}: opening and restoring, distckpt", "s", [each.ready for each in ours], most),
            plain(f"{what}: restoring, DCP", "s", [each.ready for each in runs["dcp"]]),
            *(plain(f"{what}: all of it, {kind}", "s", [each.whole for each in found]) for kind, found in runs.items()),
            plain(f"{what}: processes beside the ranks", "", [float(each.processes) for each in ours]),
            plain(f"{what}: their memory", "MiB", [each.megabytes for each in ours]),
        ]
    return figures


def keeping(folder: Path, repetitions: int) -> list[Figure]:
    """From a save of a few bytes to its commit, a look at the newest, and memory, one rank, in memory, by how many
    checkpoints the directory keeps: the most of them in pages."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="distckpt-bench-") as memory:
        measured = _measured(run_ranks(1, "keeping:commits", folder, folder=memory, repetitions=2 * repetitions))
    commit, look, memory = (
        {name: longest(measured, name, what) for name in measured[0]} for what in ("commit", "look", "memory")
    )
    few, *_, many = commit
    return [
        *(plain(f"{count} kept: a commit", "ms", _ms(seconds)) for count, seconds in commit.items()),
        ratio(f"a commit with {many} kept, compared with {few}", commit[many], commit[few], 1.5),
        *(plain(f"{count} kept: a look at the newest", "ms", _ms(seconds)) for count, seconds in look.items()),
        ratio(f"a look with {many} kept, compared with {few}", look[many], look[few], 1.5),
        *(plain(f"{count} kept: Python's memory", "MB", [held / 1e6 for held in of]) for count, of in memory.items()),
        ratio(f"memory with {many} kept, compared with {few}", memory[many], memory[few], 1.5),
    ]


def bases(folder: Path, repetitions: int) -> list[Figure]:
    """1 % of a billion parameters trained by Adam, the rest in a base that was saved once: a save of that and of all."""
    where = str((folder / "bases").resolve())
    measured = _measured(run_ranks(1, "basing:saves", folder, folder=where, repetitions=repetitions))
    figures = []
    for what, unit in (("bytes", "GB"), ("stall", "s"), ("committed", "s")):
        found = {name: longest(measured, name, what) for name in measured[0]}
        scale = 1e9 if unit == "GB" else 1.0
        figures += [plain(f"{what}, {name}", unit, [each / scale for each in of]) for name, of in found.items()]
        figures.append(ratio(f"{what}: of what is trained, compared with all", found["trained"], found["all"], 0.03))
    return figures


def exports(folder: Path, repetitions: int) -> list[Figure]:
    """1.2 GB made into the files of other programs, and the pace of that compared with a durable copy of its own files."""
    where = str((folder / "exports").resolve())
    measured = _measured(run_ranks(1, "exporting:exports", folder, folder=where, repetitions=repetitions))
    seconds = {name: longest(measured, name, "seconds") for name in measured[0]}
    copied = seconds["copy"]
    return [
        plain("a copy, synced", "s", copied),
        *(plain(kind, "s", seconds[kind]) for kind in exporting.KINDS),
        *(ratio(f"pace of {kind}", copied, seconds[kind], 0.8, "at least") for kind in exporting.KINDS),
    ]


def agreeing(folder: Path, repetitions: int) -> list[Figure]:
    """What a training step pays for a CheckpointSaverHook in which no save is due; the slower rank of each round."""
    figures = []
    for ranks in (2, 4):
        where = str((folder / f"{ranks}-ranks").resolve())
        measured = _measured(run_ranks(ranks, "agreeing:steps", folder, folder=where, repetitions=2 * repetitions))
        step = {
            name: [1e6 * seconds / agreed.STEPS for seconds in longest(measured, name, "steps")] for name in measured[0]
        }
        figures += [
            plain(f"{ranks} ranks: an all-reduce of 40 bytes by itself", "us", step["all-reduce"]),
            plain(f"{ranks} ranks: an agreement", "us", step["agreement"]),
            plain(
                f"{ranks} ranks: before_step and after_step with the hook, the agreement included", "us", step["hook"]
            ),
        ]
    return figures


def _measured(results: Results) -> list[Any]:
    return [result["measured"] for result in results]


def _bytes(results: Results) -> int:
    return sum(int(result["bytes"]) for result in results)


def _ms(seconds: Sequence[float]) -> list[float]:
    return [1000 * each for each in seconds]


def watching(folder: Path, repetitions: int) -> list[Figure]:
    """From a commit to a follower that is idle; without Ray until it has the checkpoint under a lease. On this disk."""
    figures = []
    for how, label, median, late in (
        (followers.HEARING, "knows of it", 10.0, 50.0),
        (followers.TOLD, "has it under a lease", None, None),
    ):
        seen: list[float] = []
        for number in range(min(repetitions, FOLLOWS)):
            where = str((folder / f"{how}-{number}").resolve())
            workers = run_ranks(2, "watching:in_cluster", folder, directory=where, how=how)[0]
            seen += [each for worker in workers for each in worker]
        figures += _followed(f"a worker in a Ray cluster {label}", seen, median, late)
    for how in followers.hows():
        where = str((folder / how.replace(" ", "-")).resolve())
        commits = followers.COMMITS if how == followers.TOLD else followers.FEW_COMMITS
        (seen,) = run_ranks(1, "watching:alone", folder, directory=where, how=how, commits=commits)
        most = {followers.TOLD: 20.0, followers.LOOKING: 1000 * MOST_PAUSE_OF_FILES}.get(how)
        figures += _followed(f"without Ray, {how}", seen, most)
    return figures


def _followed(how: str, milliseconds: Sequence[float], median: float | None, late: float | None = None) -> list[Figure]:
    slow = statistics.quantiles(milliseconds, n=100)[-1] if len(milliseconds) >= 100 else max(milliseconds)
    which = "99 of 100 within" if len(milliseconds) >= 100 else "all within"
    return [plain(how, "ms", milliseconds, median), Figure(f"{how}: {which}", "ms", tuple(milliseconds), slow, late)]


PARTS: dict[str, Callable[[Path, int], list[Figure]]] = {
    "saves": saves,
    "diskless": diskless,
    "stalls": stalls,
    "training": training,
    "restores": restores,
    "restarts": restarts,
    "landing": landing,
    "coordinator": coordinator,
    "starts": starts,
    "keeping": keeping,
    "resizing": resizing,
    "bases": bases,
    "exports": exports,
    "watching": watching,
    "agreeing": agreeing,
    "links": links,
    "transports": transports,
    "buckets": buckets,
    "uploads": uploads,
    "requests": requests,
    "limits": limits,
    "gpus": gpus,
}


def main() -> int:
    """Measure what was asked for, print it part by part, and write it to a file if wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write all figures and samples to this file")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_REPETITIONS} repetitions in place of {REPETITIONS}"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    repetitions = QUICK_REPETITIONS if args.quick else REPETITIONS
    FOLDER.mkdir(exist_ok=True)
    try:
        return _measure(args.only, repetitions, args.json)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


def _measure(parts: Sequence[str], repetitions: int, file: Path | None) -> int:
    about = describe_machine(FOLDER)
    print(
        "\n".join(f"{name}: {value}" for name, value in about.items()),
        f"\nrepetitions: {repetitions} after a warm-up\n",
    )
    found: dict[str, list[Figure]] = {}
    failed = False
    for part in parts:
        begin = time.monotonic()
        try:
            found[part] = PARTS[part](FOLDER / part, repetitions)
        except RankError as error:
            failed = True
            print(f"{part}: could not be measured: {error}\n", file=sys.stderr, flush=True)
        else:
            print(table(f"{part}: {PARTS[part].__doc__}", found[part]))
            print(f"({time.monotonic() - begin:.0f} s)\n", flush=True)
        shutil.rmtree(FOLDER / part, ignore_errors=True)
    _sum_up(found)
    if file is not None:
        figures = {part: [{**asdict(each), "verdict": each.verdict} for each in found[part]] for part in found}
        file.write_text(json.dumps({"machine": about, "repetitions": repetitions, "figures": figures}, indent=2) + "\n")
    return int(failed)


def _sum_up(found: dict[str, list[Figure]]) -> None:
    verdicts = [(part, figure) for part, figures in found.items() for figure in figures if figure.verdict]
    missed = [f"{part}, {figure.name}" for part, figure in verdicts if figure.verdict != "pass"]
    print(
        f"{len(verdicts) - len(missed)} of {len(verdicts)} targets met"
        + "".join(f"\n  missed: {text}" for text in missed)
    )


if __name__ == "__main__":
    sys.exit(main())
