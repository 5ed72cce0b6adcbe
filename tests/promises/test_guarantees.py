"""The promises G1 to G9, one test each, on the real stack: manager, coordinator, store and readers."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import crc32c
import pytest

import distckpt
from distckpt.directory import log
from distckpt.directory.log import read_entry
from distckpt.errors import CheckpointNotFoundError, DamagedError, DistckptError, FencedError, StaleRunError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, Entry
from distckpt.format.json.manifest import Manifest
from distckpt.format.json.sealed import unseal
from distckpt.storage import LocalStore
from distckpt.testing.faulty import Call, Fault, FaultyStore, RandomFaults, rewritten
from tests.state.zoo import ENTRIES
from tests.state.zoo.entry import take_steps
from tests.state.zoo.roundtrip import round_trip
from tests.support import crashing
from tests.support.crashing import save_and_die
from tests.support.damage import flip
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    attempt_folder,
    entries,
    holds,
    lease_on,
    mount,
    mounting,
    numbers,
    on_disk,
    records,
    run,
    settled,
)


@pytest.fixture(autouse=True)
def _mounting() -> Iterator[None]:
    with mounting():
        yield


class WatchedStore(LocalStore):
    """A local store that looks at every log entry at the moment it is there, and before anything else can happen."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.looked: list[Entry] = []
        self.wrong: list[str] = []
        self._looking = threading.Lock()

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create, and look."""
        super().put_if_absent(path, data)
        seq = names.entry_seq(path)
        if seq is not None:
            self._look(read_entry(self, seq))

    def delete(self, path: str) -> None:
        """Delete, unless that takes away what the log still counts on."""
        with self._looking:
            alive = [*self.looked[-1].state.active, *self.looked[-1].state.preserved] if self.looked else []
            self.wrong += [f"deleted {path}" for record in alive if path.startswith(f"{_folder(record)}/")]
        super().delete(path)

    def _look(self, entry: Entry) -> None:
        with self._looking:
            self.looked.append(entry)
            for record in (*entry.state.active, *entry.state.preserved):
                self.wrong += [f"entry {entry.seq}: {problem}" for problem in self._problems(record)]

    def _problems(self, record: CheckpointRecord) -> Iterable[str]:
        folder = _folder(record)
        data = self.read(f"{folder}/{names.MANIFEST}", 1 << 20)
        if crc32c.crc32c(data) != record.manifest_crc32c:
            yield f"the manifest of {folder} is another one"
        manifest = unseal(data, Manifest, folder, 1 << 20)
        expected = {names.shard_name(one.rank, one.shard): (one.size, one.crc32c) for one in manifest.shards}
        expected[names.INDEX] = (manifest.index_size, manifest.index_crc32c)
        for name, (size, crc) in expected.items():
            content = self.read(f"{folder}/{name}", 1 << 30)
            if (len(content), crc32c.crc32c(content)) != (size, crc):
                yield f"{folder}/{name} is not what the manifest says"


def _folder(record: CheckpointRecord) -> str:
    return names.attempt_folder(record.name, record.number, record.attempt)


def test_G1_a_committed_checkpoint_has_every_shard_with_its_digest_until_it_is_retired(tmp_path: Path) -> None:
    """G1 a committed checkpoint has every shard with its digest until it is retired."""
    store = WatchedStore(tmp_path)
    for _ in range(2):
        with Trainer(mount(store), max_to_keep=2) as trainer:
            trainer.manager.restore_or_initialize()
            for number in (1, 2, 3, 3, 5, 4):
                trainer.saved(number)
    kinds = Counter(entry.kind for entry in store.looked)
    assert kinds["commit"] == 12
    assert kinds["forget"] > 0
    assert kinds["claim"] == 2
    assert store.wrong == []
    for entry in store.looked:
        assert len(entry.state.active) <= 4


def test_G2_the_log_is_contiguous_with_one_writer_a_sequence_number(tmp_path: Path) -> None:
    """G2 the log is contiguous, one writer a sequence number."""
    stores = [FaultyStore(LocalStore(tmp_path), RandomFaults(seed, 0.1)) for seed in range(3)]
    urls = [mount(store) for store in stores]
    threads = [threading.Thread(target=_save_until_fenced, args=(url, 100 * at)) for at, url in enumerate(urls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.heal()
    run(tmp_path, 999)
    assert assert_sound_log(tmp_path)[0].seq == 1
    writers = Counter(call.path for store in stores for call in store.calls if call.applied and _writes_entry(call))
    assert len(writers) > 2
    assert set(writers.values()) == {1}


def _writes_entry(call: Call) -> bool:
    return call.operation == "put_if_absent" and names.entry_seq(call.path) is not None


def _save_until_fenced(url: str, first: int) -> None:
    for turn in range(3):
        try:
            with Trainer(url, save_timeout=20) as trainer:
                for number in range(first + 10 * turn, first + 10 * turn + 4):
                    if isinstance(trainer.save(number).exception(60), FencedError | StaleRunError):
                        return
        except DistckptError:
            continue  # the next turn may have more luck


@pytest.mark.parametrize("saves", [1, 3])
def test_G3_an_acknowledged_save_is_durable_and_visible_to_every_later_reader(tmp_path: Path, saves: int) -> None:
    """G3 an acknowledged save is durable and visible to every later reader.

    Here: readers in other processes see it at once, and it outlives a process that is killed right after it was told.
    What outlives a power loss is tested with the store.
    """
    acknowledged = list(range(1, saves + 1))
    ended = crashing.run(
        save_and_die, directory=str(tmp_path), numbers=range_list(saves + 2), count="saves", at=saves - 1
    )
    assert ended.signal == 9
    assert ended.said == acknowledged
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-{saves}"
    assert numbers(tmp_path) == acknowledged
    for number in acknowledged:
        assert_loads(tmp_path / f"ckpt-{number}", number)
    with Trainer(tmp_path) as trainer:
        path = trainer.saved(9)
        assert next(distckpt.checkpoints_iterator(tmp_path, timeout=0)) == path
        assert distckpt.wait_for_new_checkpoint(tmp_path, timeout=0) == path
        assert trainer.manager.latest_checkpoint == path
        assert holds(distckpt.load(tmp_path)["state"], 9)


def range_list(end: int) -> list[int]:
    """1 to ``end``."""
    return list(range(1, end + 1))


def test_G4_no_shard_index_manifest_or_log_entry_is_ever_overwritten(tmp_path: Path) -> None:
    """G4 no shard, index, manifest or log entry is ever overwritten (the derived `checkpoint` file, statistics and
    lease renewals are the only mutable objects, and nothing depends on them for truth)."""
    history: list[Call] = []
    seed = 0
    while sum(call.applied and call.operation == "put_unique" for call in history) < 8:
        store = FaultyStore(LocalStore(tmp_path), RandomFaults(seed, 0.05))
        with contextlib.suppress(DistckptError), Trainer(mount(store), max_to_keep=2, save_timeout=20) as trainer:
            for number in (1, 2, 2, 1, 3):
                trainer.save(number).exception(60)
        store.heal()
        history += store.calls
        seed += 1
    assert rewritten(history) == ()
    replaced = {call.path for call in history if call.operation == "replace"}
    assert {path for path in replaced if names.stats_run(path) is None} == {names.STATE_FILE}
    (tmp_path / names.STATE_FILE).unlink(missing_ok=True)
    assert holds(distckpt.load(tmp_path)["state"], numbers(tmp_path)[-1])
    with Trainer(tmp_path) as trainer:
        restored = trainer.manager.restore_or_initialize()
        newest = numbers(tmp_path)[-1]  # the coordinator may have found one whole that lacked its entry
        assert restored == f"{tmp_path}/ckpt-{newest}"


@dataclass
class ManifestUnknown:
    """Of a save's last file nobody hears whether it was written, and afterwards nothing is written or deleted any more."""

    kind: Fault
    struck: bool = False

    def fault(self, call: Call) -> Fault | None:
        """See above."""
        if call.operation not in ("put_if_absent", "delete"):
            return None
        if self.struck:
            return Fault.BEFORE
        self.struck = call.path.startswith("ckpt-2") and call.path.endswith(names.MANIFEST)
        return self.kind if self.struck else None


