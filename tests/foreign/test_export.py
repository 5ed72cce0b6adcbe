"""What is exported is what other programs read, bit for bit, and is at its place whole or not there at all."""

from __future__ import annotations

import json
import re
import resource
import signal
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import crc32c
import pytest
import torch
from safetensors import safe_open

import distckpt
from distckpt.storage import open_store
from distckpt.testing.observing import MIB
from tests.support import crashing, servers
from tests.support.comparing import same
from tests.support.crashing import Say
from tests.support.damage import flip, payload_of
from tests.support.foreign import alike, odd_tensors, refusal, run
from tests.support.places import Gs, Place


def test_torch_loads_what_is_exported_for_it(tmp_path: Path) -> None:
    tensors = odd_tensors()
    tree = {
        "numbers": [10**30, -5, 2.5, 1 + 2j, True, None],
        "texts": ("ü", b"\x00\xff"),
        "kinds": [{1, 2}, Counter({3: 1}), torch.bfloat16, torch.device("cpu"), torch.Size([2])],
        "nested": OrderedDict(a=torch.ones(2), b=[torch.ones(1), {"x": torch.zeros(3), 7: "seven"}]),
        "empty": {},
    }
    path = distckpt.Checkpoint(model=tensors, tree=tree).write(tmp_path / "saved")
    for size, files in (("5GB", 1), ("100KB", 3)):
        written = [tmp_path / size / file["name"] for file in run(
            "export", path, tmp_path / size, "--format", "torch", "--max-shard-size", size
        )["files"]]  # fmt: skip
        assert len(written) == files + 1
        for mmap in (False, True):
            found = [torch.load(file, weights_only=True, mmap=mmap) for file in written if file.suffix == ".bin"]
            assert alike({name: tensor for part in found for name, tensor in part.items()}, tensors)
        assert all(zipfile.ZipFile(file).testzip() is None for file in written if file.suffix == ".bin")
        assert alike(distckpt.read_foreign(tmp_path / size).load("model"), tensors)
    run("export", path, tmp_path / "all", "--format", "torch", "--select", "", "--leave-out", "model")
    found = torch.load(tmp_path / "all" / "checkpoint.pt", weights_only=True)
    assert same(found, {"tree": tree, "save_counter": 0})


def test_what_was_left_out_of_the_checkpoint_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    whole = distckpt.Checkpoint(model=model).write(tmp_path / "base")
    tuned = distckpt.Checkpoint(model=model, step=3, only_trainable="model", frozen_from=whole)
    tuned.restore(whole)
    path = tuned.write(tmp_path / "tuned")
    there = f"{whole}/saved-0"
    told = run("export", path, tmp_path / "half")
    assert told["left_out"]["only_trainable"] is True
    assert told["left_out"]["base"]["path"] == there
    assert f"left out when it was saved, with only_trainable; {there} has the frozen parameters" in caplog.text
    caplog.clear()
    assert run("export", path, tmp_path / "all", "--format", "torch", "--select", "")["left_out"] is not None
    assert "left out" in caplog.text
    caplog.clear()
    assert run("export", path, tmp_path / "step", "--format", "torch", "--select", "step")["left_out"] is None
    assert run("export", whole, tmp_path / "whole")["left_out"] is None
    assert "left out" not in caplog.text


