"""``distckpt watch`` and ``distckpt groups``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli.app import main
from distckpt.directory.groups import read_groups
from distckpt.format import names
from distckpt.format.json.group import MAX_TEXT, GroupState
from distckpt.storage import open_store
from tests.support.checkpoints import append_state, commit_bare, write_checkpoint
from tests.support.exports import exported
from tests.support.warm import ROOT

SCRIPT = "import sys; print(sys.argv[1:]); print('why', file=sys.stderr); sys.exit(sys.argv[2] == '2')"


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(main, [str(argument) for argument in arguments])


def state_of(directory: Path) -> GroupState:
    return read_groups(open_store(directory))["eval"]


def watch(directory: Path, *command: object, group: str = "eval") -> Result:
    """Until there is nothing more."""
    options = ["--group", group, "--mode", "all", "--timeout", 0, "--backoff", 0, "--max-attempts", 2]
    return run("watch", directory, *options, "--", *command)


def failed(directory: Path) -> None:
    """Of three checkpoints the second was given up on."""
    for number in (1, 2, 3):
        commit_bare(directory, number)
    assert watch(directory, sys.executable, "-c", SCRIPT, "{path}", "{number}").exit_code == 0


def test_how_a_command_ends_is_the_acknowledgement(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failed(tmp_path)
    state = state_of(tmp_path)
    assert (state.acknowledged, state.claims, state.returned) == (2, (), ())
    [aside] = state.set_aside
    assert (aside.number, aside.failures, aside.error) == (2, 2, "exit status 1\nwhy")
    said = capfd.readouterr()
    assert said.out.splitlines()[0] == f"['{tmp_path}/ckpt-1', '1']"
    assert said.err.count("why") == 4


def test_a_command_that_fails_because_its_checkpoint_was_deleted_is_not_blamed(tmp_path: Path) -> None:
    """As is one whose worker hears that its lease is gone while the command still runs."""
    commit_bare(tmp_path, 1)
    loses = f"""if True:
        import os, sys, time
        os.chdir({str(tmp_path)!r})
        while not os.path.isfile('_leases'):  # a renewal may make the folder once more
            try:
                os.rename('_leases', f'gone-{{time.time_ns()}}')
                open('_leases', 'x').close()
            except OSError:
                pass
        time.sleep(1)
        sys.exit(1)
    """
    options = ["--group", "eval", "--timeout", 0, "--backoff", 3600, "--lease", 0.5]
    said = run("watch", tmp_path, *options, "--", sys.executable, "-c", loses)
    assert (said.exit_code, "ckpt-1, delivery 1: released" in said.stderr) == (0, True), said.stderr
    [returned] = state_of(tmp_path).returned
    assert (returned.failures, returned.error) == (0, "")


def test_a_command_that_cannot_be_started_ends_its_worker_and_blames_no_checkpoint(tmp_path: Path) -> None:
    """A typo on one host does not set aside, one after the other, what all others wait for."""
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    result = watch(tmp_path, "/no/such/program")
    assert (result.exit_code, result.stderr.count("rejected")) == (2, 0)
    assert "the command cannot be started: [Errno 2] No such file or directory: '/no/such/program'" in result.stderr
    assert [(back.number, back.failures) for back in state_of(tmp_path).returned] == [(1, 0)]


def test_a_command_may_have_the_weights_as_safetensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    write_checkpoint(tmp_path, 1, {"model": {"weight": torch.ones(3)}}, ranks=3)
    script = "import sys, safetensors.torch as s; print(s.load_file(sys.argv[1] + '/model.safetensors'))"
    options = ["--group", "eval", "--timeout", 0, "--safetensors", "model"]
    assert run("watch", tmp_path, *options, "--", sys.executable, "-c", script, "{path}").exit_code == 0
    assert "{'weight': tensor([1., 1., 1.])}" in capfd.readouterr().out
    assert state_of(tmp_path).acknowledged == 1
    next(distckpt.watch(tmp_path, group="other", worker="bob", timeout=0))
    assert "groups that follow: other: at bob" in run("show", tmp_path).stdout


def test_a_command_may_have_what_was_exported_and_waits_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = exported(open_store(tmp_path), 1)
    commit_bare(tmp_path, 2)
    options = ["--group", "eval", "--mode", "all", "--timeout", 0, "--max-attempts", 1, "--export", 0.5]
    said = run("watch", tmp_path, *options, "--", sys.executable, "-c", "import sys; print(sys.argv[1])", "{path}")
    assert (said.exit_code, capfd.readouterr().out) == (0, f"{path}\n")
    assert "ckpt-2: nothing was exported from it within 0.5 s" in said.stderr
    assert [aside.number for aside in state_of(tmp_path).set_aside] == [2]
    assert run("watch", tmp_path, *options, "--safetensors", "model", "--", "true").exit_code == 2


def started(directory: Path, script: str, *options: object, under: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A worker in a process of its own, that runs this script of Python for each checkpoint."""
    worker = [*under, sys.executable, "-m", "distckpt.cli", "watch", directory, "--group", "eval", *map(str, options)]
    return subprocess.Popen(
        [*worker, "--", sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "idle"])
