"""Less than everything: what is left out is not written, stays as it is in the objects, and is told by whoever lacks it."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn, optim

import distckpt
from distckpt.cli.app import main
from distckpt.directory.locate import locate, read_index
from distckpt.errors import EncodeError, MismatchError, NoGoodCheckpointError, PlanError
from distckpt.state.collector import Collector
from distckpt.state.filler import restore_objects
from distckpt.state.objects import NamedObjects
from distckpt.state.stored import Committed
from tests.support.comparing import same
from tests.support.damage import flip, payload_of
from tests.support.snippets import play


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))


class Run:
    """A model with a frozen first layer, and an optimizer that was given all of it and has trained all of it once."""

    def __init__(self, seed: int = 1, frozen: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = network()
        self.optimizer = optim.Adam(self.model.parameters(), lr=0.1)
        self.progress: dict[str, Any] = {"step": 0, "cache": {"a": 1}}
        self.step()
        self.model[0].requires_grad_(not frozen)
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.model(torch.rand(5, 4)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress["step"] += 1
        self.progress["cache"]["a"] += 10

    def checkpoint(self, **options: Any) -> distckpt.Checkpoint:
        return distckpt.Checkpoint(model=self.model, optimizer=self.optimizer, progress=self.progress, **options)

    def facts(self) -> dict[str, Any]:
        """All there is, by torch's own word."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = dict(sorted(optimizer["state"].items()))
        tree = {"model": dict(self.model.state_dict()), "optimizer": optimizer, "progress": self.progress}
        return copy.deepcopy(tree)


def saved(path: Path, checkpoint: distckpt.Checkpoint) -> str:
    with distckpt.CheckpointManager(checkpoint, path) as manager:
        pending = manager.save(1)
        assert pending is not None
        return pending.result(30)


def keys_of(path: str) -> list[str]:
    with distckpt.open(path) as reader:
        return reader.keys()


EXCLUDE = ["progress.cache", "optimizer.state.1", "model.2.bias"]


def is_left_out(key: str) -> bool:
    return key.startswith(("progress.cache", "optimizer.state.1.", "model.2.bias", "model.0.", "optimizer.state.0."))


def test_what_is_left_out_is_not_written_and_stays_as_it_is_bit_for_bit(tmp_path: Path) -> None:
    run = Run()
    checkpoint = run.checkpoint(exclude=EXCLUDE, only_trainable=True)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        path = manager.save(1).result(30)  # type: ignore[union-attr]
        before = run.facts()
        run.step()
        with torch.no_grad():
            for value in (*run.model.parameters(), *run.model.buffers()):
                value.add_(1)
        now = run.facts()
        manager.restore_or_initialize()
        assert manager.restore_status is not None
        assert manager.restore_status.is_complete
    keys = keys_of(path)
    assert not any(map(is_left_out, keys))
    assert {"model.1.running_mean", "model.2.weight", "optimizer.state.2.bias.exp_avg", "progress.step"} < set(keys)
    expected: dict[str, Any] = {
        "model": {name: (now if is_left_out(f"model.{name}") else before)["model"][name] for name in now["model"]},
        "optimizer": {
            "state": {at: (now if at < 4 else before)["optimizer"]["state"][at] for at in range(6)},
            "param_groups": before["optimizer"]["param_groups"],
        },
        "progress": {"step": before["progress"]["step"], "cache": now["progress"]["cache"]},
    }
    assert same(run.facts(), expected)


def test_a_new_run_with_the_same_base_goes_on_from_what_was_trained(tmp_path: Path) -> None:
    run = Run()
    base = {name: value.clone() for name, value in run.model[0].state_dict().items()}
    run.step()
    path = saved(tmp_path, run.checkpoint(only_trainable=True))
    fresh = Run(2)
    fresh.model[0].load_state_dict(base)
    for parameter in fresh.model[0].parameters():
        fresh.optimizer.state.pop(parameter)
    fresh.checkpoint(only_trainable=True).restore(path).assert_consumed()
    assert same(fresh.model.state_dict(), run.model.state_dict())
    theirs, ours = run.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    assert same(ours, {at: theirs[at] for at in range(2, 6)})


def test_shards_shrink_by_what_is_left_out(tmp_path: Path) -> None:
    def size(options: dict[str, Any]) -> int:
        frozen, head = nn.Linear(512, 512), nn.Linear(8, 8)
        frozen.requires_grad_(False)
        checkpoint = distckpt.Checkpoint(model=nn.Sequential(frozen, head), **options)
        path = saved(tmp_path / str(len(list(tmp_path.iterdir()))), checkpoint)
        return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())

    assert size({}) > 512 * 512 * 4
    assert size({"only_trainable": True}) < 16_000
    assert size({"exclude": "model.0"}) < 16_000


