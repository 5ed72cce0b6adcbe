"""Files of other programs: what is read of them is what their own libraries read, and so is what is written."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distckpt
from distckpt.errors import DamagedError, ForeignError, MismatchError, UnsupportedFormatError
from distckpt.foreign.contents import Spread, contents_of
from distckpt.foreign.files import Folder
from distckpt.foreign.reader import ForeignReader
from distckpt.foreign.safetensors_file import read_header
from tests.support.comparing import same
from tests.support.foreign import alike, odd_tensors, refusal, run


def test_what_is_imported_and_exported_again_is_bit_for_bit_what_it_was(tmp_path: Path) -> None:
    tensors = odd_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    told = run("import", tmp_path, tmp_path / "run", "--number", "5")
    assert told["checkpoint"] == f"{tmp_path}/run/ckpt-5"
    assert sorted(told["tensors"]) == sorted(f"model.{name}" for name in tensors)
    assert alike(distckpt.load(tmp_path / "run", "model"), tensors)
    with distckpt.open(tmp_path / "run") as reader:
        assert reader.verify().good

    for size, files in (("5GB", 1), ("100KB", 3)):
        out = tmp_path / size
        written = run("export", tmp_path / "run", out, "--max-shard-size", size)["files"]
        assert len(written) == files + 1
        found = [load_file(out / file["name"]) for file in written if file["name"].endswith(".safetensors")]
        assert alike({name: tensor for part in found for name, tensor in part.items()}, tensors)
        with distckpt.read_foreign(out) as foreign:
            assert alike(foreign.load("model"), tensors)
    assert refusal("export", tmp_path / "run", tmp_path / "5GB").count("exists already")
    assert "give another number" in refusal("import", tmp_path, tmp_path / "run", "--number", 5).lower()


def test_what_torch_has_saved_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    base = torch.randn(10, 20)
    state = {
        **odd_tensors(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "transposed": base.t(),
        "sliced": base[2:5, 3:9],
        "shared": base,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    nested = {
        "model": torch.nn.Linear(2, 2).state_dict(),
        "plain": {"a": {1, 2}, "b": (1, 2.5, None, True, "x", b"y"), "n": 10**30, 7: ["z"], "dtype": torch.float16},
        "rare": {"a": 1 - 2j, "b": frozenset({1}), "c": bytearray(b"\x00\xff"), "d": bytearray(), "e": b""},
        "milestones": Counter({3: 1}),
    }
    for protocol, is_new in ((2, True), (4, True), (2, False)):
        how: dict[str, Any] = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_new}
        torch.save(state, tmp_path / "pytorch_model.bin", **how)
        torch.save(nested, tmp_path / "nested.pt", **how)
        for path in (tmp_path / "pytorch_model.bin", tmp_path):
            with distckpt.read_foreign(path) as foreign:
                assert same(foreign.load("model"), {key: value.detach() for key, value in state.items()})
        with distckpt.read_foreign(tmp_path / "nested.pt") as foreign:
            found = torch.load(tmp_path / "nested.pt", weights_only=False)
            assert same(foreign.load(), {**found, "model": dict(found["model"])})
    run("import", tmp_path / "pytorch_model.bin", tmp_path / "run")
    assert same(distckpt.load(tmp_path / "run", "model"), {key: value.detach() for key, value in state.items()})


def test_a_file_with_a_tensor_beside_its_state_dicts_has_its_own_keys(tmp_path: Path) -> None:
    """As that of the ImageNet example of PyTorch: the best accuracy is a tensor there."""
    file, best = tmp_path / "x.pt", torch.tensor(9.5)
    for tree in (
        {
            "epoch": 3,
            "state_dict": {"w": torch.ones(2)},
            "best": best,
            "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        },
        {"models": [{"w": torch.ones(2)}], "best": best},
    ):
        torch.save(tree, file)
        with distckpt.read_foreign(file) as foreign:
            assert same(foreign.load(), tree)
    weights = {"w": torch.ones(2), "number": 3, "sizes": [1, 2], "block._extra_state": {"amax": torch.ones(3)}}
    torch.save(weights, file)
    with distckpt.read_foreign(file, under="net") as foreign:
        assert same(foreign.load(), {"net": weights})
    with pytest.raises(ValueError, match="under='' is no name"):
        distckpt.read_foreign(file, under="")
    assert "under='' is no name" in refusal("import", file, tmp_path / "run", "--under", "")


class Configuration:
    """What only unpickling could make, with a tensor in it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_in_an_old_file_tensors_lie_behind_those_of_what_is_left_out(tmp_path: Path) -> None:
    """Their order is that of addresses as texts."""

    def address(tensor: torch.Tensor) -> str:
        return str(tensor.untyped_storage()._cdata)

    pairs = [(torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint32), torch.ones(5)) for _ in range(8)]
    quantized = min((pair[0] for pair in pairs), key=address)
    first, *rest = sorted((pair[1] for pair in pairs), key=address)
    last = rest[-1]
    assert address(quantized) < address(last)
    for left_out in (Configuration(first), quantized):
        torch.save({"cfg": left_out, "w": [last]}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        with distckpt.read_foreign(tmp_path / "x.pt", leave_out="cfg") as foreign:
            assert same(foreign.load(), {"w": [last]})


def test_what_no_checkpoint_can_have_is_told_with_its_file_and_not_as_of_a_save(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a.b": 1, "a": {"b": 2}}, file)
    with pytest.raises(UnsupportedFormatError, match=rf"^{file}, key 'a\.b': two leaves have this key"):
        distckpt.read_foreign(file)
    torch.save({"a": {"b": "\ud800"}}, file)
    said = refusal("import", file, tmp_path / "run")
    assert re.search(r"x\.pt, key 'a\.b': a str with half a surrogate .*--leave-out KEY", said.replace("\n", " "))
    assert "save was" not in said


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_what_only_unpickling_could_read_is_named_by_its_key_and_never_run(tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "x.pt"
    shared = torch.zeros(1).expand(10**9)
    torch.save({"model": {"w": torch.ones(2)}, "args": {"good": 1, "bad": Planted(trap)}, "wide": shared}, file)
    refused = "args.bad (an object of posix.mkdir), wide (a tensor whose elements share memory"
    assert refused in refusal("import", file, tmp_path / "run")
    with pytest.raises(ForeignError, match="leave_out"):
        distckpt.read_foreign(file, leave_out="args")
    assert "did you mean 'args'" in refusal("import", file, tmp_path / "run", "--leave-out", "arg")
    with pytest.raises(KeyError, match="did you mean 'args'"):
        distckpt.read_foreign(file, leave_out=["wide", "arg"])
    told = run("import", file, tmp_path / "run", "--leave-out", "args.bad", "--leave-out", "wide")
    assert list(told["left_out"]) == ["args.bad", "wide"]
    assert same(distckpt.load(tmp_path / "run"), {"model": {"w": torch.ones(2)}, "args": {"good": 1}})
    assert not trap.exists()


@pytest.mark.parametrize("partial", [False, True])
def test_a_module_is_filled_from_a_file_as_from_a_checkpoint(tmp_path: Path, partial: bool) -> None:
    saved, module = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    save_file({"encoder.weight": saved.weight, "other": torch.ones(1)}, tmp_path / "x.safetensors")
    checkpoint = distckpt.Checkpoint(net=module)
    before = module.bias.clone()
    with distckpt.read_foreign(tmp_path / "x.safetensors") as foreign:
        status = foreign.restore(checkpoint, partial, select="model.encoder", rename={"model.encoder": "net"})
    assert (status.missing, status.unexpected) == ((), ()) or status.missing == ("net.bias",)
    assert torch.equal(module.weight, saved.weight)
    assert torch.equal(module.bias, before)


def training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    """What is trained."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW([{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.1}])
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """One step of it."""
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("imported", [False, True])
def test_a_training_that_torch_has_saved_goes_on_as_if_it_had_never_stopped(tmp_path: Path, imported: bool) -> None:
    """Its optimizer's state is there by numbers, and goes to the parameters that have these places."""
    ours, theirs = training(), training()
    step(*theirs)
    names = ("model", "optimizer", "scheduler")
    torch.save({name: one.state_dict() for name, one in zip(names, theirs, strict=True)}, tmp_path / "x.pt")
    checkpoint = distckpt.Checkpoint(**dict(zip(names, ours, strict=True)))
    if imported:
        run("import", tmp_path / "x.pt", tmp_path / "run")
        checkpoint.restore(tmp_path / "run").assert_existing_objects_matched()
    else:
        distckpt.read_foreign(tmp_path / "x.pt").restore(checkpoint).assert_consumed()
    for _ in range(3):
        step(*theirs)
        step(*ours)
    for one, other in zip(ours, theirs, strict=True):
        assert same(one.state_dict(), other.state_dict())

    few = torch.optim.AdamW([{"params": ours[0][1].parameters()}, {"params": [ours[0][0].weight]}])
    with pytest.raises(MismatchError, match=r"groups of \[2, 2\] parameters saved, of \[2, 1\] in the optimizer"):
        distckpt.read_foreign(tmp_path / "x.pt").restore(distckpt.Checkpoint(model=ours[0], optimizer=few))


def test_a_folder_of_several_files_is_read_by_its_index_and_by_nothing_outside_of_it(tmp_path: Path) -> None:
    tensors, folder = odd_tensors(), tmp_path / "model"
    folder.mkdir()
    half = dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])
    for save, ending, index in (
        (torch.save, "bin", "pytorch_model.bin.index.json"),
        (save_file, "safetensors", "model.safetensors.index.json"),  # it comes first, if both are there
    ):
        files = [f"part-{number}.{ending}" for number in (1, 2)]
        for part, name in zip(half, files, strict=True):
            save(part, folder / name)
        weights = {key: name for part, name in zip(half, files, strict=True) for key in part}

        def written(changes: dict[str, str], weights: dict[str, str] = weights, index: str = index) -> Path:
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {**weights, **changes}}))
            return folder

        with distckpt.read_foreign(written({})) as foreign:
            assert alike(foreign.load("model"), tensors)
        save({"secret": torch.ones(1)}, tmp_path / files[0])
        for name in (f"../{files[0]}", str(tmp_path / files[0]), "..", "", ".hidden", "a\\b", f"./{files[0]}"):
            with pytest.raises(DamagedError, match="outside of its folder"):
                distckpt.read_foreign(written({"bf16": name}))
        with pytest.raises(DamagedError, match="missing"):
            distckpt.read_foreign(written({"bf16": f"part-3.{ending}"}))
        for changes in ({"bf16": files[1]}, {"more": files[0]}):
            with pytest.raises(DamagedError, match="it says that"):
                distckpt.read_foreign(written(changes))
        written({})


