"""What every command says of a path that is not what it wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from distckpt.cli import main
from distckpt.directory.recognize import what_is
from tests.support.checkpoints import commit_bare

COMMANDS = ("ls", "show", "stats", "verify", "adopt", "pin", "unpin", "gc", "groups", "du", "plot")
OF_DIRECTORIES = ("ls", "stats", "adopt", "gc", "groups", "plot")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, args)))


def refused(*args: str | Path) -> str:
    """What a command says that ends with status 2 and changes nothing."""
    extra = ["--json"] if args[0] == "plot" else []
    done = run(*args, *extra)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in (3, 40):
        commit_bare(tmp_path / "run-7", number)
    return tmp_path / "run-7"


def _torch(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path)


def _old_torch(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


def _safetensors(path: Path) -> None:
    save_file({"a": torch.ones(3)}, path)


def _dcp(path: Path) -> None:
    path.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (path / name).write_bytes(b"x")


def _weights(path: Path) -> None:
    path.mkdir()
    _torch(path / "pytorch_model.bin")


def _model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    _safetensors(path / "model.safetensors")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "model.pt": (_torch, "a file that torch.save wrote, and no checkpoint of distckpt"),
    "old.pt": (_old_torch, "a file that torch.save wrote, in its old format"),
    "last.ckpt": (lambda path: torch.save({"pytorch-lightning_version": "2.5"}, path), "a Lightning checkpoint"),
    "m.safetensors": (_safetensors, "a safetensors file"),
    "a.npz": (lambda path: np.savez(path, np.ones(3)), "a NumPy archive"),
    "notes.txt": (lambda path: path.write_text("hello"), "it is a file, and"),
    "nothing": (lambda path: path.write_text(""), "an empty file"),
    "dcp": (_dcp, "a checkpoint of torch.distributed.checkpoint, and none of distckpt"),
    "model": (_model, "a folder of safetensors"),
    "dcp to import": (_dcp, "none of distckpt, which `distckpt import` makes one of"),
    "weights": (_weights, "as torch.save writes them, and none of distckpt, which `distckpt import` makes one of"),
    "empty": (Path.mkdir, "the folder is empty"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_have_written_is_named_as_what_it_is(directory: Path, name: str) -> None:
    make, what = FOREIGN[name]
    make(directory.parent / name)
    assert what in refused("show", directory.parent / name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_a_typo_from_a_foreign_file(directory: Path, command: str) -> None:
    _torch(directory.parent / "model.pt")
    assert "a file that torch.save wrote" in refused(command, directory.parent / "model.pt")
    assert f"there is nothing. Was {directory} meant?" in refused(command, directory.parent / "rum-7")
    assert f"The nearest is {directory}/ckpt-40" in refused(command, directory / "ckpt-41")
    assert f"Was {directory}/ckpt-3 meant?" in refused(command, directory.parent / "run-8" / "ckpt-3")
    assert f"Was {directory}/ckpt-3 meant?" in refused(command, directory / "ckp-3")


@pytest.mark.parametrize("command", OF_DIRECTORIES)
def test_a_checkpoint_for_a_directory_is_told(directory: Path, command: str) -> None:
    assert f"a checkpoint of the run {directory}" in refused(command, directory / "ckpt-3")


def test_what_is_no_matter_of_the_path_is_not_explained_by_it(directory: Path) -> None:
    assert refused("cp", directory, directory.parent / "copy", "--since", "999").endswith(
        "no checkpoint here is that new\n"
    )


def test_the_inside_of_a_checkpoint_and_what_is_above_runs_are_told(directory: Path) -> None:
    [inside] = (directory / "ckpt-3").iterdir()
    assert f"the inside of a checkpoint: give {directory}/ckpt-3" in refused("show", inside)
    assert f"no run has saved here, but below it: {directory}" in refused("ls", directory.parent)


def test_a_checkpoint_that_was_copied_here_is_no_typo(directory: Path, tmp_path: Path) -> None:
    commit_bare(tmp_path / "other", 5)
    (tmp_path / "other" / "ckpt-5").rename(directory / "ckpt-5")
    for command in ("show", "verify", "ls", "gc"):
        said = refused(command, directory / "ckpt-5")
        assert said.count(f"`distckpt adopt {directory}`") == 1
        assert "nearest" not in said
        assert "without its run's directory" not in said
    (directory / "ckpt-40").rename(directory / "ckpt-41")
    for command in ("show", "ls"):
        assert f"does not know it by that name: `distckpt adopt {directory}`" in refused(command, directory / "ckpt-41")


def test_where_nobody_can_tell_nothing_is_said_or_raised(tmp_path: Path) -> None:
    assert what_is("nosuch://bucket/run") == ""
    assert what_is(tmp_path, {"no_such_option": 1}) == ""
