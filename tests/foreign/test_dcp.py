"""What torch.distributed.checkpoint has written by itself is read without its pickles, and what is exported it loads."""

from __future__ import annotations

import dataclasses
import json
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict

import distckpt
from distckpt.cli.app import main
from distckpt.errors import DamagedError, ForeignError
from tests.support.comparing import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def run(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class InRows(DefaultSavePlanner):
    """Writes tensors of two dimensions as two parts, as two ranks would."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return SavePlan([half for item in plan.items for half in halves(item)], planner_data=plan.planner_data)

    def lookup_object(self, index: Any) -> Any:
        found = self.state_dict[index.fqn]
        if index.offset is None or len(index.offset) != 2:
            return found
        cut = (len(found) + 1) // 2
        return found[cut:] if index.offset[0] else found[:cut]


def halves(item: Any) -> list[Any]:
    data = item.tensor_data
    if data is None or len(data.size) != 2:
        return [item]
    rows, columns = data.size
    cut, made = (rows + 1) // 2, []
    for first, count in ((0, cut), (cut, rows - cut)):
        chunk = ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([count, columns]))
        index = dataclasses.replace(item.index, offset=torch.Size([first, 0]))
        kind = dcp.planner.WriteItemType.SHARD
        made.append(
            dataclasses.replace(item, index=index, type=kind, tensor_data=dataclasses.replace(data, chunk=chunk))
        )
    return made


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Linear(7, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def state() -> dict[str, Any]:
    """What a training has."""
    rest = {
        "step": 7,
        "names": ["a", None],
        "pair": (torch.ones(2), 3),
        "turned": torch.arange(12.0).reshape(3, 2, 2).mT,
    }
    return {**state_of(*trained(3)), "rest": rest, "half": torch.ones(3).bfloat16()}


def test_a_folder_of_dcp_is_imported_bit_for_bit_and_exported_for_dcp_again(tmp_path: Path) -> None:
    saved = state()
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path / "dcp"), planner=InRows())
    told = run("import", tmp_path / "dcp", tmp_path / "run", "--number", 5)
    assert told["left_out"] == {}
    assert same(sorted_of(distckpt.load(tmp_path / "run")), sorted_of(saved))
    with distckpt.read_foreign(tmp_path / "dcp") as foreign:
        assert len(foreign.contents.tensors["model.0.weight"].parts) == 2
        model, optimizer = trained(4)
        foreign.restore(distckpt.Checkpoint(model=model, optimizer=optimizer), select=["model", "optimizer"])
        assert same(
            sorted_of(state_of(model, optimizer)), sorted_of({name: saved[name] for name in ("model", "optimizer")})
        )

    for select, size, files in (("", "5GB", 1), ("", "0.1KB", 10), ("model", "5GB", 1)):
        out = tmp_path / f"{select}-{size}"
        written = run("export", tmp_path / "run", out, "--format", "dcp", "--select", select, "--max-shard-size", size)
        assert len(written["files"]) == files + 1
        expected = state() if not select else state()["model"]
        target = zeroed(expected)
        dcp.load(target, checkpoint_id=out)
        assert same(sorted_of(target), sorted_of(expected))
        with distckpt.read_foreign(out, under=select or "model") as foreign:
            assert same(sorted_of(foreign.load(select or None)), sorted_of(expected))


def zeroed(tree: Any) -> Any:
    """The same tree with other numbers."""
    if isinstance(tree, dict):
        return {key: zeroed(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [zeroed(item) for item in tree]
    return torch.zeros_like(tree) if isinstance(tree, torch.Tensor) else None


def sorted_of(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: sorted_of(tree[key]) for key in sorted(tree)}
    return [sorted_of(item) for item in tree] if isinstance(tree, list) else tree


class Harmful:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def test_nothing_of_a_folder_is_unpickled_and_what_only_that_could_read_is_named(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "evil": Harmful(), "time": timedelta(3)}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(ForeignError) as raised:
        distckpt.read_foreign(tmp_path / "dcp")
    assert raised.value.refused.keys() == {"model.evil", "model.time"}
    with distckpt.read_foreign(tmp_path / "dcp", leave_out=["model.evil", "model.time"]) as foreign:
        assert same(foreign.load(), {"model": {"w": torch.ones(2)}})
    metadata = tmp_path / "dcp" / ".metadata"
    for hurt in (pickle.dumps(Harmful()), metadata.read_bytes()[:-40], b"", pickle.dumps({"a": 1})):
        metadata.write_bytes(hurt)
        with pytest.raises(DamagedError):
            distckpt.read_foreign(tmp_path / "dcp")
