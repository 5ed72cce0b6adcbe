from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import msgspec
import pyarrow as pa
import pytest
import torch

import distckpt
from distckpt.directory.locate import Located, read_manifest
from distckpt.errors import CheckpointNotFoundError, DamagedError
from distckpt.format import names
from distckpt.format.json.sealed import seal
from distckpt.reader import CheckpointReader, VerifyReport
from distckpt.storage import MemoryStore, open_store
from tests.support.checkpoints import (
    PerRankValues,
    append_state,
    commit_bare,
    new_attempt,
    put_manifest,
    write_checkpoint,
)
from tests.support.comparing import same
from tests.support.damage import copied, flip


def a_tree() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model": {
            "layers.0.weight": torch.randn(40, 30, generator=generator),
            "layers.0.bias": torch.randn(40, generator=generator).bfloat16(),
            "layers.1.weight": torch.randn(400, 300, generator=generator),
            "scale": torch.tensor(2.5, dtype=torch.float64),
        },
        "optimizer": {
            "state": {"layers.0.weight": {"exp_avg": torch.randn(40, 30, generator=generator), "step": 12}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": ["layers.0.weight"]}],
        },
        "history": [torch.arange(3), (torch.ones(2, dtype=torch.bool), "text"), None],
        "step": 12,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tree above, saved by three ranks; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("saved"), 12, a_tree(), ranks=3)


@pytest.fixture
def ours(saved: str, tmp_path: Path) -> Path:
    """The folder of an attempt of the same, to be changed."""
    return next((copied(Path(saved).parent, tmp_path) / "ckpt-12").iterdir())


def place_of(reader: CheckpointReader, key: str, at: int = 0) -> tuple[str, int]:
    """File name and position of the first byte of the ``at``-th chunk of a key."""
    index = reader._index
    row = int(index.rows(key)[at])
    return names.shard_name(int(index.rank[row]), int(index.shard[row])), int(index.position[row])


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_load_gives_back_what_was_saved(tmp_path: Path, ranks: int) -> None:
    path = write_checkpoint(tmp_path, 12, a_tree(), ranks)
    assert same(distckpt.load(path), a_tree())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.complex32,
        torch.int8,
        torch.uint16,
        torch.bool,
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (64 * dtype.itemsize,), dtype=torch.uint8)
    tree = {"t": {"full": bits.view(dtype).reshape(8, 8), "empty": torch.empty(0, 4, dtype=dtype)}}
    assert same(distckpt.load(write_checkpoint(tmp_path, 1, tree, ranks=2)), tree)


def test_loaded_tensors_are_ones_own(saved: str) -> None:
    first, second = distckpt.load(saved, "model"), distckpt.load(saved, "model")
    first["scale"].zero_()
    first["layers.0.weight"].zero_()
    assert not second["layers.0.weight"].eq(0).all()
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in second.values())


def test_per_rank_state_is_a_list_in_order_of_rank(tmp_path: Path) -> None:
    states = [{"cursor": rank, "rng": torch.full((3,), rank)} for rank in range(12)]
    path = write_checkpoint(tmp_path, 1, {"loader": PerRankValues(states), "step": 3}, ranks=12)
    assert same(distckpt.load(path), {"loader": states, "step": 3})
    assert same(distckpt.load(path, "loader"), states)
    assert same(distckpt.load(path, "loader@11"), states[11])
    assert distckpt.load(path, "loader@2.cursor") == 2


def test_a_checkpoint_of_nothing_loads_as_nothing(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 0, {})
    assert distckpt.load(path) == {}
    assert distckpt.open(path).verify().good