def test_a_signal_goes_on_to_the_command_and_its_checkpoint_to_others(
    number: signal.Signals, at_work: bool, tmp_path: Path
) -> None:
    if at_work:
        commit_bare(tmp_path, 1)
    script = f"""
import os, signal, sys, time
signal.signal({number.value}, lambda *_: print("told", flush=True) or os._exit(0))
print("begun", flush=True)
time.sleep(60)
"""
    with started(tmp_path, script) as worker:
        assert worker.stdout is not None
        assert worker.stderr is not None
        if at_work:
            assert worker.stdout.readline() == "begun\n"
        else:
            assert worker.stderr.readline().startswith(f"waiting for checkpoints in {tmp_path}")
        worker.send_signal(number)
        out, err = worker.communicate(timeout=40)
    assert worker.returncode == 128 + number
    if at_work:
        assert (out, f"released, since this worker was stopped by signal {number.value}" in err) == ("told\n", True)
        [back] = state_of(tmp_path).returned
        assert (back.number, back.failures, back.deliveries) == (1, 0, 1)


def test_a_terminal_that_is_gone_does_not_matter_under_nohup(tmp_path: Path) -> None:
    with started(tmp_path, "", under=["nohup"]) as worker:
        assert worker.stderr is not None
        while not worker.stderr.readline().startswith("waiting for checkpoints in"):
            assert worker.poll() is None
        worker.send_signal(signal.SIGHUP)
        commit_bare(tmp_path, 1)
        assert "ckpt-1, delivery 1: acknowledged" in worker.stderr.readline()
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=40)
    assert worker.returncode == 128 + signal.SIGTERM


def test_a_progress_bar_is_seen_as_it_grows_and_only_its_end_is_kept(tmp_path: Path) -> None:
    """It ends no line; and waits here, until it has been seen, for what could not come if it had not."""
    commit_bare(tmp_path, 1)
    script = f"""
import os, sys, time
for done in range(400):
    sys.stderr.write("\\r%d/400" % done)
sys.stderr.flush()
while not os.path.exists({str(tmp_path / "seen")!r}):
    time.sleep(0.01)
sys.stderr.write("\\r        \\rno such model\\r\\ngave up\\n\\r399/400\\r")
sys.exit(3)
"""
    with started(tmp_path, script, "--timeout", 0, "--max-attempts", 1) as worker:
        assert worker.stderr is not None
        seen = worker.stderr.readline()
        while not seen.endswith("399/400"):
            letter = worker.stderr.read(1)
            assert letter, seen
            seen += letter
        (tmp_path / "seen").touch()
        worker.communicate(timeout=40)
    [aside] = state_of(tmp_path).set_aside
    assert aside.error == "exit status 3\nno such model\ngave up\n399/400"


@pytest.mark.parametrize(("width", "kept"), [(20, 20), (100, 9), (2000, 1)])
def test_an_error_that_has_no_room_loses_its_first_lines_and_not_the_status(
    width: int, kept: int, tmp_path: Path
) -> None:
    commit_bare(tmp_path, 1)
    script = f"import sys; [print(str(line).rjust({width}, '.'), file=sys.stderr) for line in range(40)]; sys.exit(3)"
    assert watch(tmp_path, sys.executable, "-c", script).exit_code == 0
    [aside] = state_of(tmp_path).set_aside
    status, *lines = aside.error.splitlines()
    assert (status, [line.lstrip(".") for line in lines]) == ("exit status 3", [f"{n}" for n in range(40 - kept, 40)])
    assert {len(line) for line in lines} == {min(width, MAX_TEXT - len("exit status 3\n"))}


def test_a_key_that_the_checkpoint_does_not_have_ends_the_worker_and_blames_no_checkpoint(tmp_path: Path) -> None:
    import torch

    write_checkpoint(tmp_path, 1, {"model": {"weight": torch.ones(3)}, "optim": {"lr": 0.1}})
    said = run("watch", tmp_path, "--group", "eval", "--timeout", 0, "--safetensors", "modle", "--", "true")
    assert said.exit_code == 2
    assert "--safetensors modle: " in said.stderr
    assert "ckpt-1 holds nothing below that key; it has: model, optim" in said.stderr
    assert [(back.number, back.failures) for back in state_of(tmp_path).returned] == [(1, 0)]


def test_a_path_is_filled_in_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commit_bare(tmp_path / "run-{number}", 1)
    assert watch(tmp_path / "run-{number}", "echo", "{path}:{number}:{other}").exit_code == 0
    assert capfd.readouterr().out == f"{tmp_path}/run-{{number}}/ckpt-1:1:{{other}}\n"


def test_who_has_mistyped_the_path_is_told_that_there_is_nothing(tmp_path: Path) -> None:
    commit_bare(tmp_path / "run", 1)
    said = watch(tmp_path / "rum", "true").stderr.splitlines()
    assert said[0] == f"waiting for checkpoints in {tmp_path}/rum: nothing has been saved there yet"
    assert watch(tmp_path / "run", "true").stderr.splitlines()[0] == f"waiting for checkpoints in {tmp_path}/run"


