"""What the first release of a format version has written is read, and what was done to it is noticed, for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import CheckpointNotFoundError, DamagedError, DistckptError, UnsupportedFormatError
from distckpt.format import names
from tests.golden import known
from tests.golden.known import described
from tests.golden.write import EXPORTED, GOLDEN, MUTILATED, MUTILATIONS, ONE_RANK, SHARD, THREE_RANKS

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")


def loaded_tensors() -> dict[str, Any]:
    """A NumPy array comes back as a tensor."""
    made = known.tensors()
    return {**made, "array": torch.from_numpy(made["array"])}


def optimizer_state(number: int) -> Any:
    return described(known.moments(number))


def test_the_checkpoint_of_one_rank_holds_what_was_saved() -> None:
    path = GOLDEN / ONE_RANK / "ckpt-3"
    state = distckpt.load(path)
    assert described(state["model"]) == described(known.weights(3))
    assert described(state["optimizer"]["state"]) == optimizer_state(3)
    [group] = state["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    assert described(state["tensors"]) == described(loaded_tensors())
    assert described(state["values"]) == described(known.plain_values())
    assert described(state["progress"]) == described({"step": 3})
    assert described(state["loader"]) == described([known.cursor(3, 0)])
    assert sorted(state) == ["loader", "model", "optimizer", "progress", "save_counter", "tensors", "values"]


def test_the_checkpoint_of_three_ranks_holds_what_was_saved() -> None:
    with distckpt.open(GOLDEN / THREE_RANKS / "ckpt-7") as reader:
        assert reader.manifest.world_size == 3
        assert {shard.rank for shard in reader.manifest.shards} == {0, 1, 2}
        state = reader.load()
    assert described(state["model"]) == described(known.weights(7))
    assert described(state["optimizer"]["state"]) == optimizer_state(7)
    assert described(state["progress"]) == described({"step": 7})
    assert described(state["loader"]) == described([known.cursor(7, rank) for rank in range(3)])


def test_a_folder_copied_alone_opens(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / THREE_RANKS / "ckpt-7", tmp_path / "ckpt-7")
    assert described(distckpt.load(tmp_path / "ckpt-7", "model")) == described(known.weights(7))


def test_the_export_is_what_was_exported() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    directory = GOLDEN / EXPORTED
    [path] = distckpt.list_exports(directory)
    assert path == distckpt.latest_export(directory)
    weights = safetensors.load_file(f"{path}/served/{names.WEIGHTS}")
    assert described(dict(sorted(weights.items()))) == described(dict(sorted(known.weights(1).items())))
    assert json.loads(Path(path, "served", names.CONFIG).read_text()) == {"width": known.WIDTH}


@pytest.mark.parametrize(("name", "numbers"), [(ONE_RANK, [3]), (THREE_RANKS, [7]), (EXPORTED, [1])])
def test_every_byte_is_in_order_and_the_directory_says_what_there_is(name: str, numbers: list[int]) -> None:
    directory = GOLDEN / name
    paths = [str(directory / f"ckpt-{number}") for number in numbers]
    assert distckpt.latest_checkpoint(directory) == paths[-1]
    state = distckpt.get_checkpoint_state(directory)
    assert state is not None
    assert list(state.all_model_checkpoint_paths) == paths
    for path in paths:
        with distckpt.open(path) as reader:
            assert reader.verify().damages == ()


@pytest.mark.parametrize(("name", "number"), [(ONE_RANK, 3), (THREE_RANKS, 7)])
def test_a_run_that_began_then_goes_on_now(name: str, number: int, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(GOLDEN / name, directory)
    objects = {**known.alone(0), "loader": distckpt.PerRank(known.cursor(0, 0), on_resize=lambda states, *_: states[0])}
    if name == THREE_RANKS:
        del objects["tensors"], objects["values"]
    checkpoint = distckpt.Checkpoint(**objects)
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        assert manager.restore_or_initialize() == str(directory / f"ckpt-{number}")
        assert described(dict(checkpoint.model.state_dict())) == described(known.weights(number))
        assert checkpoint.progress == {"step": number}
        assert described(checkpoint.loader.obj) == described(known.cursor(number, 0))
        manager.save(number + 1).result(60)
        assert manager.checkpoints == [str(directory / f"ckpt-{at}") for at in (number, number + 1)]
    before, after = distckpt.load(directory / f"ckpt-{number}"), distckpt.load(directory / f"ckpt-{number + 1}")
    assert described(after["model"]) == described(before["model"])
    assert described(after["optimizer"]["state"]) == described(before["optimizer"]["state"])


# ---- mutilated copies -----------------------------------------------------------------------------------------------

WEIGHTS, STEP, NONE = ("state.weights",), ("state.step",), (None,)
REFUSED: dict[str, tuple[type[DistckptError], str, tuple[str | None, ...]]] = {
    "tensor-flipped": (DamagedError, SHARD, WEIGHTS),
    "value-changed": (DamagedError, SHARD, STEP),
    "shard-cut": (DamagedError, SHARD, WEIGHTS + STEP),
    "shard-gone": (DamagedError, SHARD, WEIGHTS + STEP),
    "shard-of-another": (DamagedError, SHARD, WEIGHTS + STEP),
    "index-changed": (DamagedError, names.INDEX, NONE),
    "index-cut": (DamagedError, names.INDEX, NONE),
    "index-gone": (DamagedError, names.INDEX, NONE),
    "manifest-changed": (DamagedError, names.MANIFEST, NONE),
    "manifest-newer": (DamagedError, names.MANIFEST, NONE),
    "manifest-of-another": (DamagedError, names.MANIFEST, NONE),
    "manifest-gone": (DamagedError, names.MANIFEST, NONE),
    "entry-changed": (CheckpointNotFoundError, "ckpt-2", NONE),
    "entry-newer": (UnsupportedFormatError, names.LOG, NONE),
}
"""What loading raises, which file it names, and which key, or one of which."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_mutilated_copy_is_refused_by_name(name: str) -> None:
    kind, file, keys = REFUSED[name]
    with pytest.raises(kind) as caught:
        distckpt.load(GOLDEN / MUTILATED / name / "ckpt-2")
    assert type(caught.value) is kind
    assert file in caught.value.path
    assert getattr(caught.value, "key", None) in keys
    assert str(caught.value).startswith(caught.value.path)


def test_a_newer_manifest_without_a_log_is_refused_as_of_a_newer_release(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / MUTILATED / "manifest-newer" / "ckpt-2", tmp_path / "ckpt-2")
    with pytest.raises(UnsupportedFormatError, match="2") as caught:
        distckpt.load(tmp_path / "ckpt-2")
    assert caught.value.path.endswith(names.MANIFEST)


ONLY_VERIFIED = {"schema-changed": SHARD}
"""What loading does not read, and verifying does."""


@pytest.mark.parametrize("name", ONLY_VERIFIED)
def test_what_loading_does_not_need_is_found_by_verifying(name: str) -> None:
    path = GOLDEN / MUTILATED / name / "ckpt-2"
    assert described(distckpt.load(path, "state")) == described(known.small(2)["state"])
    with distckpt.open(path) as reader:
        damages = reader.verify().damages
    assert damages
    assert all(ONLY_VERIFIED[name] in damage.path for damage in damages)


def test_each_mutilation_is_known_here() -> None:
    assert set(MUTILATIONS) == {folder.name for folder in (GOLDEN / MUTILATED).iterdir()} == {*REFUSED, *ONLY_VERIFIED}