@pytest.mark.parametrize(
    ("title", "is_one_read"),
    [
        ("model.safetensors", True),
        ("adapter_model.safetensors", True),
        ("pytorch_model.bin", True),
        ("diffusion_pytorch_model.safetensors", False),
        ("diffusion_pytorch_model.bin", False),
    ],
)
@pytest.mark.parametrize("index", ["whole", "of missing files", "no JSON"])
def test_of_one_file_and_an_index_is_read_what_its_own_library_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, title: str, is_one_read: bool, index: str
) -> None:
    save = save_file if title.endswith(".safetensors") else torch.save
    save({"w": torch.ones(1)}, tmp_path / title)
    save({"w": torch.zeros(1)}, tmp_path / "part-1")
    text = json.dumps({"weight_map": {"w": "part-1" if index == "whole" else "part-2"}})
    (tmp_path / f"{title}.index.json").write_text("{" if index == "no JSON" else text)
    if index == "whole" or is_one_read:
        with distckpt.read_foreign(tmp_path) as foreign:
            assert foreign.tensor("model.w").item() == is_one_read
    else:
        with pytest.raises(DamagedError, match=r"index\.json"):
            distckpt.read_foreign(tmp_path)
    read = title if is_one_read else f"{title}.index.json"
    assert f"read is {read}, as the library does" in caplog.text


