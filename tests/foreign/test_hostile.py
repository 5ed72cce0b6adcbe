"""Files that were made to hurt, or that are hurt: refused with one of our errors, and nothing of them is run or followed."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import DamagedError, DistckptError, ForeignError
from distckpt.foreign.pickled_trees import without_opaque
from distckpt.foreign.pickles import Opaque, read_pickle
from tests.support.foreign import entry, safetensors

WORST = {
    "a header beyond the file": safetensors({"w": entry()}, length=1 << 40),
    "a header of no length": safetensors({"w": entry()}, length=0),
    "a negative length": safetensors({"w": entry()}, length=(1 << 64) - 1),
    "no JSON": safetensors("{nonsense"),
    "deep JSON": safetensors('{"a":' * 200_000 + "1" + "}" * 200_000),
    "a list": safetensors('["w"]'),
    "a name twice": safetensors(f'{{"w": {json.dumps(entry())}, "w": {json.dumps(entry())}}}'),
    "an overlap": safetensors({"a": entry(0, 16), "b": entry(8, 24)}, 24),
    "the same bytes twice": safetensors({"a": entry(), "b": entry()}),
    "a hole": safetensors({"a": entry(0, 16), "b": entry(24, 40)}, 40),
    "less than the file": safetensors({"a": entry()}, 17),
    "more than the file": safetensors({"a": entry()}, 15),
    "a huge end": safetensors({"a": entry(0, 1 << 62)}),
    "a huge shape": safetensors({"a": entry(shape=[1 << 62, 1 << 62, 4])}),
    "a shape of nothing and much": safetensors({"a": entry(0, 0, [0, 1 << 70])}, 0),
    "a negative shape": safetensors({"a": entry(shape=[-2, -2])}),
    "a shape of texts": safetensors({"a": entry(shape=["4"])}),
    "a shape of truths": safetensors({"a": entry(0, 4, [True])}, 4),
    "many dimensions": safetensors({"a": entry(0, 4, [1] * 100)}, 4),
    "offsets backwards": safetensors({"a": entry(16, 0)}),
    "offsets of fractions": safetensors({"a": entry(0.0, 16.0)}),
    "one offset": safetensors({"a": {**entry(), "data_offsets": [16]}}),
    "something more": safetensors({"a": entry(path="../x")}),
    "half a letter": safetensors({"\ud800": entry()}),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "w": entry()}),
}


@pytest.mark.parametrize("kind", WORST)
def test_a_header_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(WORST[kind])
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        distckpt.read_foreign(tmp_path)


def test_a_type_that_torch_does_not_have_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": entry(), "odd": entry(16, 20, [8], "F4")}, 20))
    with pytest.raises(ForeignError, match=r"model\.odd \(elements of type 'F4'"):
        distckpt.read_foreign(tmp_path / "x.safetensors")
    with distckpt.read_foreign(tmp_path / "x.safetensors", leave_out="model.odd") as foreign:
        assert torch.equal(foreign.tensor("model.a"), torch.zeros(4))


def saved(is_new: bool = True) -> bytes:
    """A file of torch.save."""
    file, tree = io.BytesIO(), {"model": {"w": torch.randn(4, 4), "b": torch.zeros(2)}, "n": [1, {"x": 2.5}]}
    torch.save(tree, file, _use_new_zipfile_serialization=is_new)
    return file.getvalue()


@pytest.mark.parametrize("is_new", [True, False])
def test_every_file_that_is_cut_off_or_flipped_is_refused_or_read(tmp_path: Path, seed: int, is_new: bool) -> None:
    whole, path, chance = saved(is_new), tmp_path / "x.pt", random.Random(seed)
    for number in range(300):
        hurt = bytearray(whole)
        if number % 3:
            hurt[chance.randrange(len(hurt))] ^= 1 << chance.randrange(8)
        else:
            del hurt[chance.randrange(len(hurt)) :]
        path.write_bytes(hurt)
        try:
            distckpt.read_foreign(path).load()
        except DistckptError:
            pass
        except (KeyError, ValueError) as error:
            raise AssertionError(f"flip {number}: {error!r}") from error


def with_pickle(content: bytes) -> bytes:
    """The file with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as before, zipfile.ZipFile(file, "w") as after:
        for record in before.infolist():
            after.writestr(record.filename, content if record.filename.endswith("data.pkl") else before.read(record))
    return file.getvalue()


def view(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 16, key: str = "0") -> bytes:
    """A pickle of one tensor."""

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"w": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        view(0, (17,), (1,)),
        view(10, (4, 4), (4, 1)),
        view(0, (4,), (8,)),
        view(0, (1 << 40,), (1,), numel=1 << 40),
        view(-1, (4,), (1,)),
        view(0, (4,), (-1,)),
        view(0, (4,), (1,), key="../../etc/passwd"),
        view(0, (4,), (1,), key="7"),
        view(0, (2, 2), (1,)),
        view(0, (1,) * 60, (1,) * 60),
    ],
)
def test_a_tensor_that_lies_outside_of_its_memory_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(with_pickle(view(0, (4, 4), (4, 1))))
    assert distckpt.read_foreign(tmp_path / "x.pt").tensor("model.w").shape == (4, 4)
    (tmp_path / "x.pt").write_bytes(with_pickle(content))
    with pytest.raises(DamagedError, match=r"x\.pt"):
        distckpt.read_foreign(tmp_path / "x.pt")


def test_a_pickle_that_grows_without_bounds_or_holds_itself_is_refused() -> None:
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb, bomb]
    itself: list[Any] = []
    itself.append(itself)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    for tree in (bomb, itself, deep):
        read = read_pickle(pickle.dumps(tree, 2), "x")
        with pytest.raises(DamagedError, match="x: a tree"):
            without_opaque(read, "", "x")


def test_an_array_of_bytes_of_a_length_alone_is_not_made() -> None:
    """It would take all memory."""
    huge = b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + (1 << 60).to_bytes(8, "little") + b"\x85R."
    assert isinstance(read_pickle(huge, "x"), Opaque)


def test_an_old_file_whose_storages_have_no_names_is_refused(tmp_path: Path) -> None:
    whole = saved(is_new=False)
    keys = next(at for at in range(len(whole)) if whole[at:].startswith(b"\x80\x02]q\x00(X"))
    (tmp_path / "x.pt").write_bytes(whole[:keys] + pickle.dumps([["0"], ["1"]], 2) + whole[keys:])
    with pytest.raises(DamagedError, match="not as torch has written files"):
        distckpt.read_foreign(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content", [b"", b".", b"\x80\x02.", b"(.", b"\x80\x02K", b"}(.", b"N\x85R.", b"h\x07.", b"\x82\x01."]
)
def test_what_is_no_pickle_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedError, match="x: "):
        read_pickle(content, "x")
