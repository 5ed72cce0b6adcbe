"""What the golden checkpoints hold: values that follow from formulas here, so no version of anything changes them."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch
from torch import nn

import distckpt

DTYPES = (
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)
WIDTH, HIDDEN = 3, 5  # neither divides evenly by three ranks
MOMENTS = ("exp_avg", "exp_avg_sq")


class Mood(enum.Enum):
    """Checkpoints name this class by its module, so it stays where it is."""

    GOOD = "good"


def plain_values() -> dict[Any, Any]:
    """One of each type that a plain value may have."""
    return {
        "none": None,
        "true": True,
        "int": -(2**63),
        "large": [2**64, -(2**200)],
        "float": 0.1,
        "not finite": [float("inf"), float("-inf"), float("nan"), -0.0],
        "complex": complex(1.5, -2.0),
        "text": 'café "☕" $int',
        "$int": {"$bytes": "no escape from this"},
        "bytes": bytes(range(256)),
        "tuple": (1, (2.5,), ()),
        "sets": [{3, 1, 2}, frozenset({"b", "a"}), set()],
        "keys": {1: "one", 2.5: None, (1, "a"): [], None: {}, "": 0},
        "enum": Mood.GOOD,
        "numpy": [np.float32(0.1), np.int64(-7), np.bool_(True), np.str_("text"), np.bytes_(b"\0b"), np.dtype("<i4")],
        "torch": [torch.Size([2, 0]), torch.bfloat16, torch.device("cuda:1")],
        7: "a key that is no text",
    }


def tensors() -> dict[str, Any]:
    """One of each dtype, and of each shape that is special; the bits count up."""
    return {
        "dtypes": {str(dtype).removeprefix("torch."): _counting(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(-2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "list": [torch.arange(3), ("beside a tensor", torch.arange(2, dtype=torch.int16))],
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
    }


def _counting(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    return (bits & 1 if dtype == torch.bool else bits).view(dtype).reshape(2, 3)


def numbered(shape: tuple[int, ...], first: int) -> torch.Tensor:
    """first / 8, (first + 1) / 8 ...: exact in every floating-point type that is used."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.arange(first, first + count, dtype=torch.float32).div(8).reshape(shape)


SHAPES = {"up.weight": (HIDDEN, WIDTH), "up.bias": (HIDDEN,), "down.weight": (WIDTH, HIDDEN), "down.bias": (WIDTH,)}


def weights(number: int) -> dict[str, torch.Tensor]:
    """The model of checkpoint ``number``."""
    return {name: numbered(shape, 100 * at + number) for at, (name, shape) in enumerate(SHAPES.items())}


def moments(number: int) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state of checkpoint ``number``, by parameter."""
    return {
        name: {
            "step": torch.tensor(float(number)),
            **{moment: numbered(shape, 1000 * (at + 1) + number) for at, moment in enumerate(MOMENTS)},
        }
        for name, shape in SHAPES.items()
    }


class Model(nn.Module):
    """Two layers whose rows cannot be shared out evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """With state for every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def fill(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Give both what checkpoint ``number`` holds, each rank its own part."""
    known, states = weights(number), moments(number)
    for name, parameter in model.named_parameters():
        _pour(known[name], parameter)
        for field, value in states[name].items():
            _pour(value, optimizer.state[parameter][field])


def _pour(known: torch.Tensor, into: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(into, DTensor):
        mine = distribute_tensor(known, into.device_mesh, into.placements)
        into.to_local().copy_(mine.to_local())
    else:
        into.copy_(known)


def cursor(number: int, rank: int) -> dict[str, Any]:
    """What rank ``rank`` holds for itself in checkpoint ``number``."""
    return {"position": 100 * number + rank, "drawn": numbered((rank + 1,), number)}


def described(value: Any) -> Any:
    """The same for two values only if types, structure and every bit are the same; it can be compared and printed."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if value.numel() else value
        return [str(value.dtype), list(value.shape), bits.flatten().tolist()]
    if isinstance(value, np.ndarray):
        return ["numpy", str(value.dtype), list(value.shape), value.tolist()]
    if isinstance(value, dict):
        return {f"{type(key).__name__} {key!r}": described(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return [type(value).__name__, *map(described, value)]
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(value)}"
    return f"{type(value).__name__} {value!r}"


def alone(number: int) -> dict[str, Any]:
    """The objects of the run of one rank as they are at checkpoint ``number``."""
    model = Model()
    optimizer = make_optimizer(model)
    fill(model, optimizer, number)
    return {
        "model": model,
        "optimizer": optimizer,
        "tensors": tensors(),
        "values": plain_values(),
        "progress": {"step": number},
        "loader": distckpt.PerRank(cursor(number, 0), on_resize="drop"),
    }


def small(number: int) -> dict[str, Any]:
    """What the checkpoints hold of which mutilated copies are made."""
    return {"state": {"weights": numbered((5, 3), number), "step": 40 + number}}