def test_a_number_that_torch_does_not_load_is_refused_by_its_key(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(tree={"ok": 2**2000, "numbers": [1, -(2**3000)]}).write(tmp_path / "saved")
    said = refusal("export", path, tmp_path / "out", "--format", "torch", "--select", "")
    assert "tree.numbers.1: a number of 376 bytes" in said.replace("\n", " ")
    run("export", path, tmp_path / "out", "--format", "torch", "--select", "", "--leave-out", "tree.numbers")
    found = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert same(found, {"tree": {"ok": 2**2000}, "save_counter": 0})


def test_the_index_has_the_checksums_of_files_and_tensors(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(model=odd_tensors()).write(tmp_path / "saved")
    run("export", path, tmp_path / "out", "--max-shard-size", "100KB")
    told = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in told["metadata"]["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (len(content), f"{crc32c.crc32c(content):08x}") == (file["size"], file["crc32c"])
    for name, file in told["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            content = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            assert told["metadata"]["crc32c"][name] == f"{crc32c.crc32c(content):08x}"
            assert opened.metadata()["distckpt.number"] == "0"


def export_large(say: Say, path: str, out: str, kind: str) -> None:
    """Says how many bytes of memory a large export takes more than a small one."""
    small = distckpt.Checkpoint(model={"w": torch.ones(MIB)}).write(f"{out}-small")
    run("export", small, f"{out}-0", "--format", kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run("export", path, out, "--format", kind)
    say(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.parametrize("kind", ["dcp", "safetensors", "torch"])
def test_an_export_does_not_take_memory_for_all_of_it(tmp_path: Path, kind: str) -> None:
    tensors = {f"w{number}": torch.zeros(MIB) for number in range(48)}
    path = distckpt.Checkpoint(model=tensors).write(tmp_path / "saved")
    more = crashing.run(export_large, path=path, out=str(tmp_path / "out"), kind=kind).said
    assert len(more) == 1
    assert more[0] < 96 * MIB, "of 192"


def test_an_export_that_fails_leaves_nothing_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(model={"w": torch.randn(3000), "v": torch.ones(4)}, n=3).write(tmp_path / "saved")
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal("export", path, tmp_path / "there")
    assert "plain values: n, save_counter. Leave them out" in refusal("export", path, tmp_path / "out", "--select", "")
    assert "did you mean 'model'" in refusal("export", path, tmp_path / "out", "--select", "modle")
    assert "did you mean 'model.w'" in refusal("export", path, tmp_path / "out", "--leave-out", "model.ww")
    file, end = payload_of(Path(path), "model.w")
    flip(file, end - 1)
    for kind in ("safetensors", "torch"):
        assert "model.w" in refusal("export", path, tmp_path / "out", "--format", kind, status=1)
        run("export", path, tmp_path / kind, "--format", kind, "--leave-out", "model.w")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["safetensors", "saved", "there", "torch"]


def export_into_little_room(say: Say, path: str, out: str, kind: str) -> None:
    """Says how exports end where no file can be larger than so much."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for room in range(0, 60 << 10, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        say(refusal("export", path, out, "--format", kind))


@pytest.mark.parametrize("kind", ["dcp", "safetensors", "torch"])
def test_an_export_that_finds_no_room_says_so_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    tensors = {f"w{number}": torch.randn(1 << 12) for number in range(4)}
    path = distckpt.Checkpoint(model=tensors).write(tmp_path / "saved")
    said = crashing.run(export_into_little_room, path=path, out=str(tmp_path / "out"), kind=kind).said
    assert len(said) == 13
    assert all(re.search(r"\.tmp/[\w.]+: could not be written: File too large", each) for each in said), said
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]


@pytest.mark.timeout(100)
def test_an_object_store_gets_files_and_the_index_last(tmp_path: Path) -> None:
    tensors = odd_tensors()
    path = distckpt.Checkpoint(model=tensors).write(tmp_path / "saved")
    with servers.fake_gcs() as server:
        place = Place.new(Gs(), server.port)
        url, options = f"{place.url}/out", [f"{key}={value}" for key, value in place.options().items()]
        arguments = ["export", path, url, *(part for option in options for part in ("--to-option", option))]
        assert len(run(*arguments, "--max-shard-size", "100KB")["files"]) == 4
        assert alike(distckpt.read_foreign(url, place.options()).load("model"), tensors)
        assert "nothing was written" in refusal(*arguments)
        infos = sorted(open_store(url, place.options()).list(""), key=lambda info: info.modified)
        assert infos[-1].path == "model.safetensors.index.json"
