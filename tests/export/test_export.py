"""Exports: made from what is committed, whole or not there, in order, and as long-lived as their checkpoints."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import distckpt
import distckpt.iterators
from distckpt.cli import main
from distckpt.directory.exports import read_export
from distckpt.directory.log import read_tail
from distckpt.errors import ExportError
from distckpt.export.building import filled
from distckpt.export.contents import contents
from distckpt.export.listing import list_exports
from distckpt.export.recipes import recipes_of
from distckpt.export.task import NICENESS, Order, Outcome, carry_out
from distckpt.format import names
from distckpt.format.json.export import ExportedFile, ExportedModule, ExportManifest
from distckpt.storage import LocalStore, MemoryStore, Store
from distckpt.testing.faults import Call, Fault, FaultAt, faults_of, rewritten
from distckpt.testing.faulty import FaultyStore
from distckpt.testing.observing import everything
from tests.ranks.export import Tower, blocks, gpt_config, inputs, output, small_gpt, tower
from tests.support.checkpoints import append_state, commit, new_attempt, put_manifest, write_checkpoint
from tests.support.exports import describe_export, exported
from tests.support.gang import ROOT, Gang
from tests.support.small_runs import mount, mounting, until
from tests.support.warm import run_script, warm

Exporting = functools.partial(
    distckpt.ExportCheckpointManager, task_options={"scheduling_strategy": "DEFAULT", "max_calls": 0}
)  # one node, and so one worker that has to import everything


# ---- which exports there are: nothing but storage -------------------------------------------------------------------


def test_exports_are_listed_by_save_and_visited_by_number_and_zero_is_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    paths = {number: exported(store, number) for number in (10, 9, 0, 100, 11)}
    in_order = [paths[number] for number in (0, 9, 10, 11, 100)]
    assert distckpt.list_exports(tmp_path) == list(paths.values())
    assert distckpt.latest_export(str(tmp_path)) == paths[11]
    assert list(distckpt.exports_iterator(tmp_path, timeout=0)) == in_order
    last = None
    for path in in_order:
        last = distckpt.wait_for_new_export(tmp_path, last, timeout=0)
        assert last == path
    assert distckpt.wait_for_new_export(tmp_path, last, timeout=0) is None


def test_after_a_rollback_the_most_recent_export_is_that_of_the_last_save(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    paths = {number: exported(store, number) for number in (100, 200, 300, 150)}
    assert distckpt.latest_export(tmp_path) == paths[150]
    assert distckpt.list_exports(tmp_path) == list(paths.values())
    commit(store, put_manifest(store, 160, new_attempt()))
    assert distckpt.latest_export(tmp_path) == paths[150]  # of those that have been exported
    append_state(store, lambda state: type(state)(preserved=state.active), "retire")
    assert distckpt.latest_export(tmp_path) == paths[150]
    assert distckpt.list_exports(tmp_path) == list(paths.values())


def test_a_directory_that_is_not_there_has_no_exports(tmp_path: Path) -> None:
    assert distckpt.list_exports(tmp_path / "none") == []
    assert distckpt.latest_export(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_only_what_is_committed_twice_over_counts(tmp_path: Path) -> None:
    """The checkpoint by the log, and the export by its description: files alone are none."""
    store = LocalStore(tmp_path)
    half = put_manifest(store, 1, new_attempt())
    commit(store, half)
    store.put_if_absent(f"ckpt-1/{half.attempt}/export-{'a' * 32}/tower/{names.WEIGHTS}", b"x")
    describe_export(store, put_manifest(store, 2, new_attempt()))
    whole = exported(store, 3)
    assert distckpt.list_exports(tmp_path) == [whole]


def test_retired_ones_go_and_preserved_ones_stay(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    paths = [exported(store, number) for number in (1, 2, 3)]

    def change(state: Any) -> Any:
        return type(state)(retiring=state.active[:1], preserved=state.active[1:2], active=state.active[2:])

    append_state(store, change, "retire")
    assert distckpt.list_exports(tmp_path) == paths[1:]


def test_names_that_begin_alike_are_apart(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plain, longer = exported(store, 1), exported(store, 2, "ckpt-foo")
    assert distckpt.list_exports(tmp_path) == [plain]
    assert distckpt.list_exports(tmp_path, "ckpt-foo") == [longer]
    assert distckpt.latest_export(tmp_path, "ckpt-foo") == longer
    assert list(distckpt.exports_iterator(tmp_path, timeout=0, checkpoint_name="ckpt-foo")) == [longer]
    with pytest.raises(ValueError, match="ckpt-foo"):
        distckpt.wait_for_new_export(tmp_path, longer, timeout=0)


def test_a_number_that_was_saved_again_is_new_once_it_has_been_exported(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old = exported(store, 5)
    again = put_manifest(store, 5, f"e2-{'0' * 32}")
    commit(store, again)
    assert distckpt.list_exports(tmp_path) == []
    assert distckpt.wait_for_new_export(tmp_path, old, timeout=0) is None
    new = describe_export(store, again)
    assert distckpt.list_exports(tmp_path) == [new]
    assert distckpt.wait_for_new_export(tmp_path, old, timeout=0) == new
    assert distckpt.wait_for_new_export(tmp_path, new, timeout=0) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: msgspec.structs.replace(manifest, id="../../../../etc"), "is not an export's id"),
        (lambda manifest: msgspec.structs.replace(manifest, attempt=new_attempt()), "of another attempt"),
        (lambda manifest: msgspec.structs.replace(manifest, modules=manifest.modules * 2), "a module twice"),
        (
            lambda manifest: msgspec.structs.replace(manifest, modules=(ExportedModule("..", ()),)),
            "is not a module's name",
        ),
        (
            lambda manifest: msgspec.structs.replace(
                manifest, modules=(ExportedModule("m", (ExportedFile("../x", 1, 1),)),)
            ),
            "is not a file of an exported module",
        ),
    ],
)
def test_forged_descriptions_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[ExportManifest], Any], reason: str
) -> None:
    store = LocalStore(tmp_path)
    good = exported(store, 1)
    exported(store, 2, change=change)
    assert distckpt.list_exports(tmp_path) == [good]
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("{export}", 42),
        ("{export}/", 42),
        ("gs://bucket/run-7/ckpt-0/{attempt}/export-{id}", 0),
        ("ckpt-7/{attempt}/export-{id}", 7),
        ("{export}/tower", None),
        ("/run/ckpt-42", None),
        ("/run/ckpt-42_saved_modules", None),
        ("/run/ckpt-x/{attempt}/export-{id}", None),
        ("", None),
    ],
)
def test_the_number_of_a_path(tmp_path: Path, path: str, number: int | None) -> None:
    export = exported(LocalStore(tmp_path), 42)
    filled_in = path.format(export=export, attempt=new_attempt(), id="0" * 32)
    assert distckpt.export_number(filled_in) == number
    assert distckpt.export_number(filled_in, "other") is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distckpt.iterators, "POLL_SECONDS", 0.02)


def test_waiting_looks_before_it_gives_up_and_at_the_very_end(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    path = exported(store, 1)
    assert distckpt.wait_for_new_export(tmp_path, None, seconds_to_sleep=30, timeout=0.01) == path
    started = time.monotonic()
    later = threading.Timer(0.1, exported, (store, 2))
    later.start()
    found = distckpt.wait_for_new_export(tmp_path, f"{path}/", seconds_to_sleep=30, timeout=0.6)
    assert found is not None
    assert distckpt.export_number(found) == 2
    assert 0.5 < time.monotonic() - started < 20
    later.join()


def test_a_last_path_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the path of an export"):
        distckpt.wait_for_new_export(tmp_path, f"{tmp_path}/ckpt-1", timeout=0)


@pytest.mark.usefixtures("quick")
def test_the_iterator_follows_and_asks_after_a_timeout(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    exported(store, 1)
    asked: list[int] = []

    def timeout_fn() -> bool:
        asked.append(len(asked))
        if len(asked) == 1:
            exported(store, 3)
            exported(store, 2)
        return len(asked) > 2

    found = [distckpt.export_number(path) for path in distckpt.exports_iterator(tmp_path, 0, 0.01, timeout_fn)]
    assert found == [1, 2, 3]
    assert len(asked) == 3


# ---- what can be exported ---------------------------------------------------------------------------------------------


def recipe_of(checkpoint: distckpt.Checkpoint, how: Any) -> Any:
    [recipe] = recipes_of(checkpoint, {"it": how})
    return recipe


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda: {"a/b": distckpt.Export(Tower)}, "cannot name an exported module"),
        (lambda: {"it": Tower()}, "not an object of the checkpoint"),
        (lambda: {"it": distckpt.Export(Tower, key="modell.x")}, "no object for the key"),
        (lambda: {"it": 3}, "an nn.Module or an Export"),
        (lambda: {"it": distckpt.Export(key="model", example_inputs=())}, "need build"),
        (lambda: {"it": distckpt.Export(Tower, example_inputs=[1])}, "must be a tuple"),
        (lambda: {"it": distckpt.Export(Tower())}, None),
        (lambda: {"it": distckpt.Export(3)}, "must be a callable"),
        (lambda: {"it": distckpt.Export(Tower, config={"a": float("nan")})}, "not JSON compliant"),
        (lambda: {"it": distckpt.Export(Tower, config={"a": object()})}, "not JSON serializable"),
        (lambda: {"it": distckpt.Export(Tower, config=3)}, "must be a mapping"),
        (lambda: {"it": distckpt.Export(Tower, dtype=torch.int32)}, "floating-point"),
        (lambda: {"it": distckpt.Export(functools.partial(print, threading.Lock()))}, "cannot be sent"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(tmp_path: Path, how: Any, reason: str | None) -> None:
    checkpoint = distckpt.Checkpoint(model=tower(0))
    if reason is None:
        how()
        return
    with pytest.raises((ValueError, TypeError), match=reason):
        Exporting(checkpoint, tmp_path, 5, how())
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    checkpoint = distckpt.Checkpoint(model=tower(0))
    with pytest.raises(ImportError, match=r"pip install 'distckpt\[export\]'"):
        Exporting(checkpoint, tmp_path, 5, {"it": distckpt.Export(key="model")})


def test_a_part_of_an_object_is_found_through_what_wraps_it() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = tower(0), tower(1)

    pair = Pair()
    wrapped = torch.compile(pair, backend="eager")
    checkpoint = distckpt.Checkpoint(other=tower(2), pair=wrapped)
    for module, key in (
        (pair, "pair"),
        (wrapped, "pair"),
        (pair.right, "pair.right"),
        (pair.left.inner, "pair.left.inner"),
    ):
        recipe = recipe_of(checkpoint, module)
        assert recipe.how.key == key
    assert recipe_of(checkpoint, pair.left).tied == {"outer.weight": "inner.weight"}


def test_a_live_module_travels_without_its_weights() -> None:
    module = tower(4)
    module.example_inputs = inputs()
    built = recipe_of(distckpt.Checkpoint(model=module), module).how.build()
    assert all(weight.is_meta for weight in (*built.parameters(), built.seen))
    assert built.scale.item() == 2.0
    assert built.outer.weight is built.inner.weight
    assert not module.inner.weight.is_meta


def looks_at_values() -> Tower:
    module = Tower(3.0)
    assert module.inner.weight.sum().item() != 12345.0
    return module


@pytest.mark.parametrize("build", [Tower, functools.partial(Tower, 2.0), looks_at_values])
def test_a_module_is_filled_whole(build: Callable[[], Tower]) -> None:
    """What the checkpoint holds and what it does not: other buffers and plain tensors are the built module's own."""
    live = tower(5)
    module = filled(build, live.state_dict())
    assert module.outer.weight is module.inner.weight
    assert not module.training
    assert not any(weight.requires_grad for weight in module.parameters())
    expected = output(live)
    if build is looks_at_values:
        expected = (expected - live.shifts[0] - live.seen) / 2.0 * 3.0 + live.shifts[0] + live.seen
    torch.testing.assert_close(output(module), expected, rtol=0, atol=1e-6)