def test_an_exclusion_that_matches_nothing_is_refused_by_name(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(Run().checkpoint(exclude=["model.0", "optimiser"]), tmp_path) as manager:
        with pytest.raises(PlanError, match=r"exclude='optimiser'.*did you mean 'optimizer'"):
            manager.save(1).result(30)  # type: ignore[union-attr]
        with pytest.raises(PlanError, match="optimiser"):
            manager.prepare()
        assert manager.latest_checkpoint is None


def test_an_exclusion_may_be_of_state_that_comes_later(tmp_path: Path) -> None:
    model = network()
    optimizer = optim.Adam(model.parameters())
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, exclude="optimizer.state.0.weight.exp_avg")
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1).result(30)  # type: ignore[union-attr]
        model(torch.rand(5, 4)).sum().backward()
        optimizer.step()
        path = manager.save(2).result(30)  # type: ignore[union-attr]
    assert "optimizer.state.0.weight.exp_avg_sq" in keys_of(path)
    assert "optimizer.state.0.weight.exp_avg" not in keys_of(path)


@pytest.mark.parametrize(
    "exclude", ["optimizer.state.0", ["optimizer.state.0", "optimizer.state.1", "optimizer.state.2"]]
)
def test_state_that_is_left_out_stays_when_there_was_none_yet(tmp_path: Path, exclude: Any) -> None:
    run = Run(frozen=False)
    trained = dict(run.optimizer.state)
    run.optimizer.state.clear()
    path = saved(tmp_path, run.checkpoint(exclude=exclude))
    run.optimizer.state.update(trained)
    before = run.facts()["optimizer"]["state"]
    run.checkpoint(exclude=exclude).restore(path).assert_consumed()
    assert same(
        run.facts()["optimizer"]["state"], {at: before[at] for at in (range(6) if type(exclude) is list else (0, 1))}
    )


def test_state_that_is_left_out_keeps_its_dtype(tmp_path: Path) -> None:
    model = nn.Linear(6, 3).bfloat16()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter]["master"] = torch.rand(parameter.shape)
    model.weight.requires_grad_(False)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, only_trainable=True)
    path = saved(tmp_path, checkpoint)
    before = optimizer.state[model.weight]["master"].clone()
    checkpoint.restore(path).assert_consumed()
    assert same(optimizer.state[model.weight]["master"], before)


def test_a_part_of_an_optimizer_of_which_all_state_is_left_out_is_restored(tmp_path: Path) -> None:
    run = Run()
    exclude = [f"optimizer.state.{at}" for at in range(3)]
    path = saved(tmp_path, run.checkpoint(exclude=exclude))
    run.optimizer.param_groups[0]["lr"] = 7.0
    before = run.facts()["optimizer"]["state"]
    run.checkpoint(exclude=exclude).restore(path).assert_consumed()
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert same(run.facts()["optimizer"]["state"], before)