def test_an_index_that_speaks_of_one_file_is_not_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an export has it."""
    path = distckpt.Checkpoint(model={"w": torch.ones(1)}).write(tmp_path / "saved")
    for kind in ("safetensors", "torch"):
        run("export", path, tmp_path / kind, "--format", kind)
        distckpt.read_foreign(tmp_path / kind)
    assert "as two saves" not in caplog.text


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """As the one of Hugging Face's hub is made."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "blobs" / "0123abc")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(Path("../blobs/0123abc"))
    for path in (tmp_path / "snapshot", tmp_path / "snapshot" / "model.safetensors"):
        assert torch.equal(distckpt.read_foreign(path).tensor("model.w"), torch.ones(3))


def test_a_tensor_that_lies_in_several_places_is_put_together(tmp_path: Path) -> None:
    """For formats that keep each rank's part of a tensor by itself."""
    whole = torch.arange(6 * 5, dtype=torch.float32).reshape(6, 5)
    boxes = {"a": ((0, 0), whole[:4]), "b": ((4, 0), whole[4:, :2]), "c": ((4, 2), whole[4:, 2:])}
    for name, (_, part) in boxes.items():
        save_file({"w": part.contiguous()}, tmp_path / f"{name}.safetensors")
    folder = Folder(str(tmp_path), None)
    files = {name: folder.find(f"{name}.safetensors") for name in boxes}
    parts = [(boxes[name][0], read_header(file).tensors["w"]) for name, file in files.items() if file is not None]
    for count in (3, 2):
        spread = Spread("float32", (6, 5), tuple(parts[:count]))
        foreign = ForeignReader(contents_of("folder", str(tmp_path), {"model": {"w": spread}}))
        if count < len(parts):
            with pytest.raises(DamagedError, match=r"'model\.w': the index does not cover the whole of it"):
                foreign.tensor("model.w")
        else:
            assert torch.equal(foreign.tensor("model.w"), whole)


def test_a_tied_weight_that_a_file_has_once_is_missed_nowhere(tmp_path: Path) -> None:
    """As Hugging Face's libraries save them."""

    def tied(is_tied: bool) -> torch.nn.Module:
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        if is_tied:
            model["head"].weight = model["embed"].weight
        return model

    save_file({"embed.weight": torch.ones(5, 3)}, tmp_path / "x.safetensors")
    run("import", tmp_path / "x.safetensors", tmp_path / "run")
    model, other = tied(True), tied(False)
    for checkpoint in (distckpt.Checkpoint(model=model), distckpt.Checkpoint(model=other)):
        with distckpt.CheckpointManager(checkpoint, tmp_path / "run") as manager:
            if checkpoint.model is model:
                manager.restore_or_initialize()
            else:
                with pytest.raises(MismatchError, match=r"not in the checkpoint: model\.head\.weight"):
                    manager.restore_or_initialize()
    assert torch.equal(model["head"].weight, torch.ones(5, 3))