def test_a_module_of_other_keys_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        filled(functools.partial(nn.Linear, 6, 6), tower(0).state_dict())


def frozen_below() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).requires_grad_(False)


@pytest.mark.parametrize("less", [{"only_trainable": True}, {"only_trainable": "model"}, {"exclude": "model.0"}])
def test_what_checkpoints_leave_out_is_in_no_export_and_that_is_told(
    less: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = frozen_below()
    live[1].requires_grad_(True)
    checkpoint = distckpt.Checkpoint(model=live, other=nn.Linear(2, 2), **less)
    how = {name: distckpt.Export(frozen_below, name) for name in ("model", "model.1", "other")}
    with distckpt.ExportCheckpointManager(checkpoint, tmp_path / "run", modules_to_export=how):
        told = [record.getMessage() for record in caplog.records if "leave out" in record.getMessage()]
        assert told[0] == "the export 'model' will not have what checkpoints leave out of 'model'"
        assert not any("'other'" in one for one in told)
    path = checkpoint.write(tmp_path / "alone")
    traced_too = distckpt.Export(frozen_below, example_inputs=(torch.ones(1, 2),))
    with distckpt.open(path) as reader:
        assert written(reader, distckpt.Export(frozen_below), tmp_path / "weights") == ["model.safetensors"]
        with pytest.raises(ValueError, match=r"some was left out when it was saved, with .*Save all of it"):
            written(reader, traced_too, tmp_path / "program")


def stored_weights(tmp_path: Path, state: Mapping[str, Any]) -> distckpt.CheckpointReader:
    return distckpt.open(write_checkpoint(tmp_path / "run", 1, {"model": dict(state)}, ranks=2))


def written(reader: distckpt.CheckpointReader, how: Any, folder: Path, max_bytes: int = 1 << 30) -> list[str]:
    """Write the files of an export into a folder; their names."""
    [recipe] = recipes_of(distckpt.Checkpoint(model=tower(0)), {"it": how})
    found = []
    folder.mkdir()
    for name, write in contents(reader, recipe, max_bytes):
        write(str(folder / name))
        found.append(name)
    return found


def test_tied_weights_are_written_once_and_load_again(tmp_path: Path) -> None:
    live = tower(6)
    with stored_weights(tmp_path, live.state_dict()) as reader:
        assert written(reader, distckpt.Export(Tower), tmp_path / "out") == ["model.safetensors"]
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(live.state_dict()) - {"outer.weight"}
    other = tower(7)
    assert load_model(other, tmp_path / "out/model.safetensors") == (set(), [])
    assert torch.equal(output(other), output(live))


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    state = {**tower(6).state_dict(), "outer.weight": torch.zeros(6, 6)}
    with (
        stored_weights(tmp_path, state) as reader,
        pytest.raises(ValueError, match=r"outer.weight and inner.weight .* differ"),
    ):
        written(reader, distckpt.Export(Tower), tmp_path / "out")


def test_large_weights_make_several_files_with_an_index(tmp_path: Path) -> None:
    live = tower(6)
    with stored_weights(tmp_path, live.state_dict()) as reader:
        found = written(reader, distckpt.Export(key="model", config={"a": 1}), tmp_path / "out", max_bytes=172)
    parts = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    assert found == [*parts, "model.safetensors.index.json", "config.json"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"a": 1}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = {name: value for part in parts for name, value in load_file(tmp_path / "out" / part).items()}
    assert set(index["weight_map"]) == set(tensors) == set(live.state_dict())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for name, part in index["weight_map"].items():
        with safe_open(tmp_path / "out" / part, "pt") as file:
            assert torch.equal(file.get_tensor(name), live.state_dict()[name])


def test_weights_are_converted_as_asked(tmp_path: Path) -> None:
    state = {**tower(6).state_dict(), "steps": torch.tensor([1, 2])}
    with stored_weights(tmp_path, state) as reader:
        written(reader, distckpt.Export(dtype=torch.bfloat16), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for name, value in found.items() if name != "steps"} == {torch.bfloat16}
    assert found["steps"].tolist() == [1, 2]
    assert torch.equal(found["inner.bias"], state["inner.bias"].bfloat16())


# ---- one export, whatever happens ---------------------------------------------------------------------------------------


@pytest.fixture
def urls() -> Iterator[None]:
    with mounting():
        yield


def order_of(url: str, store: Store, how: Any) -> Order:
    recipes = recipes_of(distckpt.Checkpoint(model=tower(0)), {"first": how, "second": how})
    [record] = read_tail(store).state.active
    return Order(url, None, record, recipes)


def small_checkpoint(tmp_path: Path) -> MemoryStore:
    """A checkpoint of a tower, in memory."""
    write_checkpoint(tmp_path, 1, {"model": dict(tower(1).state_dict())})
    disk, store = LocalStore(tmp_path), MemoryStore()
    for path, size in everything(disk).items():
        store.put_if_absent(path, disk.read(path, size))
    return store


def assert_whole_or_none(store: Store) -> bool:
    """Whether there is an export; if so, every byte of it is there."""
    [record] = read_tail(store).state.active
    export = read_export(store, f"ckpt-1/{record.attempt}")
    if export is None:
        return False
    assert {path.partition("/")[2] for path, _ in export.files()} == {
        "first/model.safetensors",
        "second/model.safetensors",
    }
    with distckpt.open(mount(store)) as reader:
        assert reader.verify().damages == ()
    return True


def export_folders(store: Store) -> set[str]:
    return {part for path in everything(store, "ckpt-1") for part in path.split("/") if part.startswith("export-")}


@pytest.mark.usefixtures("urls")
def test_whatever_fails_an_export_is_whole_or_not_there_and_can_be_made_again(tmp_path: Path) -> None:
    original = small_checkpoint(tmp_path).objects
    how = distckpt.Export(key="model")

    def fresh() -> FaultyStore:
        inner = MemoryStore()
        inner.objects.update(original)
        return FaultyStore(inner)

    def play(case: tuple[Call, Fault]) -> tuple[str, bool]:
        call, fault = case
        store = fresh()
        store.script = FaultAt(call.index, fault)
        order = order_of(mount(store), store.inner, how)
        outcome = carry_out(order)
        store.heal()
        there = assert_whole_or_none(store.inner)
        assert there or outcome.kind != "exported", (call, fault)
        again = carry_out(order)
        assert again.kind == ("exists" if there else "exported"), (call, fault, again)
        assert assert_whole_or_none(store.inner)
        assert rewritten(store.calls) == ()
        if not there:
            assert len(export_folders(store.inner)) == 1, "what came to nothing was left behind"
        return outcome.kind, there

    quiet = fresh()
    assert carry_out(order_of(mount(quiet), quiet.inner, how)).kind == "exported"
    assert rewritten(quiet.calls) == ()
    cases = [(call, fault) for call in quiet.calls for fault in faults_of(call.operation)]
    with ThreadPoolExecutor(8) as pool:  # for most of the time they wait until they try again
        seen = set(pool.map(play, cases))
    assert seen == {("exported", True), ("failed", False)}


@pytest.mark.usefixtures("urls")
def test_of_two_exporters_one_wins_and_the_other_leaves_nothing(tmp_path: Path) -> None:
    store = small_checkpoint(tmp_path)
    other = mount(store)

    class Overtaken(MemoryStore):
        """Somebody else commits an export just before ours is committed."""

        outcome: Outcome | None = None

        def put_if_absent(self, path: str, data: bytes) -> None:
            if path.endswith(names.EXPORT) and self.outcome is None:
                self.outcome = carry_out(order_of(other, store, distckpt.Export(key="model")))
            super().put_if_absent(path, data)

    slow = Overtaken()
    slow.objects = store.objects
    outcome = carry_out(order_of(mount(slow), store, distckpt.Export(key="model")))
    assert (outcome.kind, slow.outcome.kind) == ("exists", "exported")
    assert assert_whole_or_none(store)
    assert len(export_folders(store)) == 1


@pytest.mark.usefixtures("urls")
@pytest.mark.parametrize("when", ["before", "meanwhile", "at the commit"])
def test_a_checkpoint_that_is_retired_is_passed_over(tmp_path: Path, when: str) -> None:
    store = small_checkpoint(tmp_path)

    def retire() -> None:
        append_state(store, lambda state: type(state)(retiring=state.active), "retire")

    class Retiring(MemoryStore):
        def open(self, path: str) -> Any:
            if when == "meanwhile" and read_tail(store).state.active:
                retire()
                store.delete(path)
            return super().open(path)

        def put_unique(self, path: str, size: int, sections: Any) -> Any:
            info = super().put_unique(path, size, sections)
            if when == "at the commit" and "/second/" in path:
                retire()
            return info

    seen = Retiring()
    seen.objects = store.objects
    order = order_of(mount(seen), store, distckpt.Export(key="model"))
    if when == "before":
        retire()
    assert carry_out(order).kind == "gone"
    assert not any("export" in path for path in store.objects)
    assert list(store.list(names.LEASES)) == []


def test_a_directory_that_the_task_cannot_see_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"model": dict(tower(1).state_dict())})
    order = order_of("memory://elsewhere", LocalStore(tmp_path), distckpt.Export(key="model"))
    outcome = carry_out(order)
    assert outcome.kind == "failed"
    assert "all hosts share" in outcome.text


