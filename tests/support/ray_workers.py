"""Workers of the shared Ray cluster, forked from a process that has imported nearly all that they need.

By itself each imports Ray twice and ours once, which takes two seconds of a core; and every coordinator is a worker.
``python -m tests.support.ray_workers PATH`` serves requests of ``ray_worker.py`` that come to the socket ``PATH``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.support.warm import ROOT, be_script

ADDRESS = "DISTCKPT_TEST_WORKERS"
START = str(Path(__file__).with_name("ray_worker.py"))
NEEDED = (
    *("ray._private.workers.setup_worker", "ray._private.runtime_env.setup_hook", "distckpt.coordinator.ray.actor"),
    *("torch.export", "distckpt.export.task"),
)
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


@contextlib.contextmanager
def ray_workers(folder: Path) -> Iterator[None]:
    """Nodes of a cluster that is made in the block, with ``START`` as their ``setup_worker_path``, fork their workers."""
    path = str(folder / "ray-workers")
    command = [sys.executable, "-m", "tests.support.ray_workers", path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline(), "the process that forks workers has failed"
    os.environ[ADDRESS] = path
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        process.kill()
        process.communicate()


def _serve(listening: socket.socket) -> None:
    for name in _slow_to_import():
        with contextlib.suppress(ImportError):  # known by another name
            importlib.import_module(name)
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all of this process's memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    print("listening", flush=True)
    while True:
        asking, _ = listening.accept()
        with asking:
            head, files, _, _ = socket.recv_fds(asking, 8, 3)
            told = asking.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
            assert threading.active_count() == 1
            if os.fork() == 0:
                listening.close()
                asking.close()
                _live(told.decode(), files)
            for file in files:
                os.close(file)
            asking.sendall(b".")


def _slow_to_import() -> list[str]:
    """What a worker needs but Ray itself, which reads the environment of each worker when it is loaded."""
    program = (
        f"import sys, {', '.join(NEEDED)}; print(*(n for n, m in sys.modules.items() if getattr(m, '__file__', 0)))"
    )
    names = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    ours = ("ray.", "ray._", "distckpt.coordinator.ray.")
    return [name for name in names if not f"{name}.".startswith(ours) and name != "__main__"]


def _live(told: str, files: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    count, *words = told.split("\0")
    arguments, variables = words[: int(count) - 1], words[int(count) - 1 :]
    os.environ.clear()
    os.environ.update(dict(variable.split("=", 1) for variable in variables))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    try:
        _be_worker(arguments)
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001 - as the interpreter does it; the code of the parent must not go on here
        traceback.print_exc()
        raise SystemExit(1) from None
    raise SystemExit(0)


def _be_worker(arguments: list[str]) -> None:
    """What ``setup_worker.py`` does, without a second interpreter where the worker needs none of its own."""
    context = next((word.removeprefix(CONTEXT) for word in arguments if word.startswith(CONTEXT)), "{}")
    ours = json.loads(context)
    from ray._private.utils import update_envs
    from ray._private.workers import setup_worker

    if any(value for name, value in ours.items() if name not in ("env_vars", "py_executable")):
        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *arguments])
    update_envs(ours.get("env_vars") or {})
    script, *rest = [word for word in arguments if not word.startswith((CONTEXT, LANGUAGE))]
    be_script([script, *rest])


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
        found.bind(sys.argv[1])
        found.listen(64)
        _serve(found)