@pytest.mark.parametrize(("kind", "later"), [(Fault.LATE, 2), (Fault.NO_ANSWER, 1)])
def test_of_a_save_whose_last_file_may_be_there_it_is_said(tmp_path: Path, kind: Fault, later: int) -> None:
    store = FaultyStore(LocalStore(tmp_path), ManifestUnknown(kind))
    with Trainer(mount(store)) as trainer:
        trainer.saved(1)
        assert re.search(
            "not known.*the next coordinator finds the checkpoint whole", str(trainer.save(2).exception(60))
        )
        assert numbers(tmp_path) == [1]
    store.heal()
    with Trainer(tmp_path) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/ckpt-{later}"
        assert holds(trainer.checkpoint.state, later)


@dataclass
class Straggler:
    """Holds every write of a log entry back until it may go on."""

    after: int
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    _seen: int = 0

    def fault(self, call: Call) -> Fault | None:
        """A delay, from the ``after``-th entry on."""
        if not _writes_entry(call):
            return None
        self._seen += 1
        return Fault.DELAYED if self._seen > self.after else None

    def sleep(self, _: float) -> None:
        """Until it may go on."""
        self.reached.set()
        assert self.go_on.wait(30)


def test_G5_after_an_epoch_is_logged_no_entry_of_an_earlier_one_follows(tmp_path: Path) -> None:
    """G5 after epoch E+1 is logged, no entry of an epoch up to E follows."""
    for after in (2, 3):  # its first commit is held back, and its second
        straggler = Straggler(after)
        old = Trainer(mount(FaultyStore(LocalStore(tmp_path), straggler, sleep=straggler.sleep)))
        number = 10 * after
        pending = [old.save(number + step) for step in range(1)]
        if after == 3:
            pending[0].result(30)
            pending = [old.save(number + 1)]
        assert straggler.reached.wait(30)
        with Trainer(tmp_path) as new:
            before = entries(tmp_path)
            straggler.go_on.set()
            assert isinstance(pending[0].exception(30), FencedError | StaleRunError)
            new.saved(number + 5)
        with pytest.raises(DistckptError):
            old.saved(number + 6)
        old.manager.close()
        after_it = assert_sound_log(tmp_path)[len(before) :]
        assert all(entry.epoch == before[-1].epoch for entry in after_it)
        assert number + 6 not in numbers(tmp_path)