def test_damage_to_an_export_is_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"model": dict(tower(1).state_dict())})
    outcome = carry_out(order_of(str(tmp_path), LocalStore(tmp_path), distckpt.Export(key="model")))
    with distckpt.open(path) as reader:
        assert reader.verify().good
        files = [Path(outcome.text) / module / "model.safetensors" for module in ("first", "second")]
        data = bytearray(files[0].read_bytes())
        data[-1] ^= 1
        files[0].write_bytes(data)
        files[1].unlink()
        damages = reader.verify().damages
    assert [damage.path for damage in damages] == [str(file) for file in files]
    assert "CRC32C" in damages[0].reason
    assert CliRunner().invoke(main, ["verify", path]).exit_code == 1


def test_a_checkpoint_is_shown_with_its_export(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"model": dict(tower(1).state_dict())})
    assert "exported" not in CliRunner().invoke(main, ["show", path]).output
    assert json.loads(CliRunner().invoke(main, ["show", "--json", path]).output)["export"] is None
    outcome = carry_out(order_of(str(tmp_path), LocalStore(tmp_path), distckpt.Export(key="model")))
    assert "first, second" in CliRunner().invoke(main, ["show", path]).output
    shown = json.loads(CliRunner().invoke(main, ["show", "--json", path]).output)["export"]
    assert outcome.text.endswith(f"export-{shown['id']}")
    assert [module["name"] for module in shown["modules"]] == ["first", "second"]


