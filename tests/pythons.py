"""Finds the Pythons of this machine that we run on, and runs tests on each, with the newest versions of everything.

``python tests/pythons.py`` followed by arguments of pytest makes an environment for each, in ``.venv-pythons``,
and exits with 1 if a test failed on any; ``--oldest`` prints the command of the oldest one, and nothing else. Which are
not there is said, by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13")

ROOT = Path(__file__).parents[1]
PYENV = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")


def candidates(version: str) -> Iterator[str]:
    """Commands that may start that Python: on the path, and of pyenv, whose command on the path may refuse to start."""
    found = shutil.which(f"python{version}")
    if found is not None:
        yield found
    yield from sorted(map(str, PYENV.glob(f"versions/{version}.*/bin/python{version}")), reverse=True)


def starts(command: str, version: str) -> bool:
    """Whether it is that Python, with what an environment needs (Debian has it in a package of its own)."""
    looking = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([command, "-c", looking], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == version


def find(version: str) -> str | None:
    """The command that starts that Python, None if there is none."""
    return next((command for command in candidates(version) if starts(command, version)), None)


def environment(version: str, command: str) -> Path:
    """The Python of an environment with the newest versions, made anew if what is declared has changed."""
    folder = ROOT / ".venv-pythons" / version
    python, ready = folder / "bin/python", folder / ".ready"
    declared = command + "".join((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    if not ready.exists() or ready.read_text() != declared:
        subprocess.run([command, "-m", "venv", "--clear", str(folder)], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", "constraints.txt", "-e", ".[test]"], cwd=ROOT, check=True)
        ready.write_text(declared)
    return python


def play(version: str, arguments: Sequence[str]) -> str:
    """What became of the tests on that Python."""
    command = find(version)
    if command is None:
        return "not on this machine"
    print(f"Python {version}: {command}", flush=True)
    try:
        python = environment(version, command)
    except subprocess.CalledProcessError as error:
        return f"FAILED: {error}"
    done = subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT, check=False)
    return "passed" if done.returncode == 0 else f"FAILED: pytest ended with {done.returncode}"


def main(arguments: Sequence[str]) -> str | None:
    """What went wrong, None if nothing did."""
    if arguments == ["--oldest"]:
        oldest = next(filter(None, map(find, VERSIONS)), None)
        if oldest is not None:
            print(oldest)
        return None if oldest else f"none of Python {', '.join(VERSIONS)} is on this machine"
    outcomes = {version: play(version, arguments) for version in VERSIONS}
    for version, outcome in outcomes.items():
        print(f"Python {version}: {outcome}")
    failed = [version for version, outcome in outcomes.items() if outcome.startswith("FAILED")]
    if failed or "passed" not in outcomes.values():
        return f"not shown to work on Python {', '.join(failed or VERSIONS)}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