def test_a_model_can_be_filled_from_the_part_that_is_its_own(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    path = write_checkpoint(tmp_path, 1, {"model": dict(model.state_dict()), "step": 1}, ranks=2)
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    other.load_state_dict(distckpt.load(path, select="model"))
    assert same(dict(other.state_dict()), dict(model.state_dict()))


# ---- choosing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("model", lambda tree: tree["model"]),
        ("model.scale", lambda tree: tree["model"]["scale"]),
        ("model.layers.0", lambda tree: {key: tree["model"][f"layers.0.{key}"] for key in ("weight", "bias")}),
        (
            "model.layers",
            lambda tree: {key: tree["model"][f"layers.{key}"] for key in ("0.weight", "0.bias", "1.weight")},
        ),
        ("optimizer.state", lambda tree: tree["optimizer"]["state"]),
        ("optimizer.param_groups", lambda tree: tree["optimizer"]["param_groups"]),
        ("history", lambda tree: tree["history"]),
        ("history.1", lambda tree: tree["history"][1]),
        ("history.1.1", lambda tree: "text"),
        ("step", lambda tree: 12),
        ([], lambda tree: {}),
        (["step", "model.scale"], lambda tree: {"step": 12, "model.scale": tree["model"]["scale"]}),
        (("history", "history.0"), lambda tree: {"history": tree["history"], "history.0": tree["history"][0]}),
    ],
)
def test_select_returns_what_is_below_a_place(saved: str, select: Any, expected: Callable[[Any], Any]) -> None:
    assert same(distckpt.load(saved, select), expected(a_tree()))


@pytest.mark.parametrize(
    "select", ["models", "mode", "model.layer", "model.", "", "step.x", "optimizer.param_groups.0"]
)
def test_an_unknown_place_is_a_key_error(saved: str, select: str) -> None:
    with pytest.raises(KeyError, match="has no key"):
        distckpt.load(saved, select)
    with pytest.raises(KeyError, match="has no key"):
        distckpt.load(saved, ["step", select])


def test_an_unknown_place_is_told_with_similar_ones(saved: str) -> None:
    with pytest.raises(KeyError, match=r"no key 'model.layers.0.wieght'; did you mean 'model.layers.0.weight'"):
        distckpt.load(saved, "model.layers.0.wieght")
    with pytest.raises(KeyError, match="'model'"):
        distckpt.load(saved, "modle")


def test_only_what_is_selected_is_read(ours: Path) -> None:
    path = ours.parent
    with distckpt.open(path) as reader:
        for at in range(3):
            name, position = place_of(reader, "model.layers.1.weight", at)
            flip(ours / name, position)
    assert same(distckpt.load(path, "optimizer"), a_tree()["optimizer"])
    with pytest.raises(DamagedError, match=r"layers\.1\.weight"):
        distckpt.load(path, "model")


# ---- the reader ---------------------------------------------------------------------------------------------------


def test_reader_tells_what_is_there(saved: str) -> None:
    with distckpt.open(saved) as reader:
        assert reader.path == saved
        assert reader.manifest.number == 12
        assert reader.manifest.world_size == 3
        assert sorted(reader.keys()) == [
            "history.0",
            "history.1.0",
            "history.1.1",
            "history.2",
            "model.layers.0.bias",
            "model.layers.0.weight",
            "model.layers.1.weight",
            "model.scale",
            "optimizer.param_groups",
            "optimizer.state.layers.0.weight.exp_avg",
            "optimizer.state.layers.0.weight.step",
            "step",
        ]
        info = reader.info("model.layers.1.weight")
        assert (info.shape, info.dtype, info.nbytes, info.ranks) == ((400, 300), "float32", 480_000, (0, 1, 2))
        assert reader.info("step").dtype == "json"


def test_reader_reads_one_by_one(saved: str) -> None:
    with distckpt.open(saved) as reader:
        assert same(reader.tensor("model.layers.1.weight"), a_tree()["model"]["layers.1.weight"])
        assert same(reader.tensor("model.scale"), a_tree()["model"]["scale"])
        assert reader.value("step") == 12
        assert reader.value("optimizer.param_groups") == a_tree()["optimizer"]["param_groups"]


def test_reader_refuses_what_it_does_not_have(saved: str) -> None:
    with distckpt.open(saved) as reader:
        with pytest.raises(ValueError, match=r"read it with value\(\)"):
            reader.tensor("step")
        with pytest.raises(ValueError, match=r"read it with tensor\(\)"):
            reader.value("model.scale")
        for method in (reader.info, reader.tensor, reader.value):
            with pytest.raises(KeyError, match=r"did you mean 'model\.scale'"):
                method("model.scal")


def test_a_closed_reader_reads_no_more(saved: str) -> None:
    with distckpt.open(saved) as reader:
        pass
    reader.close()
    assert reader.path == saved
    with pytest.raises(ValueError, match="has been closed"):
        reader.load()