def test_G5_an_older_one_is_fenced_by_the_very_first_entry_of_a_newer_one(tmp_path: Path) -> None:
    """G5 after epoch E+1 is logged, no entry of an epoch up to E follows. Not even while E+1 has logged its claim only."""
    slow_old, slow_new = Straggler(2), Straggler(1)
    old = Trainer(mount(FaultyStore(LocalStore(tmp_path), slow_old, sleep=slow_old.sleep)))
    pending = old.save(1)
    assert slow_old.reached.wait(30)
    newer: list[Trainer] = []
    url = mount(FaultyStore(LocalStore(tmp_path), slow_new, sleep=slow_new.sleep))
    opening = threading.Thread(target=lambda: newer.append(Trainer(url)))
    opening.start()
    assert slow_new.reached.wait(30)
    assert [entry.kind for entry in entries(tmp_path)] == ["claim", "run", "claim"]
    slow_old.go_on.set()
    assert isinstance(pending.exception(30), FencedError)
    assert len(entries(tmp_path)) == 3
    slow_new.go_on.set()
    opening.join()
    newer[0].saved(2)
    newer[0].manager.close()
    old.manager.close()
    assert_sound_log(tmp_path)
    assert numbers(tmp_path) == [1, 2], "the claim has taken over what was sealed"


def test_G5_an_older_one_is_fenced_though_its_next_number_was_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5 after epoch E+1 is logged, no entry of an epoch up to E follows. Pruning re-opens names, and that must not help."""
    monkeypatch.setattr(log, "KEEP_ENTRIES", 4)
    straggler = Straggler(2)
    old = Trainer(mount(FaultyStore(LocalStore(tmp_path), straggler, sleep=straggler.sleep)))
    pending = old.save(1)
    assert straggler.reached.wait(30)
    with Trainer(tmp_path) as new:
        for number in range(11, 21):
            new.saved(number)
        settled(tmp_path)
        assert entries(tmp_path)[0].seq > 3, "the older one's number has been pruned"
        newest = entries(tmp_path)[-1]
        straggler.go_on.set()
        assert isinstance(pending.exception(30), FencedError | StaleRunError)
        old.manager.close()
        assert entries(tmp_path)[-1] == newest
        assert 1 not in numbers(tmp_path)
        with pytest.raises(CheckpointNotFoundError):
            distckpt.load(tmp_path / "ckpt-1")
        new.saved(21)
    run(tmp_path, 22)
    assert numbers(tmp_path)[-2:] == [21, 22]
    assert_sound_log(tmp_path)


def test_G6_no_reader_returns_bytes_of_two_attempts_or_unverified_bytes(tmp_path: Path) -> None:
    """G6 no reader returns bytes of two attempts or unverified bytes."""
    stop, torn, seen, told = threading.Event(), [], set(), Counter[str]()

    def read() -> None:
        while not stop.is_set():
            try:
                state = distckpt.load(tmp_path / "ckpt-7")["state"]
            except DistckptError as error:
                told[type(error).__name__] += 1
                continue
            found = {float(value) for value in state["weights"].reshape(-1)} | {float(state["nested"]["step"])}
            seen.update(found)
            if len(found) != 1:
                torn.append(found)

    with Trainer(tmp_path) as trainer:
        weights = trainer.checkpoint.state["weights"]
        readers = [threading.Thread(target=read) for _ in range(2)]
        for turn in range(25):
            weights.fill_(turn)
            trainer.checkpoint.state["nested"]["step"] = turn
            trainer.manager.save(7).result(30)
            if turn == 0:
                for reader in readers:
                    reader.start()
        stop.set()
        for reader in readers:
            reader.join()
    assert torn == []
    assert len(seen) > 3
    assert set(told) <= {"DamagedError"}, "what was retired while it was read is missing, and nothing else"
    for key in ("state.weights", "state.nested.step"):
        file, position = _payload(tmp_path, key)
        flip(file, position)
        with pytest.raises(DamagedError, match=key):
            distckpt.load(tmp_path / "ckpt-7")
        flip(file, position)
    assert float(distckpt.load(tmp_path / "ckpt-7")["state"]["weights"][0, 0]) == 24


def _payload(directory: Path, key: str) -> tuple[Path, int]:
    from distckpt.directory.locate import locate, read_index

    index = read_index(locate(directory / "ckpt-7"))
    row = int(index.rows(key)[0])
    return attempt_folder(directory, 7) / names.shard_name(0, 0), int(index.position[row])


def test_G7_retention_never_removes_the_newest_a_leased_a_pinned_or_a_preserved_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7 retention never removes the newest, a leased, a pinned or a preserved checkpoint."""
    hours = [0.0]
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + 3600 * hours[0])
    run(tmp_path, 1, 2, 3, max_to_keep=None)  # 1 will be leased and 2 pinned
    lease_on(tmp_path, 1, seconds=86400)
    store = WatchedStore(tmp_path)
    with Trainer(mount(store), max_to_keep=1, keep_checkpoint_every_n_hours=2) as trainer:
        trainer.pin(2)
        for number in range(4, 10):
            hours[0] += 1
            trainer.saved(number)
            assert number in on_disk(tmp_path)
    assert store.wrong == []
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-9"
    preserved = [record.number for record in entries(tmp_path)[-1].state.preserved]
    assert len(preserved) >= 2
    assert on_disk(tmp_path) == sorted({1, 2, 9, *preserved})
    assert [record.number for record in records(tmp_path)] == [1, 2, 9]
    for number in on_disk(tmp_path):
        assert_loads(tmp_path / f"ckpt-{number}", number)


