"""Tensors and arrays of every kind, alone and in trees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.state.zoo.entry import ADVICE, Refusal, Run, register

SECTION = "tensors"

add = partial(register, SECTION)

Make = Callable[[], Any]


def number() -> int:
    """Something that is another in the twin."""
    return int(torch.randint(1, 100, ()))


def _held(make: Make, form: str) -> Callable[[], Run]:
    def build() -> Run:
        value = make()
        held = {"top": value, "dict": {"x": value, "n": number()}, "deep": {"a": [number(), (value, {"b": value})]}}[
            form
        ]
        return Run({"own": held})

    return build


def add_tensor(
    name: str, kind: str, make: Make, *, refused: str | None = None, torch_can: bool = True, two_ranks: bool = False
) -> None:
    """The same by itself and in a dict."""
    forms = {"": "dict", "-alone": "top"}
    for suffix, form in forms.items():
        key = {"dict": "own.x", "top": "own"}[form]
        refusal = None if refused is None else Refusal(key, refused)
        ranks = two_ranks and form == "dict"
        add(f"{name}{suffix}", kind, _held(make, form), steps=0, torch_can=torch_can, refused=refusal, two_ranks=ranks)


def _sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 2, 4], [1, 0, 3]], torch.rand(3), (5, 4), check_invariants=False).coalesce()


def _sparse_uncoalesced() -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 0, 4], [1, 1, 3]], torch.rand(3), (5, 4), check_invariants=False)


def _sparse_hybrid() -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 3]], torch.rand(2, 3), (5, 3), check_invariants=False).coalesce()


def _sparse_other_count() -> torch.Tensor:
    """Another number of values in each run, as gradients of embeddings have."""
    count = 3 if torch.initial_seed() == 0 else 2
    return torch.sparse_coo_tensor(
        torch.arange(count)[None], torch.rand(count), (5,), check_invariants=False
    ).coalesce()


def _compressed(layout: torch.layout) -> Make:
    def make() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (torch.rand(4, 6) + 1).to_sparse(layout=layout, blocksize=(2, 2) if "bs" in str(layout) else None)

    return make


def _nested(layout: torch.layout) -> Make:
    def make() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=layout)

    return make


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 3, torch.qint8)


def _quantized_by_channel() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(
            torch.rand(3, 4), torch.rand(3) + 0.1, torch.zeros(3, dtype=torch.int64), 0, torch.quint8
        )


add_tensor("sparse-coo", "sparse COO tensors", _sparse, refused=ADVICE)
add_tensor("sparse-coo-uncoalesced", "sparse COO tensors", _sparse_uncoalesced, refused=ADVICE)
add_tensor("sparse-coo-hybrid", "sparse COO tensors", _sparse_hybrid, refused=ADVICE)
add_tensor("sparse-coo-other-count", "sparse COO tensors", _sparse_other_count, refused=ADVICE)
for _layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
    add_tensor(
        str(_layout)[6:].replace("_", "-"), "sparse CSR, CSC, BSR and BSC tensors", _compressed(_layout), refused=ADVICE
    )
add_tensor("nested-strided", "nested tensors", _nested(torch.strided), refused=ADVICE)
add_tensor("nested-jagged", "nested tensors", _nested(torch.jagged), refused=ADVICE)
add_tensor("quantized", "tensors of torch's quantized dtypes", _quantized, refused=ADVICE)
add_tensor("quantized-by-channel", "tensors of torch's quantized dtypes", _quantized_by_channel, refused=ADVICE)
add_tensor("expanded", "expanded tensors", lambda: torch.rand(3, 1).expand(3, 4), two_ranks=True)
add_tensor("expanded-scalar", "expanded tensors", lambda: torch.rand(()).expand(5))
add_tensor("overlapping", "tensors whose elements overlap in memory", lambda: torch.rand(5).as_strided((3, 3), (1, 1)))
add_tensor("conjugate", "conjugate and negative views", lambda: torch.rand(3, dtype=torch.complex64).conj())
add_tensor("negative", "conjugate and negative views", lambda: torch.rand(3, dtype=torch.complex64).conj().imag)
add_tensor("mkldnn", "MKL-DNN tensors", lambda: torch.rand(3, 4).to_mkldnn(), refused=ADVICE)
add_tensor("transposed", "tensors that are not contiguous", lambda: torch.rand(3, 4).t())
add_tensor("strided", "tensors that are not contiguous", lambda: torch.rand(9)[::2])
add_tensor("flipped", "tensors that are not contiguous", lambda: torch.rand(3, 4, 5).permute(2, 0, 1)[1:, ::2])
add_tensor(
    "channels-last",
    "tensors that are not contiguous",
    lambda: torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
)
add_tensor("scalar", "tensors without dimensions", lambda: torch.rand(()), two_ranks=True)
add_tensor("parameter", "parameters outside of modules", lambda: nn.Parameter(torch.rand(3)), two_ranks=True)
add_tensor("with-history", "tensors with an autograd history", lambda: torch.rand(3, requires_grad=True) * 2)
add_tensor("inference", "tensors made in inference mode", lambda: _inference())
add_tensor("many-dimensions", "tensors of many dimensions", lambda: torch.rand(*[1] * 24, 2))
add_tensor("meta", "meta tensors", lambda: torch.empty(3, device="meta"), refused=r"(?i)meta")


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.rand(3)


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def _every_dtype() -> Run:
    """The bytes are random, so NaNs with any payload are among them."""
    raw = {
        str(dtype): torch.randint(0, 2 if dtype == torch.bool else 256, (64,), dtype=torch.uint8) for dtype in DTYPES
    }
    return Run({"own": {str(dtype): raw[str(dtype)].view(dtype) for dtype in DTYPES}})


def _special_values() -> Run:
    n = number()
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, float(n)])
    return Run({"own": {"single": values, "double": values.double(), "half": values.half()}})


def _zero_size() -> Run:
    shapes = [(0,), (3, 0), (0, 3), (0, 0)]
    own: dict[str, Any] = {str(shape): torch.zeros(shape) for shape in shapes}
    return Run({"own": {**own, "n": number(), "array": np.zeros((0, 2)), "bool": torch.zeros(0, dtype=torch.bool)}})


def _views() -> Run:
    """Everything lies in one storage; a change of the whole is seen in the parts."""
    whole = torch.rand(10)
    own = {"whole": whole, "head": whole[:4], "middle": whole[3:7], "again": whole, "grid": whole.view(2, 5)}

    def step(at: int) -> Any:
        own["head"].add_(at)
        own["grid"].mul_(1.5)
        return own["whole"].sum()

    return Run({"own": own}, step)


def _shared_with_model() -> Run:
    """A tree that refers to a module's own parameter."""
    model = nn.Linear(3, 2)
    own = {"weight": model.weight, "data": model.bias.data}

    def step(at: int) -> Any:
        with torch.no_grad():
            model.weight.add_(at)
            model.bias.mul_(1.1)
        return own["weight"].sum().detach() + own["data"].sum()

    return Run({"model": model, "own": own}, step)