# ---- which checkpoint a path means --------------------------------------------------------------------------------


def test_a_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 9, {"step": 9})
    write_checkpoint(tmp_path, 3, {"step": 3})
    assert distckpt.load(tmp_path) == {"step": 3}
    assert distckpt.load(tmp_path / "ckpt-9") == {"step": 9}


def test_the_attempt_that_the_log_names_is_the_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"step": "first"})
    write_checkpoint(tmp_path, 1, {"step": "second"})
    assert len(list(Path(path).iterdir())) == 2
    assert distckpt.load(path) == {"step": "second"}


def test_a_checkpoint_copied_alone_opens(saved: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere")
    with distckpt.open(tmp_path / "elsewhere") as reader:
        assert same(reader.load(), a_tree())
        assert reader.verify().good


def test_a_url_opens_like_a_path() -> None:
    store = MemoryStore.named("loading-test")
    path = write_checkpoint(store.url, 1, a_tree(), ranks=2)
    assert path == "memory://loading-test/ckpt-1"
    assert same(distckpt.load(path), a_tree())
    assert distckpt.latest_checkpoint(store.url) == path


@pytest.mark.parametrize("path", ["", "ckpt-2", "nowhere", "nowhere/ckpt-1"])
def test_what_is_not_committed_is_not_found(tmp_path: Path, path: str) -> None:
    put_manifest(open_store(tmp_path), 2, new_attempt())
    append_state(open_store(tmp_path), lambda state: state, kind="claim")
    with pytest.raises(CheckpointNotFoundError):
        distckpt.open(tmp_path / path)


# ---- the newest ---------------------------------------------------------------------------------------------------


def test_latest_is_the_last_one_committed(tmp_path: Path) -> None:
    commit_bare(tmp_path, 10)
    last = commit_bare(tmp_path, 9)
    put_manifest(open_store(tmp_path), 11, new_attempt())
    assert distckpt.latest_checkpoint(tmp_path) == distckpt.latest_checkpoint(str(tmp_path), "checkpoint") == last


def test_there_is_no_latest_without_commits(tmp_path: Path) -> None:
    assert distckpt.latest_checkpoint(tmp_path) is None
    assert distckpt.latest_checkpoint(tmp_path / "nowhere") is None
    append_state(open_store(tmp_path), lambda state: state, kind="claim")
    assert distckpt.latest_checkpoint(tmp_path) is None


def test_latest_is_what_is_left_when_its_manifest_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = commit_bare(tmp_path, 1)
    last = commit_bare(tmp_path, 2)
    next(Path(last).glob("*/manifest.json")).unlink()
    assert distckpt.latest_checkpoint(tmp_path) == first
    assert last in caplog.text


def test_latest_passes_over_damaged_entries_until_nothing_is_left(tmp_path: Path) -> None:
    first = commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    flip(tmp_path / names.entry_path(2), 30)
    assert distckpt.latest_checkpoint(tmp_path) == first
    flip(tmp_path / names.entry_path(1), 30)
    with pytest.raises(DamagedError):
        distckpt.latest_checkpoint(tmp_path)


def test_latest_of_another_state_file_is_what_that_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    assert distckpt.latest_checkpoint(tmp_path, "best") is None
    distckpt.update_checkpoint_state(tmp_path, first, latest_filename="best")
    assert distckpt.latest_checkpoint(tmp_path, "best") == first
    distckpt.update_checkpoint_state(tmp_path, "ckpt-7", latest_filename="best")
    assert distckpt.latest_checkpoint(tmp_path, "best") is None
    assert "ckpt-7" in caplog.text


# ---- damage -------------------------------------------------------------------------------------------------------


def verified(attempt: Path) -> VerifyReport:
    with distckpt.open(attempt.parent) as reader:
        return reader.verify()


def test_a_good_checkpoint_is_good(saved: str) -> None:
    calls: list[tuple[int, int]] = []
    with distckpt.open(saved) as reader:
        report = reader.verify(lambda done, total: calls.append((done, total)))
        expected = sum(shard.size for shard in reader.manifest.shards) + reader.manifest.index_size
    assert report == VerifyReport(saved, 12, 3, expected, ())
    assert report.good
    assert calls == sorted(calls)
    assert calls[-1] == (expected, expected)


def test_load_refuses_a_flipped_bit_and_names_shard_and_key(ours: Path) -> None:
    with distckpt.open(ours.parent) as reader:
        name, position = place_of(reader, "optimizer.state.layers.0.weight.exp_avg", 1)
    flip(ours / name, position + 5)
    with pytest.raises(DamagedError) as caught:
        distckpt.load(ours.parent)
    assert caught.value.key == "optimizer.state.layers.0.weight.exp_avg"
    assert caught.value.path == str(ours / name)


def test_verify_finds_a_flip_anywhere(ours: Path) -> None:
    for file in sorted(ours.iterdir()):
        content = file.read_bytes()
        for position in range(3, len(content), max(1, len(content) // 30)):
            flip(file, position)
            try:
                assert not verified(ours).good, f"{file.name} at {position}"
            except DamagedError as error:
                assert file.name in ("manifest.json", "index.arrow"), error  # noqa: PT017
            file.write_bytes(content)
    assert verified(ours).good


def test_verify_lists_every_damage(ours: Path) -> None:
    with distckpt.open(ours.parent) as reader:
        hurt = [("model.layers.1.weight", 2), ("model.layers.0.bias", 0), ("step", 0)]
        for key, at in hurt:
            name, position = place_of(reader, key, at)
            flip(ours / name, position)
    shards = sorted(ours.glob("*-0.arrow"))
    flip(shards[1], shards[1].stat().st_size - 30)  # the footer
    damages = verified(ours).damages
    found = {damage.key for damage in damages if damage.key is not None}
    assert found == {key for key, _ in hurt}
    assert {damage.path for damage in damages} == set(map(str, shards))
    assert all("CRC32C" in damage.reason for damage in damages if damage.key is not None)


def test_verify_tells_each_damaged_block_of_a_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"t": torch.zeros(1 << 20, dtype=torch.uint8)})
    attempt = next(Path(path).iterdir())
    with distckpt.open(path) as reader:
        name, position = place_of(reader, "t")
        block = int(reader._index.block[0])
    flip(attempt / name, position)
    flip(attempt / name, position + 5 * block)
    reasons = [damage.reason for damage in verified(attempt).damages if damage.key == "t"]
    assert [reason.partition(":")[0] for reason in reasons] == [
        f"bytes {position} to {position + block}",
        f"bytes {position + 5 * block} to {position + 6 * block}",
    ]


def test_verify_tells_what_a_cut_shard_has_lost(ours: Path) -> None:
    with distckpt.open(ours.parent) as reader:
        name, position = place_of(reader, "model.layers.1.weight", 1)
        lost = {
            reader._index.names[key]
            for key, rank, end in zip(
                reader._index.key, reader._index.rank, reader._index.position + reader._index.size, strict=True
            )
            if rank == 1 and end > position + 4
        }
    with (ours / name).open("r+b") as file:
        file.truncate(position + 4)
    damages = verified(ours).damages
    assert "should have" in damages[0].reason
    assert {damage.key for damage in damages[1:]} == lost
    assert "model.layers.1.weight" in lost


def test_verify_tells_a_shard_that_is_missing_or_too_long(ours: Path) -> None:
    first, second, _ = sorted(ours.glob("*-0.arrow"))
    first.unlink()
    with second.open("ab") as file:
        file.write(b"\0")
    missing, long = verified(ours).damages
    assert missing.path == str(first)
    assert "no such" in missing.reason
    assert long.path == str(second)


def test_verify_tells_an_index_that_changed_while_open(ours: Path) -> None:
    with distckpt.open(ours.parent) as reader:
        flip(ours / "index.arrow", 600)
        (ours / "manifest.json").unlink()
        paths = [damage.path for damage in reader.verify().damages]
    assert paths == [str(ours / "manifest.json"), str(ours / "index.arrow")]


def test_a_damaged_manifest_or_index_does_not_open(ours: Path) -> None:
    for name in ("manifest.json", "index.arrow"):
        content = (ours / name).read_bytes()
        flip(ours / name, len(content) // 2)
        with pytest.raises(DamagedError, match=name):
            distckpt.open(ours.parent)
        (ours / name).write_bytes(content)
    assert verified(ours).good


# ---- whole but wrong: every checksum is right, and still it does not fit together -----------------------------------


@pytest.fixture
def forged(tmp_path: Path) -> Callable[[Callable[[pa.Table], pa.Table]], CheckpointReader]:
    """A lone checkpoint of two equal-sized tensors whose index has been rewritten, checksums and all."""
    write_checkpoint(tmp_path / "run", 1, {"a": torch.arange(50), "b": torch.arange(50) + 1, "n": 5})
    shutil.copytree(tmp_path / "run/ckpt-1", tmp_path / "alone")
    attempt = next((tmp_path / "alone").iterdir())

    def forge(change: Callable[[pa.Table], pa.Table]) -> CheckpointReader:
        with pa.ipc.open_file(attempt / "index.arrow") as file:
            table = change(file.read_all()).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        index = sink.getvalue().to_pybytes()
        store = open_store(tmp_path / "alone")
        manifest = read_manifest(store, attempt.name)
        manifest = msgspec.structs.replace(manifest, index_size=len(index), index_crc32c=crc32c.crc32c(index))
        (attempt / "index.arrow").write_bytes(index)
        (attempt / "manifest.json").write_bytes(seal(manifest))
        return CheckpointReader(Located(store, attempt.name, str(tmp_path / "alone"), manifest))

    return forge


def test_verify_finds_an_index_that_swaps_two_tensors(
    forged: Callable[[Callable[[pa.Table], pa.Table]], CheckpointReader],
) -> None:
    def swap(table: pa.Table) -> pa.Table:
        keys = [{"a": "b", "b": "a"}.get(key, key) for key in table["key"].to_pylist()]
        return table.set_column(0, table.schema.field(0), pa.array(keys).dictionary_encode())

    report = forged(swap).verify()
    assert {damage.key for damage in report.damages} == {"a", "b"}
    assert "key" in report.damages[0].reason


def test_verify_finds_an_index_that_points_elsewhere(
    forged: Callable[[Callable[[pa.Table], pa.Table]], CheckpointReader],
) -> None:
    def point_a_to_b(table: pa.Table) -> pa.Table:
        at = {key: row for row, key in enumerate(table["key"].to_pylist())}
        for name in ("position", "crc32c", "blocks"):
            column = table[name].to_pylist()
            column[at["a"]], column[at["b"]] = column[at["b"]], column[at["a"]]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(column, table[name].type))
        return table

    report = forged(point_a_to_b).verify()
    assert {damage.key for damage in report.damages} == {"a", "b"}


def test_an_index_that_lacks_part_of_a_tensor_is_found(
    forged: Callable[[Callable[[pa.Table], pa.Table]], CheckpointReader],
) -> None:
    def widen(table: pa.Table) -> pa.Table:
        rows = zip(table["key"].to_pylist(), table["shape"].to_pylist(), strict=True)
        shapes = [[60] if key == "a" else shape for key, shape in rows]
        return table.set_column(3, table.schema.field(3), pa.array(shapes, table["shape"].type))

    with pytest.raises(DamagedError, match="as many bytes") as refused:
        forged(widen)
    assert refused.value.key == "a"


# ---- what is not imported -----------------------------------------------------------------------------------------


def test_opening_and_verifying_needs_neither_torch_nor_ray(saved: str) -> None:
    script = (
        "import sys, distckpt; reader = distckpt.open(sys.argv[1]); assert reader.verify().good; "
        "assert distckpt.latest_checkpoint(sys.argv[2]) == sys.argv[1]; "
        "print([name for name in ('torch', 'ray', 'fsspec', 'gcsfs') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, saved, str(Path(saved).parent)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_variables_are_listed_and_loaded_by_their_names(saved: str) -> None:
    listed = distckpt.list_variables(saved)
    with distckpt.open(saved) as reader:
        assert [name for name, _ in listed] == sorted(reader.keys())
        for name, shape in listed:
            info = reader.info(name)
            assert shape == list(info.shape)
            whole = reader.value(name) if info.dtype == "json" else reader.tensor(name)
            assert same(distckpt.load_variable(saved, name), whole)
    assert distckpt.list_variables(Path(saved).parent) == listed
    with pytest.raises(KeyError, match="has no key"):
        distckpt.load_variable(saved, "nonsense")
