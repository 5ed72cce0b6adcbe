"""An import is committed whole or not at all, in the log as a run would do it, in bounded memory, and from any store."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import distckpt
from distckpt.directory.collect import Survey, delete
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorError, DamagedError
from distckpt.foreign import importing
from distckpt.foreign.importing import Import
from distckpt.foreign.reader import ForeignReader, read_foreign
from distckpt.storage import LocalStore, Store, open_store
from distckpt.testing.faults import Call
from distckpt.testing.faulty import FaultyStore
from tests.support import servers
from tests.support.crashing import Say, run
from tests.support.foreign import alike, entry, odd_tensors, refusal, safetensors
from tests.support.foreign import run as command
from tests.support.places import Gs, Place
from tests.support.small_runs import Trainer


def imported(reader: ForeignReader, store: Store, number: int) -> None:
    """Import it now."""
    Import(reader, store, read_tail(store), "ckpt", number, time.time).run()


class Killed(BaseException):
    """Nothing that a killed process would still have done is done after it."""


class Dying:
    """A script for a store: from call ``at`` on nothing works, and nobody is left to notice."""

    def __init__(self, at: float = float("inf")) -> None:
        self.calls = 0
        self._at = at

    def fault(self, call: Call) -> None:
        """A call passes."""
        if self.calls >= self._at:
            raise Killed
        self.calls += 1


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the probe's threads die too
def test_an_import_that_is_killed_at_any_moment_leaves_nothing_that_counts(tmp_path: Path) -> None:
    save_file({"w": torch.randn(50, 3), "v": torch.ones(2)}, tmp_path / "x.safetensors")
    reader = read_foreign(tmp_path / "x.safetensors")
    whole, alive = LocalStore(tmp_path / "whole"), Dying()
    imported(reader, whole, 1)
    imported(reader, FaultyStore(whole, alive), 2)
    for at in range(0, alive.calls + 1, 3):
        store = LocalStore(tmp_path / f"{at}")
        imported(reader, store, 1)
        with contextlib.suppress(Killed):
            imported(reader, FaultyStore(store, Dying(at)), 2)
        committed = distckpt.latest_checkpoint(store.url) == f"{store.url}/ckpt-2"
        state = read_tail(store).state
        assert len(state.active) == 1 + committed
        imported(reader, store, 3)
        assert distckpt.open(store.url).verify().good
        garbage = Survey(store, 0.0).look()
        delete(garbage.found)
        sealed = list((tmp_path / f"{at}").glob("ckpt-2/*/manifest.json"))
        left = list((tmp_path / f"{at}").glob("ckpt-2/*"))
        assert len(left) <= len(sealed), "what never came to a manifest is garbage"


def test_no_import_goes_where_a_job_may_be_running(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    with Trainer(str(tmp_path / "run")) as trainer:
        trainer.saved(1)
        assert "may be running" in refusal("import", tmp_path / "x.safetensors", tmp_path / "run", "--number", 7)
        assert distckpt.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/ckpt-1"
    command("import", tmp_path / "x.safetensors", tmp_path / "run", "--number", 7, "--force")
    assert distckpt.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/ckpt-7"


class Meanwhile:
    """A script for a store: when the first shard is written, something else is done first."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do: Callable[[], object] | None = do

    def fault(self, call: Call) -> None:
        """A call passes."""
        if call.operation == "put_unique" and self._do is not None:
            do, self._do = self._do, None
            do()


def test_an_import_into_which_somebody_else_saves_does_not_count_and_leaves_nothing(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    reader, store = read_foreign(tmp_path / "x.safetensors"), LocalStore(tmp_path / "run")
    imported(reader, store, 1)

    def save() -> None:
        with Trainer(store.url) as trainer:
            trainer.saved(2)

    with pytest.raises(CoordinatorError, match="no entry of this import counts"):
        imported(reader, FaultyStore(store, Meanwhile(save)), 3)
    assert distckpt.latest_checkpoint(store.url) == f"{store.url}/ckpt-2"
    assert not (tmp_path / "run" / "ckpt-3").exists()
    assert distckpt.open(store.url).verify().good


def test_an_import_from_whose_commit_somebody_has_gone_on_counts_and_stays(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    trainers: list[Trainer] = []

    class GoneOn(LocalStore):
        def put_if_absent(self, path: str, data: bytes) -> None:
            super().put_if_absent(path, data)
            if b'"kind":"commit"' in data.replace(b" ", b"") and not trainers:
                trainers.append(Trainer(self.url))

    imported(read_foreign(tmp_path / "x.safetensors"), GoneOn(tmp_path / "run"), 3)
    with trainers[0] as trainer:
        trainer.saved(4)
    with distckpt.open(tmp_path / "run" / "ckpt-3") as reader:
        assert reader.verify().good


def test_a_file_that_shrinks_while_it_is_imported_is_damage_and_leaves_nothing(tmp_path: Path) -> None:
    path, store = tmp_path / "x.safetensors", LocalStore(tmp_path / "run")
    save_file({"w": torch.ones(5000)}, path)
    reader = read_foreign(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DamagedError, match=r"x\.safetensors.*'model\.w'"):
        imported(reader, store, 1)
    assert distckpt.latest_checkpoint(tmp_path / "run") is None
    assert not list((tmp_path / "run").glob("ckpt-*"))


SHARD, LARGE = 4 << 20, 96 << 20


def import_large(say: Say, path: str, directory: str) -> None:
    """Says how many bytes of memory a large import takes more than a small one."""
    importing.SHARD_BYTES = SHARD
    small = Path(path).with_name("small.safetensors")
    save_file({"w": torch.ones(3 * SHARD // 4)}, small)
    imported(read_foreign(small), LocalStore(directory), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported(read_foreign(path), LocalStore(directory), 2)
    say(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_an_import_takes_memory_for_two_shards_whatever_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    header = {f"w{number}": entry(number * LARGE // 2, (number + 1) * LARGE // 2, [LARGE // 8]) for number in (0, 1)}
    begin = safetensors(header, 0)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + LARGE)  # zeros, which take no time to write
    more = run(import_large, path=str(path), directory=str(tmp_path / "run")).said
    assert len(more) == 1
    assert more[0] < LARGE // 3


def test_what_is_larger_than_a_shard_goes_into_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {**odd_tensors(), "tall": torch.randn(3000, 7), "long": torch.randn(1, 60_000)}
    save_file(tensors, path)
    monkeypatch.setattr(importing, "SHARD_BYTES", 20_000)
    imported(read_foreign(path), LocalStore(tmp_path / "run"), 1)
    with distckpt.open(tmp_path / "run") as reader:
        assert len(reader.manifest.shards) > 100
        assert reader.verify().good
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in reader.load("model").items())


@pytest.mark.timeout(100)
def test_files_in_an_object_store_are_read_and_written_there(tmp_path: Path) -> None:
    tensors = odd_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with servers.fake_gcs() as server:
        place = Place.new(Gs(), server.port)
        place.fill(tmp_path)
        options = place.options()
        for path in (f"{place.url}/model.safetensors", f"{place.url}/pytorch_model.bin"):
            with read_foreign(path, options) as foreign:
                assert torch.equal(foreign.tensor("model.large"), tensors["large"])
                assert alike(foreign.load("model"), tensors)
                imported(foreign, open_store(f"{place.url}/run", options), foreign.path.count("_"))
        for number in (0, 1):
            assert alike(distckpt.load(f"{place.url}/run/ckpt-{number}", "model", options), tensors)
