"""What these figures were measured on, as far as it matters to them: no name of a host, no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "ray", "pyarrow", "numpy", "distckpt")


def describe_machine(folder: Path) -> dict[str, str]:
    """Versions, processors, memory, and the disk that ``folder`` is on."""
    return {
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "processors": f"{len(os.sched_getaffinity(0))} x {_processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "disk": _disk(folder),
        "kernel": platform.release().partition("-")[0],
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _versions() -> list[str]:
    return [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _disk(folder: Path) -> str:
    """The file system, and whether the device below it turns."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = [parts[parts.index("-") + 1] for parts in mounts if parts[2] == number]
    block = Path("/sys/dev/block") / number
    queues = [path for path in (block / "queue", block / ".." / "queue") if path.exists()]
    turns = (queues[0] / "rotational").read_text().strip() if queues else ""
    device_name = os.path.basename(os.path.realpath(block)) if queues else ""
    kind = (
        "virtual disk"
        if device_name.startswith(("vd", "xvd"))
        else {"0": "solid state", "1": "rotating"}.get(turns, "")
    )
    return ", ".join(filter(None, (kinds[0] if kinds else "unknown file system", kind)))