# ---- the manager, its exports made by tasks on Ray ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_ray(ray_address: str) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address=ray_address, namespace="distckpt", log_to_driver=False)
    yield
    ray.shutdown()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes while it is read
        return False


def numbers(manager: distckpt.ExportCheckpointManager) -> list[int | None]:
    return [manager.get_savedmodel_number_from_path(path) for path in manager.savedmodels]


def program(path: str | None, module: str = "tower") -> nn.Module:
    return torch.export.load(f"{path}/{module}/program.pt2").module()


@pytest.mark.usefixtures("on_ray")
def test_what_is_exported_is_what_was_saved(tmp_path: Path) -> None:
    live = tower(1)
    live.example_inputs = inputs()
    with Exporting(distckpt.Checkpoint(model=live), tmp_path, 5, {"tower": live, "part": live.inner}) as manager:
        assert manager.exports == []
        assert manager.latest_savedmodel is None
        answers = {}
        for number in (0, 1):
            answers[number] = output(live)
            manager.save(number)
            with torch.no_grad():
                live.inner.bias += 1.0
        first = manager.wait_for_new_savedmodel(timeout=100)
        second = manager.wait_for_new_savedmodel(first, 0.1, timeout=100)
        manager.wait_for_exports(100)
        assert manager.savedmodels == manager.exports == manager.get_existing_savedmodels() == [first, second]
        assert manager.latest_savedmodel == manager.latest_export == second == distckpt.latest_export(tmp_path)
        assert list(manager.savedmodels_iterator(timeout=0)) == [first, second]
        assert numbers(manager) == [0, 1]
        assert manager.modules_to_export == {"tower": live, "part": live.inner}
    for number, path in enumerate((first, second)):
        found = program(path)(*inputs())
        assert torch.equal(found, answers[number])
        assert not found.requires_grad
        assert set(load_file(f"{path}/part/model.safetensors")) == {"weight", "bias"}
        assert sorted(file.name for file in Path(path).glob("*/*")) == [
            "model.safetensors",
            "model.safetensors",
            "program.pt2",
        ]
        with distckpt.open(f"{tmp_path}/ckpt-{number}") as reader:
            assert reader.verify().good
    assert live.training