@pytest.mark.parametrize("moment", [25, 45, 60, 75, 85, 95, 105, 115])
def test_G8_after_a_crash_at_any_point_the_previous_loads_and_the_next_save_succeeds(
    tmp_path: Path, moment: int
) -> None:
    """G8 after a crash at any point the previous checkpoint loads and the next save succeeds with no repair by hand.

    A few points, for the promise; tests/promises/test_crash_points.py goes through all of them.
    """
    run(tmp_path, 1)
    for at in (moment, moment + 3):  # and it crashes again
        crashing.run(save_and_die, directory=str(tmp_path), numbers=[2], count="system", at=at)
        assert_loads(tmp_path / "ckpt-1", 1)
        for number in numbers(tmp_path):
            assert_loads(tmp_path / f"ckpt-{number}", number)
    with Trainer(tmp_path) as trainer:
        newest = trainer.manager.restore_or_initialize()
        assert newest in (f"{tmp_path}/ckpt-1", f"{tmp_path}/ckpt-2")
        assert holds(trainer.checkpoint.state, int(str(newest)[-1]))
        trainer.saved(3)
    assert_loads(tmp_path / "ckpt-3", 3)
    assert_sound_log(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["optimizers/adam", "modules/norms", "schedulers/multistep-after", "wrappers/stateful", "values/counter",
     "values/empty-dict-tensors", "tensors/array-float32"],
)  # fmt: skip
def test_G9_what_goes_in_comes_out_as_torch_would_restore_it_and_training_goes_on(tmp_path: Path, name: str) -> None:
    """G9 after a restore the objects are in the state that torch's own load_state_dict(state_dict()) would have put
    them in, bit for bit, and training goes on as if it had never stopped.

    A few kinds on one rank, for the promise; tests/state/zoo has all of them, and those on many ranks.
    """
    assert round_trip(ENTRIES[name], str(tmp_path)) == []


@pytest.mark.parametrize("name", ["values/refused-lambda", "modules/meta", "checkpoint/module-inside"])
def test_G9_what_cannot_be_kept_is_refused_by_name_before_anything_is_written(tmp_path: Path, name: str) -> None:
    """G9 what cannot be kept is refused by prepare or the first save, naming the key and what to do."""
    entry = ENTRIES[name]
    assert entry.refused is not None
    trained = entry.start(seed=0)
    take_steps(trained, 0, entry.steps)
    with distckpt.CheckpointManager(trained.checkpoint, tmp_path) as manager:
        for first in (manager.prepare, lambda: manager.save(1)):
            with pytest.raises(DistckptError, match=re.escape(entry.refused.key)) as caught:
                first()
            assert re.search(entry.refused.advice, str(caught.value))
    assert distckpt.latest_checkpoint(tmp_path) is None


def test_every_promise_has_its_test() -> None:
    named = {name.split("_")[1] for name in globals() if name.startswith("test_G")}
    assert named == {f"G{number}" for number in range(1, 10)}
