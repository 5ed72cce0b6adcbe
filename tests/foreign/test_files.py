"""Files of other programs: what is read of them is what their own libraries read, and so is what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import distckpt
from distckpt.cli.app import main
from tests.support.comparing import same


def odd_tensors() -> dict[str, torch.Tensor]:
    """One of every kind that could go wrong."""
    tied = torch.randn(4, 3)
    return {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "fp8": torch.randn(7, 3).to(torch.float8_e4m3fn),
        "fp8.other": torch.randn(7).to(torch.float8_e5m2),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.arange(-3, 9),
        "uint16": torch.arange(5).to(torch.uint16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "large": torch.randn(700, 1000),
        "tied": tied,
        "tied.again": tied.clone(),
        "ünicode.ключ": torch.ones(2),
    }


def alike(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names with the same bits; files have an order of their own."""
    return same(dict(sorted(left.items())), dict(sorted(right.items())))


def run(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refusal(*arguments: object, status: int = 2) -> str:
    """What a command says that does nothing."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


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