@pytest.mark.usefixtures("on_ray")
def test_exports_follow_retention_and_quick_saves_leave_none_half_made(tmp_path: Path) -> None:
    live = tower(1)
    with Exporting(distckpt.Checkpoint(model=live), tmp_path, 1, {"tower": live}) as manager:
        for number in range(1, 9):
            manager.save(number).result(30)
        manager.wait_for_exports(100)
        assert numbers(manager)[-1] == 8
        manager.save(9).result(30)
        manager.wait_for_exports(100)
        manager.save(10).result(30)
        manager.wait_for_exports(100)
        assert numbers(manager) == [10]
    assert [path.name for path in tmp_path.glob("ckpt-*")] == ["ckpt-10"]
    [attempt] = (tmp_path / "ckpt-10").iterdir()
    assert len([path for path in attempt.iterdir() if path.name.startswith("export-")]) == 1


@pytest.mark.usefixtures("on_ray")
def test_a_preserved_checkpoint_keeps_its_export_and_a_later_manager_makes_what_is_missing(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(model=tower(1))
    with distckpt.CheckpointManager(checkpoint, tmp_path, 1, keep_checkpoint_every_n_hours=1e-9) as manager:
        for number in (3, 1):
            manager.save(number).result(30)
    how = {"tower": distckpt.Export(key="model")}
    with Exporting(checkpoint, tmp_path, 1, how, 1e-9) as exporting:
        exporting.wait_for_exports(100)
        assert numbers(exporting) == [3, 1]
        made = [Path(path).stat().st_ctime for path in exporting.exports]
        assert made[::-1] == sorted(made), "the lowest number is made first"
        exporting.save(2).result(30)
        assert exporting.checkpoints == [f"{tmp_path}/ckpt-2"]
        exporting.wait_for_exports(100)
        assert numbers(exporting) == [3, 1, 2]
    [record] = [one for one in read_tail(LocalStore(tmp_path)).state.preserved if one.number == 3]
    assert Path(list_exports(tmp_path)[0], "tower/model.safetensors").exists()
    assert record.attempt in list_exports(tmp_path)[0]


@pytest.mark.usefixtures("on_ray")
def test_a_number_that_is_saved_again_gets_an_export_of_its_own(tmp_path: Path) -> None:
    live = tower(1)
    with Exporting(distckpt.Checkpoint(model=live), tmp_path, 5, {"tower": live}) as manager:
        manager.save(5)
        first = manager.wait_for_new_export(timeout=100)
        with torch.no_grad():
            live.inner.bias += 1.0
        manager.save(5)
        second = manager.wait_for_new_export(first, 0.1, timeout=100)
        manager.wait_for_exports(100)
        assert manager.exports == [second]
        manager.save(6).result(30)
    assert not Path(first).exists()
    assert torch.equal(load_file(f"{second}/tower/model.safetensors")["inner.bias"], live.inner.bias)


@pytest.mark.usefixtures("on_ray")
def test_an_export_that_fails_fails_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = tower(1)
    wrong = (torch.zeros(2, 7),)
    how = {"good": live, "bad": distckpt.Export(Tower, example_inputs=wrong)}
    with Exporting(distckpt.Checkpoint(model=live), tmp_path, 5, how) as manager:
        assert manager.save(41).result(30) == f"{tmp_path}/ckpt-41"
        with pytest.raises(ExportError, match="checkpoint 41, module 'bad', was not exported") as caught:
            manager.wait_for_exports(100)
        assert (caught.value.number, caught.value.module) == (41, "bad")
        manager.wait_for_exports(100)
        assert manager.exports == []
        assert caplog.text.count("checkpoint 41, module 'bad'") == 2, "it is tried once again, and no more"
    assert not list(tmp_path.glob("ckpt-41/*/export*"))
    with (
        pytest.raises(ExportError, match="41"),
        Exporting(distckpt.Checkpoint(model=live), tmp_path, 5, how) as manager,
    ):
        manager.save(42).result(30)
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-42"


@pytest.mark.usefixtures("on_ray")
def test_an_error_does_not_wait_for_an_export(tmp_path: Path) -> None:
    live, blocked = tower(1), tmp_path / "blocked"
    how = {"tower": distckpt.Export(functools.partial(blocks, str(blocked)), example_inputs=inputs())}
    manager = Exporting(distckpt.Checkpoint(model=live), tmp_path / "run", 1, how)
    manager.save(1).result(30)
    assert until(lambda: blocked.exists() and blocked.read_text(), 100)
    assert os.getpriority(os.PRIO_PROCESS, int(blocked.read_text())) == NICENESS, "the CPUs are the training's"
    with pytest.raises(TimeoutError):
        manager.wait_for_exports(0.1)
    for number in (2, 3):
        manager.save(number).result(30)
    assert manager.checkpoints == [f"{tmp_path}/run/ckpt-{number}" for number in (1, 3)], "what is exported stays"
    started = time.monotonic()
    manager.__exit__(KeyError, KeyError("the training loop"), None)
    assert time.monotonic() - started < 20
    assert until(lambda: not is_alive(int(blocked.read_text())), 60)
    assert distckpt.list_exports(tmp_path / "run") == []


def test_a_program_that_leaves_ray_and_closes_nothing_ends_all_the_same(ray_address: str, tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "ranks" / "programs" / "leaves_ray.py")
    done = run_script(script, tmp_path, ray_address, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "checkpoint 1 was not exported: the process has left its Ray cluster" in done.stderr
    assert distckpt.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/ckpt-1"


def test_wrong_options_leave_the_directory_free_and_names_are_apart(tmp_path: Path, on_ray: None) -> None:
    checkpoint, how = distckpt.Checkpoint(model=tower(1)), {"tower": distckpt.Export(key="model")}
    with pytest.raises(ValueError, match="num_cpuss"):
        Exporting(checkpoint, tmp_path, 5, how, task_options={"num_cpuss": 1})
    with Exporting(checkpoint, tmp_path, 5, how, task_options={"num_cpus": 1}) as manager:
        manager.save(1)
    assert numbers(manager) == [1]
    with Exporting(checkpoint, tmp_path, 5, how, checkpoint_name="ckpt-foo") as other:
        other.save(2)
        other.wait_for_exports(100)
        assert numbers(other) == [2]
        assert other.get_savedmodel_number_from_path(manager.latest_export) is None
    assert numbers(manager) == [1]


def test_without_modules_it_is_a_plain_manager(tmp_path: Path) -> None:
    with Exporting(distckpt.Checkpoint(model=tower(1)), tmp_path, 5) as manager:
        manager.save(1).result(30)
        manager.wait_for_exports(0)
        assert manager.exports == []
    assert not list(tmp_path.glob("ckpt-1/*/export*"))


# ---- Transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("on_ray")
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_was_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=16, use_cache=False)
    tokens = torch.arange(8).reshape(1, 8)
    models = {"gpt": small_gpt(), "llama": LlamaForCausalLM(config)}
    models["gpt"].example_inputs = (tokens,)
    build = functools.partial(LlamaForCausalLM, config)
    how = {"gpt": models["gpt"], "llama": distckpt.Export(build, "llama", (tokens,), config=config)}
    with Exporting(distckpt.Checkpoint(**models), tmp_path, 5, how) as manager:
        manager.save(1)
        manager.wait_for_exports(100)
        path = manager.latest_export
    for name, live in models.items():
        expected = live.eval()(tokens).logits
        again = AutoModelForCausalLM.from_pretrained(f"{path}/{name}")
        assert type(again) is type(live)
        assert torch.equal(again(tokens).logits, expected)
        assert torch.equal(program(path, name)(tokens).logits, expected)
        assert json.loads(Path(path, name, "config.json").read_text())["architectures"] == [type(live).__name__]
    assert "lm_head.weight" not in load_file(f"{path}/gpt/model.safetensors")


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_is_exported_from_its_checkpoint(gang2: Gang, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    first, second = gang2.run("ranks.export:export_sharded", directory=str(tmp_path))
    assert first == second
    [path] = first["exports"]
    assert first["latest"] == path
    assert distckpt.export_number(path) == 7
    assert "this one is sharded" in first["refused"]
    tokens = torch.arange(8).reshape(1, 8)
    expected = torch.tensor(first["logits"])
    found = program(path, "program")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, dtype in (("program", torch.float32), ("half", torch.bfloat16), ("weights", torch.float32)):
        again = AutoModelForCausalLM.from_pretrained(f"{path}/{name}", dtype="auto")
        assert type(again) is GPT2LMHeadModel
        assert again.dtype is dtype
        if dtype is torch.float32:
            assert torch.equal(again(tokens).logits, found)
    assert gpt_config().to_dict().items() >= {"model_type": "gpt2"}.items()


@pytest.mark.timeout(120)
def test_a_task_whose_process_dies_is_repeated(gang2: Gang, tmp_path: Path) -> None:
    results = gang2.run(
        "ranks.export:export_in_a_task_that_dies", directory=str(tmp_path / "run"), marker=str(tmp_path / "died")
    )
    assert results[0] == results[1]
    [path] = results[0]
    assert torch.equal(program(path)(*inputs()), output(tower(3)))
    assert len(list(Path(path).parent.glob("export-*"))) == 1


# ---- without Ray: a child process -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(150)
def test_the_example_serves_what_it_exported(tmp_path: Path) -> None:
    done = run_script(ROOT / "examples" / "export.py", "--directory", tmp_path / "run", timeout=140)
    assert done.returncode == 0, done.stderr
    assert "differ by 0.0e+00" in done.stdout
    assert [distckpt.export_number(path) for path in distckpt.list_exports(tmp_path / "run")] == [10, 20]


# ---- a crash between checkpoint and export ------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(150)
def test_a_process_killed_while_it_exports_leaves_nothing_that_counts(tmp_path: Path) -> None:
    run, died, blocked = tmp_path / "run", tmp_path / "died", tmp_path / "blocked"
    arguments = {"directory": str(run), "died": str(died), "blocked": str(blocked)}
    with (
        (tmp_path / "stderr").open("w") as stderr,
        warm().start("ranks.export:save_and_export", arguments, stderr.fileno()) as process,
    ):
        try:
            assert until(lambda: blocked.exists() and blocked.read_text(), 100)
            assert distckpt.list_exports(run) == []
            [half] = run.glob("ckpt-1/*/export-*")
            assert (half / "first/program.pt2").exists()
            child = int(blocked.read_text())
            assert child != process.pid
            assert is_alive(child)
        finally:
            process.kill()
    assert "ended with status -9" in (tmp_path / "stderr").read_text()
    assert until(lambda: not is_alive(child), 60)

    live = tower(1)
    with Exporting(distckpt.Checkpoint(model=live), run, 5, {"first": live}) as manager:
        manager.wait_for_exports(100)
        [path] = manager.exports
    assert not half.exists()
    assert torch.equal(load_file(f"{path}/first/model.safetensors")["seen"], torch.tensor(1.0))