def test_groups_are_shown_to_people_and_programs(tmp_path: Path) -> None:
    failed(tmp_path)
    commit_bare(tmp_path, 4)
    commit_bare(tmp_path, 5)
    checkpoints = distckpt.watch(tmp_path, group="eval", worker="alice", timeout=0)
    next(checkpoints)
    shown = run("groups", tmp_path)
    assert shown.exit_code == 0
    words = " ".join(shown.stdout.split())
    assert "eval all 2 1 1 0 1 0 0 ckpt-3" in words
    assert "ckpt-4 eval at alice 1" in words
    assert "exit status 1" in words
    [group] = json.loads(run("groups", tmp_path, "--json").stdout)["groups"]
    assert json.loads(run("groups", "--json", tmp_path).stdout)["groups"] == [group]
    facts: dict[str, Any] = {"group": "eval", "unseen": 1, "acknowledged": 2, "mode": "all", "skipped": 0}
    assert {name: group[name] for name in facts} == facts
    assert [(claim["number"], claim["worker"], claim["has_lease"]) for claim in group["claims"]] == [(4, "alice", True)]
    listed = run("ls", tmp_path).stdout
    assert "eval: at alice" in listed
    assert listed.count("eval: waiting") == listed.count("eval: set aside") == 1
    [*_, last] = json.loads(run("ls", tmp_path, "--json").stdout)["checkpoints"]
    assert (last["number"], last["groups"]) == (5, ["eval: waiting"])
    checkpoints.close()


def test_what_was_set_aside_can_be_put_back(tmp_path: Path) -> None:
    failed(tmp_path)
    assert run("groups", "retry", tmp_path, "eval", 2).stdout == "ckpt-2 will be tried again\n"
    assert watch(tmp_path, sys.executable, "-c", "").exit_code == 0
    assert (state_of(tmp_path).acknowledged, state_of(tmp_path).set_aside) == (3, ())
    for arguments, reason in (
        ((tmp_path, "eval", 2), "has not set aside 2"),
        ((tmp_path, "other", 2), "no group 'other'"),
        ((tmp_path, "../eval", 2), "no name for a group"),
    ):
        result = run("groups", "retry", *arguments)
        assert (result.exit_code, reason in result.stderr) == (2, True)


def test_what_was_set_aside_since_nobody_survived_it_can_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.directory.sharing.MAX_DELIVERIES", 2)
    commit_bare(tmp_path, 1)
    dying = [distckpt.watch(tmp_path, group="eval", mode="all", max_attempts=2, timeout=0) for _ in range(2)]
    for worker in dying:
        next(worker)
        for lease in (tmp_path / names.LEASES).iterdir():
            lease.unlink()
    assert watch(tmp_path, "false").exit_code == 0
    assert len(state_of(tmp_path).set_aside) == 1
    assert run("groups", "retry", tmp_path, "eval", 1).exit_code == 0
    assert watch(tmp_path, sys.executable, "-c", "").exit_code == 0
    assert (state_of(tmp_path).acknowledged, state_of(tmp_path).set_aside) == (1, ())


def test_of_a_number_that_was_saved_again_the_attempt_that_is_there_is_put_back(tmp_path: Path) -> None:
    failing: dict[str, Any] = {"group": "eval", "mode": "all", "max_attempts": 1, "timeout": 0}
    commit_bare(tmp_path, 1)
    next(distckpt.watch(tmp_path, **failing)).reject("bad")
    append_state(
        open_store(tmp_path),
        lambda state: msgspec.structs.replace(state, active=(), retiring=state.active),
        kind="retire",
    )
    commit_bare(tmp_path, 1)
    next(distckpt.watch(tmp_path, **failing)).reject("bad again")
    gone, there = state_of(tmp_path).set_aside
    assert run("groups", "retry", tmp_path, "eval", 1).stdout == "ckpt-1 will be tried again\n"
    state = state_of(tmp_path)
    assert ([gone], [there.attempt]) == (list(state.set_aside), [back.attempt for back in state.returned])
    result = run("groups", "retry", tmp_path, "eval", 1)
    assert (result.exit_code, "retention has deleted it" in result.stderr) == (2, True)


def test_what_was_deleted_cannot_be_put_back(tmp_path: Path) -> None:
    failed(tmp_path)
    append_state(
        open_store(tmp_path),
        lambda state: msgspec.structs.replace(state, active=state.active[2:], retiring=state.active[:2]),
        kind="retire",
    )
    result = run("groups", "retry", tmp_path, "eval", 2)
    assert (result.exit_code, "retention has deleted it" in result.stderr) == (2, True)


def test_a_directory_without_groups_says_so_and_wrong_usage_is_one_sentence(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    assert "no group follows this directory" in run("groups", tmp_path).stdout
    assert watch(tmp_path, "true").exit_code == 0
    result = run("watch", tmp_path, "--group", "eval", "--mode", "latest", "--", "true")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "mode is 'all' and not 'latest'" in result.stderr
    assert run("watch", tmp_path, "--group", "eval").exit_code == 2
    assert run("groups").exit_code == 2
