"""Frozen parameters that come from another checkpoint: read from there, named by it, compared, and never written again."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn, optim

import distckpt
from distckpt.cli.app import main
from distckpt.errors import CheckpointNotFoundError, DamagedError, EncodeError, NoGoodCheckpointError, RestoreError
from distckpt.format.names import is_tag
from distckpt.rank.reference import reference_name
from tests.support.comparing import same
from tests.support.damage import flip, payload_of
from tests.support.gang import Gang


class Tuned:
    """A model of which the first layer is frozen and comes from elsewhere."""

    def __init__(self, base: str | None, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(40, 200), nn.Linear(200, 2))
        self.model[0].requires_grad_(False)
        self.optimizer = optim.Adam((each for each in self.model.parameters() if each.requires_grad), lr=0.1)
        self.checkpoint = distckpt.Checkpoint(
            model=self.model, optimizer=self.optimizer, only_trainable="model", frozen_from=base
        )

    def step(self) -> None:
        self.model(torch.rand(5, 40)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return made(tmp_path / "base", seed=7)


def made(directory: Path, seed: int) -> str:
    return distckpt.Checkpoint(model=Tuned(None, seed).model).save(directory)


def run(directory: Path, base: str | None, number: int, seed: int) -> dict[str, torch.Tensor]:
    """Begin or go on, train, save; what is in the model then."""
    tuned = Tuned(base, seed)
    with distckpt.CheckpointManager(tuned.checkpoint, directory) as manager:
        manager.restore_or_initialize()
        tuned.step()
        manager.save(number).result(30)
    return tuned.state()


def test_a_run_begins_with_what_is_frozen_in_the_base_and_goes_on_with_it(base: str, tmp_path: Path) -> None:
    before = run(tmp_path / "run", base, 1, seed=1)
    assert torch.equal(before["0.weight"], Tuned(None, 7).state()["0.weight"])
    again = Tuned(base, seed=2)
    with distckpt.CheckpointManager(again.checkpoint, tmp_path / "run") as manager:
        manager.restore()
        assert manager.restore_status is not None
        assert manager.restore_status.is_complete
    assert same(again.state(), before)
    alone = Tuned(base, seed=3)
    assert alone.checkpoint.restore(tmp_path / "run").is_complete
    assert same(alone.state(), before)


def test_nothing_of_the_base_is_written_and_the_checkpoint_names_it(base: str, tmp_path: Path) -> None:
    run(tmp_path / "run", base, 1, seed=1)
    run(tmp_path / "run", base, 2, seed=2)
    for number in (1, 2):
        with distckpt.open(tmp_path / f"run/ckpt-{number}") as reader:
            keys = reader.keys()
            assert not [key for key in keys if key.startswith("model.0")]
            assert reader.manifest.left_out is not None
            assert reader.manifest.left_out.base is not None
            assert reader.manifest.left_out.base.path == f"{base}/saved-1"
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "run")], catch_exceptions=False).output
    assert f"which {base}/saved-1 has" in shown


def test_a_copy_of_the_base_is_the_base(base: str, tmp_path: Path) -> None:
    before = run(tmp_path / "run", base, 1, seed=1)
    assert "Frozen parameters" not in output_of("cp", base, tmp_path / "copy")
    again = Tuned(str(tmp_path / "copy"), seed=2)
    again.checkpoint.restore(tmp_path / "run")
    assert same(again.state(), before)


def output_of(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_who_copies_or_checks_what_refers_to_a_base_is_told_of_it_once(base: str, tmp_path: Path) -> None:
    told = f"{base}/saved-1"
    for number in (1, 2):
        run(tmp_path / "run", base, number, seed=number)
    said = output_of("cp", tmp_path / "run", tmp_path / "copy")
    assert said.count(f"Frozen parameters come from {told}, which is not copied with them: copy it too") == 1
    again = json.loads(output_of("cp", tmp_path / "run", tmp_path / "again", "--json"))
    assert {one["base"] for one in again["checkpoints"]} == {told}
    assert output_of("verify", tmp_path / "copy").count(f"come from {told}, which is not looked at here") == 1
    assert {one["base"] for one in json.loads(output_of("verify", tmp_path / "copy", "--json"))} == {told}


def test_another_base_is_refused_before_anything_is_changed(base: str, tmp_path: Path) -> None:
    run(tmp_path / "run", base, 1, seed=1)
    other = Tuned(made(tmp_path / "other", seed=8), seed=2)
    before = other.state()
    with distckpt.CheckpointManager(other.checkpoint, tmp_path / "run") as manager:
        with pytest.raises(RestoreError, match="was saved beside the frozen parameters of") as caught:
            manager.restore_or_initialize()
        assert base in str(caught.value)
    with pytest.raises(RestoreError, match="was saved beside"):
        other.checkpoint.restore(tmp_path / "run")
    assert same(other.state(), before)


def test_who_restores_the_base_itself_has_its_frozen_parameters_from_there(base: str, tmp_path: Path) -> None:
    """As whoever begins without a manager does; nothing of it is taken for what nobody else has."""
    tuned, there = Tuned(base, seed=1), f"{base}/saved-1"
    status = tuned.checkpoint.restore(base)
    assert not status.unexpected
    assert status.matched == 4
    path = tuned.checkpoint.write(tmp_path / "tuned")
    with distckpt.open(path) as reader:
        assert reader.manifest.base_path == there
        assert not [key for key in reader.keys() if key.startswith("model.0.")]  # noqa: SIM118 - it is no dict
    again = Tuned(base, seed=2)
    assert again.checkpoint.restore(path).is_complete
    assert same(again.state(), tuned.state())


def test_without_a_base_what_is_frozen_stays_and_that_is_told(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "run", base, 1, seed=1)
    other = Tuned(None, seed=2)
    before = other.state()
    with caplog.at_level(logging.WARNING):
        other.checkpoint.restore(tmp_path / "run")
    assert torch.equal(other.state()["0.weight"], before["0.weight"])
    assert any(f"beside the frozen parameters of {base}" in record.message for record in caplog.records)


def test_a_save_of_what_was_never_read_from_the_base_is_refused(base: str, tmp_path: Path) -> None:
    tuned = Tuned(base, seed=1)
    with distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager:
        with pytest.raises(EncodeError, match=r"model\.0\.bias.*restore_or_initialize"):
            manager.save(1)
        manager.restore_or_initialize()
        manager.save(1).result(30)
    other = Tuned(base, seed=2)
    with distckpt.CheckpointManager(other.checkpoint, tmp_path / "other") as manager:
        manager.restore_or_initialize()
        other.model[1].bias.requires_grad_(False)  # which was not when it could have been read
        with pytest.raises(EncodeError, match=r"model\.1\.bias.*restore_or_initialize"):
            manager.save(1)


def test_a_base_that_lacks_something_is_not_there_or_is_damaged_is_named(base: str, tmp_path: Path) -> None:
    lacking = distckpt.Checkpoint(other=Tuned(None).model).save(tmp_path / "lacking")
    with (
        pytest.raises(RestoreError, match=r"lacking-1/saved-1 lacks .*model\.0"),
        distckpt.CheckpointManager(Tuned(lacking).checkpoint, tmp_path / "run") as manager,
    ):
        manager.restore_or_initialize()
    with (
        pytest.raises(CheckpointNotFoundError, match="nowhere"),
        distckpt.CheckpointManager(Tuned(str(tmp_path / "nowhere")).checkpoint, tmp_path / "run") as manager,
    ):
        manager.restore_or_initialize()
    run(tmp_path / "run", base, 1, seed=1)
    file, end = payload_of(Path(base), "model.0.weight")
    flip(file, end - 1)
    tuned = Tuned(base, seed=2)
    with (
        pytest.raises(NoGoodCheckpointError, match=r"model\.0\.weight"),
        distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager,
    ):
        manager.restore_or_initialize()
    with pytest.raises(DamagedError, match=r"model\.0\.weight"):
        Tuned(base).checkpoint.restore(tmp_path / "run")


def test_what_is_trained_after_all_is_saved_and_comes_back_from_the_checkpoint(base: str, tmp_path: Path) -> None:
    tuned = Tuned(base, seed=1)
    with distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager:
        manager.restore_or_initialize()
        manager.save(1).result(30)
        tuned.model[0].requires_grad_(True)
        tuned.optimizer.add_param_group({"params": list(tuned.model[0].parameters())})
        tuned.step()
        manager.save(2).result(30)
        tuned.model[0].requires_grad_(False)
        manager.save(3).result(30)
    again = Tuned(base, seed=2)
    again.optimizer.add_param_group({"params": list(again.model[0].parameters())})
    with distckpt.CheckpointManager(again.checkpoint, tmp_path / "run") as manager:
        manager.restore()
    assert same(again.state(), tuned.state())


def test_a_part_is_restored_without_the_base(base: str, tmp_path: Path) -> None:
    run(tmp_path / "run", base, 1, seed=1)
    other = Tuned(base, seed=2)
    before = other.state()
    with distckpt.CheckpointManager(other.checkpoint, tmp_path / "other") as manager:
        other.checkpoint.restore(tmp_path / "run", select="model.1")
        assert torch.equal(other.state()["0.weight"], before["0.weight"])
        with pytest.raises(EncodeError, match="restore_or_initialize"):
            manager.save(1)


@pytest.mark.parametrize("wrong", [{"frozen_from": "/a"}, {"frozen_from": "/a", "only_trainable": False}])
def test_a_base_without_anything_left_out_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only_trainable"):
        distckpt.Checkpoint(model=nn.Linear(1, 1), **wrong)


@pytest.mark.ray
def test_two_ranks_read_their_shards_of_the_base_and_one_goes_on_from_theirs(gang2: Gang, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first, other = gang2.run("ranks.less:tune_from_base", base=str(tmp_path / "base"), directory=str(directory))
    assert first["state"] == other["state"]
    assert first["left_out"] == other["left_out"] == f"{tmp_path}/base-1/saved-1"
    tuned = Tuned(f"{tmp_path}/base-1", seed=5)
    tuned.checkpoint.restore(directory)
    assert {name: value.tolist() for name, value in tuned.state().items()} == first["state"]


def test_what_was_trained_is_read_also_when_the_base_is_gone(base: str, tmp_path: Path) -> None:
    after = run(tmp_path / "run", base, 1, seed=1)
    shutil.rmtree(base)
    assert same(distckpt.load(tmp_path / "run", "model"), {key: after[key] for key in ("1.weight", "1.bias")})


def test_retention_keeps_what_checkpoints_refer_to_until_nobody_does(tmp_path: Path) -> None:
    model = Tuned(None, 7).model
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), tmp_path / "bases", max_to_keep=1) as bases:
        base = bases.save(1).result(30)
        frozen = run(tmp_path / "run", base, 1, seed=1)
        bases.save(2).result(30)
        bases.save(3).result(30)
        assert run(tmp_path / "run", base, 2, seed=2)["0.weight"].equal(frozen["0.weight"])
        listed = CliRunner().invoke(main, ["ls", str(tmp_path / "bases"), "--json"]).output
        (name,) = set(re.findall(r"base-of-run\.[0-9a-f]{8}", listed))
        assert Tuned(f"{tmp_path}/bases/{name}", seed=3).checkpoint.restore(tmp_path / "run").is_complete
        assert CliRunner().invoke(main, ["untag", f"{tmp_path}/bases/{name}"]).exit_code == 0
        bases.save(4).result(30)
        bases.save(5).result(30)
    with pytest.raises(CheckpointNotFoundError):
        Tuned(base, seed=4).checkpoint.restore(tmp_path / "run")


@pytest.mark.parametrize("name", ["run", "run-7", "7", ".hidden", "with spaces/and \u00fc", "x" * 300, ""])
def test_whatever_a_directory_is_called_its_base_can_be_tagged_for_it(name: str) -> None:
    for number in range(500):
        assert is_tag(reference_name(f"/shared/{number}/{name}", f"e1-{number:032x}"))


def test_a_base_that_has_just_been_retired_fails_the_save_that_would_refer_to_it(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(model=Tuned(None, 7).model), tmp_path / "bases", max_to_keep=1
    ) as bases:
        tuned = Tuned(bases.save(1).result(30), seed=1)
        with distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager:
            manager.restore_or_initialize()
            bases.save(2).result(30)
            bases.save(3).result(30)
            for number in (1, 2):  # and it is not forgotten that it could not be tagged
                with pytest.raises(CheckpointNotFoundError, match="the tag came too late"):
                    manager.save(number)
    assert distckpt.latest_checkpoint(tmp_path / "run") is None


def test_a_base_that_could_not_be_tagged_at_first_is_tagged_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Tuned(None, 7).model
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model), tmp_path / "bases", max_to_keep=1) as bases:
        tuned = Tuned(bases.save(1).result(30), seed=1)
        leases = tmp_path / "bases" / "_leases"
        in_the_way = not leases.exists()
        aside = leases.rename(tmp_path / "aside") if not in_the_way else None
        leases.write_text("no folder")
        with distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager:
            manager.restore_or_initialize()
            with caplog.at_level(logging.WARNING, "distckpt"):
                manager.save(1).result(30)
            assert "Later saves try again" in caplog.text
            leases.unlink()
            if aside is not None:
                aside.rename(leases)
            manager.save(2).result(30)
        for number in (2, 3):
            bases.save(number).result(30)
    assert Tuned(f"{tmp_path}/bases/ckpt-1", seed=2).checkpoint.restore(tmp_path / "run").is_complete


@pytest.mark.parametrize("lone", [False, True])
def test_a_base_that_is_gone_fails_the_save_that_would_refer_to_it(base: str, lone: bool, tmp_path: Path) -> None:
    if lone:
        shutil.copytree(base, tmp_path / "lone")
        base = str(tmp_path / "lone")
    tuned = Tuned(base, seed=1)
    with distckpt.CheckpointManager(tuned.checkpoint, tmp_path / "run") as manager:
        manager.restore_or_initialize()
        folder = Path(base)
        folder.rename(tmp_path / "away")
        for number in (1, 2):
            with pytest.raises(CheckpointNotFoundError, match="none of them could be restored: put it back"):
                manager.save(number)
        (tmp_path / "away").rename(folder)
        manager.save(3).result(30)
    assert Tuned(base, seed=2).checkpoint.restore(tmp_path / "run").is_complete


def test_a_base_that_cannot_be_written_to_is_read_all_the_same_and_that_is_told(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leases = Path(base) / "_leases"
    if leases.exists():
        shutil.rmtree(leases)
    leases.write_text("no folder")
    with caplog.at_level(logging.WARNING, "distckpt"):
        run(tmp_path / "run", base, 1, seed=1)
        run(tmp_path / "run", base, 2, seed=2)
    assert "distckpt pin" in caplog.text