def test_an_object_that_could_not_be_saved_can_be_excluded(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(
        model=network(), view=lambda: None, rest={"f": print, "x": 1}, exclude=["view", "rest.f"]
    )
    assert not {"view", "rest.f"} & set(keys_of(saved(tmp_path, checkpoint)))


def test_an_item_of_a_list_is_not_left_out_alone(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(layers=[torch.zeros(2), torch.ones(2)], exclude="layers.0")
    with (
        distckpt.CheckpointManager(checkpoint, tmp_path) as manager,
        pytest.raises(EncodeError, match=r"exclude='layers\.0'"),
    ):
        manager.save(1)


@pytest.mark.parametrize(
    "wrong", [{"exclude": [""]}, {"exclude": [3]}, {"only_trainable": "progress"}, {"only_trainable": ["no"]}]
)
def test_what_cannot_name_anything_is_refused_when_the_checkpoint_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Run().checkpoint(**wrong)


def test_a_module_that_would_be_left_out_whole_is_refused_unless_that_was_said(tmp_path: Path) -> None:
    average = network().requires_grad_(False)
    run = Run()
    with (
        distckpt.CheckpointManager(run.checkpoint(average=average, only_trainable=True), tmp_path) as manager,
        pytest.raises(EncodeError, match=r"average: not one of its parameters is trained.*exclude='average'"),
    ):
        manager.save(1)
    for at, options in enumerate(({"only_trainable": "model"}, {"only_trainable": True, "exclude": "average"})):
        keys = keys_of(saved(tmp_path / str(at), run.checkpoint(average=average, **options)))
        assert "model.0.weight" not in keys
        assert ("average.0.weight" in keys) == (at == 0)


def test_the_layout_holds_until_something_begins_or_ends_to_be_trained() -> None:
    run = Run()
    collector = Collector(run.checkpoint(only_trainable=True, exclude="progress.cache"), 0, 1)
    first = collector.collect()
    run.step()
    second = collector.collect()
    run.model[0].bias.requires_grad_(True)
    third = collector.collect()
    run.model[0].bias.requires_grad_(False)
    fourth = collector.collect()
    assert first.description.digest == second.description.digest != third.description.digest
    assert {row.key for row in third.rows} - {row.key for row in second.rows} == {
        "model.0.bias",
        *(f"optimizer.state.0.bias.{name}" for name in ("step", "exp_avg", "exp_avg_sq")),
    }
    assert fourth.description.digest == third.description.digest  # nothing else has what it learned meanwhile


def test_what_was_trained_once_is_saved_from_then_on_also_by_another_run(tmp_path: Path) -> None:
    run = Run(frozen=False)
    checkpoint = run.checkpoint(only_trainable=True)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1).result(30)  # type: ignore[union-attr]
        run.model[0].requires_grad_(False)
        second = manager.save(2).result(30)  # type: ignore[union-attr]
    assert "model.0.weight" in keys_of(second)
    later = Run(3)
    with distckpt.CheckpointManager(later.checkpoint(only_trainable=True), tmp_path) as manager:
        manager.restore()
        assert same(later.model.state_dict(), run.model.state_dict())
        third = manager.save(3).result(30)  # type: ignore[union-attr]
    assert keys_of(third) == keys_of(second)


def test_what_began_to_be_trained_is_missing_in_a_checkpoint_from_before(tmp_path: Path) -> None:
    run = Run()
    with distckpt.CheckpointManager(run.checkpoint(only_trainable=True), tmp_path) as manager:
        manager.save(1).result(30)  # type: ignore[union-attr]
        run.model[0].requires_grad_(True)
        manager.save(2).result(30)  # type: ignore[union-attr]
        run.model[0].requires_grad_(False)
        before = run.facts()
        with pytest.raises(MismatchError, match=r"model\.0\.weight.*left out when it was saved, with only_trainable"):
            manager.restore(1)
        assert same(run.facts(), before)


def test_what_a_damaged_checkpoint_has_touched_is_not_taken_for_the_base(tmp_path: Path) -> None:
    run = Run()
    run.model[0] = nn.Linear(4, 64).requires_grad_(False)
    checkpoint = distckpt.Checkpoint(model=run.model, only_trainable=True)
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        manager.save(1).result(30)  # type: ignore[union-attr]
        run.model[0].requires_grad_(True)
        second = manager.save(2).result(30)  # type: ignore[union-attr]
    file, end = payload_of(Path(second), "model.0.weight")
    flip(file, end - 1)
    later = distckpt.Checkpoint(model=Run(2).model, only_trainable=True)
    with (
        distckpt.CheckpointManager(later, tmp_path) as manager,
        pytest.raises(NoGoodCheckpointError, match=r"ckpt-2: .*CRC.*ckpt-1: .*model\.0\.weight") as caught,
    ):
        manager.restore()
    assert caught.value.spoiled


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    run = Run()
    with distckpt.CheckpointManager(run.checkpoint(only_trainable=True, exclude="progress.cache"), tmp_path) as manager:
        manager.save(1).result(30)  # type: ignore[union-attr]
        before = run.facts()
        run.step()
        second = manager.save(2).result(30)  # type: ignore[union-attr]
        file, end = payload_of(Path(second), "model.2.weight")
        flip(file, end - 1)
        assert manager.restore() == f"{tmp_path}/ckpt-1"
    assert same(run.facts(), {**before, "progress": {"step": 1, "cache": {"a": 21}}})


def test_a_checkpoint_of_everything_is_restored_but_for_what_is_excluded_here(tmp_path: Path) -> None:
    run = Run()
    path = saved(tmp_path, run.checkpoint())
    other = Run(2)
    before = other.facts()
    checkpoint = other.checkpoint(exclude="model.2", only_trainable=True)
    checkpoint.restore(path).assert_consumed()
    assert same(other.model[0].state_dict(), run.model[0].state_dict())
    assert same(other.model[2].weight.detach(), before["model"]["2.weight"])
    with pytest.raises(ValueError, match=r"model\.2\.bias.*is excluded from this Checkpoint"):
        checkpoint.restore(path, select="model.2")
    again = saved(tmp_path / "again", checkpoint)
    assert {"model.0.weight", "optimizer.state.0.weight.exp_avg"} < set(keys_of(again))  # it may be nowhere else
    assert not [key for key in keys_of(again) if key.startswith("model.2")]


def test_a_base_that_a_checkpoint_of_its_own_has_restored_is_not_saved(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", distckpt.Checkpoint(model=Run().model))
    run = Run(2)
    distckpt.Checkpoint(model=run.model).restore(base).assert_consumed()
    assert "model.0.weight" not in keys_of(saved(tmp_path / "run", run.checkpoint(only_trainable=True)))


def test_whoever_misses_what_was_left_out_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, Run().checkpoint(exclude="progress.cache", only_trainable=True))
    other = Run(2).checkpoint()
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with (
        distckpt.CheckpointManager(other, tmp_path) as manager,
        pytest.raises(MismatchError, match=r"exclude=\['progress.cache'\] and only_trainable") as caught,
    ):
        manager.restore()
    assert pickle.loads(pickle.dumps(caught.value)).note == caught.value.note
    assert same(dict(other.model.state_dict()), before)
    status = other.restore(path)
    assert set(status.left_out) == set(status.missing) > {"model.0.weight", "progress.cache.a"}
    assert "left out when it was saved" in caplog.text
    with distckpt.open(path) as reader:
        for ask in (
            lambda: reader.tensor("model.0.weight"),
            lambda: reader.load("model.0"),
            lambda: reader.value("progress.cache.a"),
        ):
            with pytest.raises(KeyError, match="left out when it was saved"):
                ask()
        assert reader.manifest.left_out is not None
        assert reader.manifest.left_out.keys[:2] == ("model.0.weight", "model.0.bias")
    with pytest.raises(KeyError, match="left out when it was saved"):
        other.restore(path, select="model.0")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        distckpt.load(path, "model.2")
        assert caplog.text == ""
        distckpt.load(path, "model")
        assert "some was left out when it was saved" in caplog.text
    shown = CliRunner().invoke(main, ["show", path]).output
    assert "left out: progress.cache by exclude; model.0.weight, model.0.bias" in " ".join(shown.split())


@pytest.mark.parametrize("kind", ["tree", "module", "stateful", "optimizer"])
@pytest.mark.parametrize("world", [1, 2])
def test_state_of_single_ranks_is_left_out_by_its_key_without_the_rank(tmp_path: Path, kind: str, world: int) -> None:
    def make(seed: int) -> tuple[Any, str, str]:
        run = Run(seed, frozen=False)
        if kind == "tree":
            return {"cursor": seed, "cache": {"a": torch.full((3,), seed)}}, "own.cache", "own@0.cache.a"
        if kind == "stateful":
            return optim.lr_scheduler.StepLR(run.optimizer, seed), "own.step_size", "own@0.step_size"
        return (
            (run.model, "own.0.bias", "own@0.0.bias")
            if kind == "module"
            else (run.optimizer, "own.state.1", "own@0.state.1.exp_avg")
        )

    def resized(states: list[Any], rank: int, size: int) -> Any:
        return states[0]

    def checkpoint(seed: int) -> tuple[NamedObjects, str]:
        obj, exclude, key = make(seed)
        return distckpt.Checkpoint(own=distckpt.PerRank(obj, on_resize=resized), exclude=exclude), key

    def held(objects: NamedObjects) -> dict[str, Any]:
        everything = NamedObjects(**objects.objects)
        holding = Collector(everything, 0, 1).collect()
        parts = zip(holding.rows, holding.sources, holding.values, strict=True)
        found = {row.key: value if source is None else source.clone() for row, source, value in parts}
        return dict(sorted(found.items()))

    theirs, key = checkpoint(5)
    path = saved(tmp_path, theirs)
    assert not any(one.startswith(key) for one in keys_of(path))
    ours, _ = checkpoint(7)
    before, wanted = held(ours), held(theirs)
    assert not same(before[key], wanted[key])
    where = locate(path)
    restore_objects(ours, Committed(where, read_index(where)), 0, world).assert_consumed()
    lost = {one for one in wanted if one not in keys_of(path)}
    assert same(held(ours), {one: before[one] if one in lost else wanted[one] for one in wanted})


def test_an_adapter_is_saved_by_the_names_that_peft_knows(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))

    model = adapted(1)
    names = {"distckpt": distckpt, "get_peft_model": lambda base, config: model, "base": None, "LoraConfig": dict}
    names |= {"optimizer": {"lr": 1.0}, "ema": {"a": 1.0}, "loader": {"cursor": 1, "cache": {"a": 2}}}
    program = play("docs/saving.md", 0, names, None, {"...": ""})
    path = saved(tmp_path, program["checkpoint"])
    other = adapted(2)
    names = {"distckpt": distckpt, "path": path, "model": other}
    program = play("docs/saving.md", 2, {**names, "set_peft_model_state_dict": peft.set_peft_model_state_dict})
    assert same(program["state"], dict(peft.get_peft_model_state_dict(model)))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    path = saved(tmp_path / "alone", distckpt.Checkpoint(model=model, only_trainable=True))
    other = adapted(2)
    distckpt.Checkpoint(model=other, only_trainable=True).restore(path).assert_consumed()
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    nbytes = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    assert nbytes < sum(value.nbytes for value in program["state"].values()) + 16_000
