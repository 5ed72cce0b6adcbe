"""Files of other programs for tests, and the commands that read and write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from click.testing import CliRunner

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


def safetensors(header: str | Mapping[str, Any], data: int = 16, length: int | None = None) -> bytes:
    """A file with that header, and so many bytes of data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(
    begin: object = 0, end: object = 16, shape: object = (4,), dtype: object = "F32", **more: Any
) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}