def _deep_tree() -> Run:
    a, b = torch.rand(3), torch.rand(2)
    return Run({"own": [a, {"x": (a, b, [b]), "y": {}}, [], {1: a, (2, "z"): b, None: number()}]})


add("every-dtype", "every dtype, bit for bit", _every_dtype, steps=0, two_ranks=True)
add("special-values", "NaN, infinities, -0.0, denormals", _special_values, steps=0)
add("zero-size", "tensors without elements", _zero_size, steps=0, two_ranks=True)
add("views", "views into one storage", _views, two_ranks=True)
add("shared-with-model", "a module's parameters in a tree", _shared_with_model)
add("deep-tree", "trees of tensors, with keys of any plain type", _deep_tree, steps=0, two_ranks=True)


# ---- NumPy ---------------------------------------------------------------------------------------------------------


def _random_array(dtype: str) -> Make:
    return lambda: (np.random.rand(3, 4) * 100).astype(dtype)


def _structured() -> Any:
    array = np.zeros(3, dtype=[("x", "<f4"), ("y", "<i8", (2,)), ("name", "S4")])
    array["x"], array["y"], array["name"] = np.random.rand(3), number(), b"ab"
    return array


for _dtype in ("float32", "float64", "float16", "int8", "uint16", "uint64", "complex128"):
    add_tensor(f"array-{_dtype}", "NumPy arrays", _random_array(_dtype), two_ranks=_dtype == "uint64")
add_tensor("array-bool", "NumPy arrays", lambda: np.random.rand(3, 4) > 0.5)
add_tensor("array-big-endian", "big-endian NumPy arrays", _random_array(">f4"), torch_can=False)
add_tensor("array-big-endian-int", "big-endian NumPy arrays", _random_array(">i8"), torch_can=False)
add_tensor("array-structured", "structured NumPy arrays", _structured)
add_tensor("array-record", "NumPy record arrays", lambda: _structured().view(np.recarray), refused=ADVICE)
add_tensor("array-str", "NumPy arrays of str and bytes", lambda: np.array(["a", str(number())]))
add_tensor("array-bytes", "NumPy arrays of str and bytes", lambda: np.array([b"a", str(number()).encode()]))
add_tensor("array-datetime", "NumPy arrays of dates and times", lambda: np.array([number(), 3], dtype="M8[s]"))
add_tensor("array-fortran", "NumPy arrays that are not contiguous", lambda: np.asfortranarray(np.random.rand(3, 4)))
add_tensor("array-strided", "NumPy arrays that are not contiguous", lambda: np.random.rand(8)[::-2])
add_tensor("array-read-only", "read-only NumPy arrays", lambda: _read_only())
add_tensor("array-scalar", "NumPy arrays without dimensions", lambda: np.array(np.random.rand()))
add_tensor(
    "array-longdouble", "NumPy arrays of `longdouble`", lambda: np.random.rand(3).astype(np.longdouble), refused=ADVICE
)
add_tensor(
    "array-object",
    "NumPy arrays of objects",
    lambda: np.array([object(), number()], dtype=object),
    refused=r"(?i)object",
)


def _read_only() -> Any:
    array = np.random.rand(3)
    array.flags.writeable = False
    return array
