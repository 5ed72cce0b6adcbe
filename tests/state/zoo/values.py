"""Plain values, and state that was empty where it is restored."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch

import distckpt
from tests.state.zoo.entry import Refusal, Run, register
from tests.state.zoo.tensors import number

SECTION = "values"
OUTGROWN = "containers that have grown since"

add = partial(register, SECTION)


class Point(NamedTuple):
    """A named tuple by class."""

    x: int
    y: Any


Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - both ways are used


@dataclass
class Settings:
    """A plain dataclass."""

    rate: float
    names: list[str] = field(default_factory=list)
    extra: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """One that cannot be changed."""

    at: int
    inner: Settings | None = None


@dataclass
class Derived(Settings):
    """One that has a base, a field that is not given, and a cache."""

    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total = -1


class Color(enum.Enum):
    """An enum."""

    RED = 1
    BLUE = "b"


class Level(enum.IntEnum):
    """An enum of ints."""

    LOW = 1
    HIGH = 2


class Mode(str, enum.Enum):
    """An enum of strs."""

    TRAIN = "train"


class Bits(enum.Flag):
    """Flags."""

    A = 1
    B = 2


class Name(str):
    """A subclass of str."""

    __slots__ = ()


class Count(int):
    """A subclass of int."""


class Rate(float):
    """A subclass of float."""


class Bag(dict):  # type: ignore[type-arg]
    """A subclass of dict."""


class Row(list):  # type: ignore[type-arg]
    """A subclass of list."""


def _default_dict(factory: Any) -> Callable[[], Any]:
    def make() -> Any:
        made: Any = collections.defaultdict(factory)
        made["a"] = number()
        return made

    return make


def _derived() -> Derived:
    made = Derived(0.5, ["a"])
    made.total = number()
    return made


_ZONE = dt.timezone(dt.timedelta(hours=5, minutes=30), "IST")

VALUES: dict[str, tuple[str, Callable[[], Any]]] = {
    "int": ("numbers", lambda: number()),
    "int-huge": ("numbers", lambda: -(10**40) * number()),
    "float": ("numbers", lambda: number() / 7),
    "float-special": ("numbers", lambda: [float("nan"), float("inf"), -0.0, 5e-324, number()]),
    "complex": ("numbers", lambda: complex(number(), -0.0)),
    "bool-none": ("bool, None, str, bytes", lambda: [True, None, "é\x00\U0001f600", b"\x00\xff", number()]),
    "bytearray": ("`bytearray`", lambda: bytearray([number(), 0, 255])),
    "decimal": ("`Decimal`, `Fraction`", lambda: [Decimal(number()) / 7, Decimal("NaN"), Decimal("-0.0"), Decimal("1E+5")]),
    "fraction": ("`Decimal`, `Fraction`", lambda: Fraction(number(), 7)),
    "tuple": ("tuples, lists, dicts", lambda: (number(), (), (1, [2, {3: (4,)}]))),
    "dict-keys": (
        "tuples, lists, dicts",
        lambda: {1: "a", "b": "b", 1.5: number(), None: 0, (1, 2): 3, b"k": 4, False: 5, frozenset([1]): 6},
    ),
    "dict-of-empty": ("tuples, lists, dicts", lambda: {"a": {}, "b": [], "c": (), "d": None, "e": set(), "n": number()}),
    "set": ("sets, frozensets", lambda: {number(), "a", (1, 2), None}),
    "frozenset": ("sets, frozensets", lambda: frozenset({number(), frozenset({1})})),
    "ordered-dict": ("`OrderedDict`", lambda: collections.OrderedDict([("z", number()), ("a", 2), (3, 4)])),
    "counter": ("`Counter`", lambda: collections.Counter({"a": number(), 3: 2, (1, 2): 1})),
    "default-dict-int": ("`defaultdict` with a class or nothing as factory", _default_dict(int)),
    "default-dict-list": ("`defaultdict` with a class or nothing as factory", _default_dict(list)),
    "default-dict-none": ("`defaultdict` with a class or nothing as factory", _default_dict(None)),
    "deque": ("`deque`", lambda: collections.deque([number(), 2, 3], maxlen=5)),
    "deque-unbounded": ("`deque`", lambda: collections.deque([number(), [1]])),
    "namedtuple": ("named tuples", lambda: Point(number(), "y")),
    "namedtuple-old": ("named tuples", lambda: [Pair(number(), Point(1, None))]),
    "dataclass": ("dataclasses", lambda: Settings(number() / 3, ["a"], {"b": Frozen(1)})),
    "dataclass-frozen": ("dataclasses", lambda: Frozen(number(), Settings(0.1))),
    "dataclass-derived": ("dataclasses", _derived),
    "enum": ("enums", lambda: [Color.RED, Color.BLUE, Level.HIGH, Mode.TRAIN, number()]),
    "enum-keys": ("enums", lambda: {Color.RED: number(), Level.LOW: 2}),
    "datetime": ("dates and times", lambda: dt.datetime(2024, 2, 29, 1, 2, 3, number(), dt.timezone.utc)),
    "datetime-zone": ("dates and times", lambda: dt.datetime(2024, 2, 29, 1, 2, 3, number(), _ZONE, fold=1)),
    "datetime-naive": ("dates and times", lambda: dt.datetime(1, 1, 1, 0, 0, 0, number())),
    "timedelta": ("dates and times", lambda: dt.timedelta(-3, number(), 7)),
    "date-time": ("dates and times", lambda: [dt.date(2024, 1, 1), dt.time(1, 2, 3, number(), _ZONE), dt.time(4)]),
    "timezone": ("dates and times", lambda: [dt.timezone.utc, _ZONE, dt.timezone(dt.timedelta(minutes=number()))]),
    "path": ("paths", lambda: [Path(f"/a/{number()}"), PurePosixPath("b"), PureWindowsPath("c:\\d")]),
    "range": ("`range`, `slice`", lambda: range(1, number() + 10, 3)),
    "slice": ("`range`, `slice`", lambda: [slice(1, number(), None), slice(None), slice("a", 2.5, (3,))]),
    "str-subclass": ("subclasses of str, int, float", lambda: [Name(f"n{number()}"), {"k": Name("v")}]),
    "str-subclass-key": ("subclasses of str, int, float", lambda: {Name("k"): number()}),
    "int-subclass": ("subclasses of str, int, float", lambda: [Count(number())]),
    "float-subclass": ("subclasses of str, int, float", lambda: [Rate(number() / 3)]),
    "dict-subclass": ("subclasses of dict and list", lambda: Bag(a=number())),
    "list-subclass": ("subclasses of dict and list", lambda: Row([number()])),
    "numpy-scalars": (
        "NumPy scalars",
        lambda: [np.float32(number() / 3), np.int64(1), np.bool_(True), np.float64(0.1), np.complex64(1j), np.uint8(7)],
    ),
    "numpy-text": ("NumPy scalars", lambda: [np.str_(f"a{number()}"), np.bytes_(b"b")]),
    "numpy-times": ("NumPy scalars", lambda: [np.datetime64("2024-02-29"), np.timedelta64(number(), "s")]),
    "numpy-dtype": ("dtypes, devices, sizes", lambda: [np.dtype("float32"), np.dtype(">i4"), number()]),
    "torch-values": (
        "dtypes, devices, sizes",
        lambda: [torch.float8_e5m2, torch.device("cuda", 1), torch.Size([number(), 2])],
    ),
}  # fmt: skip

for _name, (_kind, _make) in VALUES.items():
    add(
        f"{_name}",
        _kind,
        lambda make=_make: Run({"own": {"x": make(), "other": number()}}),
        steps=0,
        two_ranks=_name
        in ("counter", "namedtuple", "dataclass", "deque", "datetime", "dict-keys", "dict-of-empty", "set"),
    )
    add(f"{_name}-alone", _kind, lambda make=_make: Run({"own": make(), "other": number()}), steps=0)


# ---- with tensors inside -----------------------------------------------------------------------------------------------


TENSOR_TREES: dict[str, Callable[[], Any]] = {
    "namedtuple": lambda: Point(number(), torch.rand(2)),
    "dataclass": lambda: Settings(0.1, extra={"t": torch.rand(2), "a": np.random.rand(2)}),
    "dataclass-frozen": lambda: Frozen(1, Settings(0.1, extra=torch.rand(2))),
    "ordered-dict": lambda: collections.OrderedDict([("b", torch.rand(2)), ("a", torch.rand(1))]),
    "default-dict": lambda: collections.defaultdict(list, a=[torch.rand(2)]),
    "deque": lambda: collections.deque([torch.rand(2), torch.rand(3)], maxlen=4),
    "counter": lambda: collections.Counter(a=number()),
}  # fmt: skip
for _name, _make in TENSOR_TREES.items():
    add(
        f"tensors-in-{_name}",
        "tensors inside typed containers",
        lambda make=_make: Run({"own": {"x": make()}}),
        steps=0,
    )


# ---- generators ------------------------------------------------------------------------------------------------------


def _drawing(make: Callable[[int], Any], draw: Callable[[Any], Any], form: str) -> Callable[[], Run]:
    """The program holds the generator, so its state must come back into that very object."""

    def build() -> Run:
        generator = make(torch.initial_seed())
        own: Any = {"top": generator, "dict": {"rng": generator}, "rank": distckpt.PerRank(generator)}[form]
        return Run({"own": own}, lambda at: draw(generator), lambda: generator)

    return build


GENERATORS: dict[str, tuple[str, Callable[[int], Any], Callable[[Any], Any]]] = {
    "torch-generator": (
        "`torch.Generator`",
        lambda seed: torch.Generator().manual_seed(seed),
        lambda g: torch.rand(3, generator=g),
    ),
    "numpy-generator": ("NumPy generators", lambda seed: np.random.default_rng(seed), lambda g: g.random()),
    "numpy-philox": (
        "NumPy generators",
        lambda seed: np.random.Generator(np.random.Philox(seed)),
        lambda g: g.integers(100),
    ),
    "numpy-mt19937": (
        "NumPy generators",
        lambda seed: np.random.Generator(np.random.MT19937(seed)),
        lambda g: g.normal(),
    ),
    "numpy-random-state": ("NumPy generators", lambda seed: np.random.RandomState(seed), lambda g: g.randn()),
    "python-random": ("`random.Random`", lambda seed: random.Random(seed), lambda g: g.gauss(0, 1)),
}
for _name, (_kind, _maker, _draw) in GENERATORS.items():
    for _suffix, _form in (("", "top"), ("-in-dict", "dict"), ("-per-rank", "rank")):
        add(
            f"{_name}{_suffix}",
            _kind,
            _drawing(_maker, _draw, _form),
            two_ranks=_form == "rank" and _name == "torch-generator",
        )


# ---- containers that take another shape --------------------------------------------------------------------------------


def _shapes(saved: Callable[[], Any], fresh: Callable[[], Any], name: str, two_ranks: bool = False) -> None:
    for suffix, wrap in (("", lambda value: value), ("-inside", lambda value: {"metrics": value, "n": number()})):
        add(
            f"{name}{suffix}",
            "containers that were empty, or of another shape, in the fresh program",
            lambda wrap=wrap: Run({"own": wrap(saved()), "other": number()}),
            twin=lambda wrap=wrap: Run({"own": wrap(fresh()), "other": number()}),
            steps=0,
            two_ranks=two_ranks,
        )


_shapes(lambda: {"loss": [0.5, number()], "best": {"at": 1}}, dict, "empty-dict", two_ranks=True)
_shapes(lambda: {"t": torch.rand(3), "u": {"v": torch.rand(2)}}, dict, "empty-dict-tensors", two_ranks=True)
_shapes(lambda: [1, {"a": torch.rand(2)}, [number()]], list, "empty-list", two_ranks=True)
_shapes(lambda: {"best": number(), "t": torch.rand(2)}, lambda: None, "none-into-dict", two_ranks=True)
_shapes(lambda: torch.rand(3), lambda: None, "none-into-tensor", two_ranks=True)
_shapes(lambda: None, lambda: {"a": number(), "b": {"t": torch.rand(2)}}, "dict-into-none")
_shapes(lambda: None, lambda: torch.rand(2), "tensor-into-none")
_shapes(lambda: number() / 3, lambda: None, "none-into-value")
_shapes(lambda: np.random.rand(3), lambda: None, "none-into-array", two_ranks=True)
_shapes(lambda: {"a": [np.random.rand(2), torch.rand(2)]}, dict, "empty-dict-arrays")
_shapes(VALUES["ordered-dict"][1], lambda: None, "none-into-ordered-dict")
_shapes(VALUES["default-dict-list"][1], lambda: None, "none-into-default-dict")
_shapes(TENSOR_TREES["ordered-dict"], lambda: None, "none-into-ordered-dict-tensors")
_shapes(TENSOR_TREES["namedtuple"], lambda: None, "none-into-namedtuple-tensors")
_shapes(dict, lambda: {"a": 1, "b": [2, torch.rand(2)]}, "dict-into-empty", two_ranks=True)
_shapes(list, lambda: [1, {"a": 2}], "list-into-empty")
_shapes(lambda: [1, torch.rand(2), 3, torch.rand(4)], lambda: [1, torch.rand(2)], "longer-list")
_shapes(lambda: number(), lambda: {"a": {"b": 1}}, "dict-into-value")
_shapes(lambda: {"a": {"b": number()}}, lambda: 3, "value-into-dict")
_shapes(lambda: (1, torch.rand(2)), lambda: (), "empty-tuple")
_shapes(lambda: collections.deque([1, number()], maxlen=3), lambda: collections.deque(maxlen=3), "empty-deque")
_shapes(lambda: collections.Counter(a=number()), collections.Counter, "empty-counter")
_shapes(lambda: {"a": torch.rand(2), "b": number()}, lambda: {"a": number(), "b": torch.rand(2)}, "tensors-for-values")


def _outgrown(saved: Callable[[], Any], grown: Callable[[], Any], name: str, two_ranks: bool = False) -> None:
    """What came into a container after it was given to its checkpoint goes, when what was before is restored."""

    def twin(wrap: Callable[[Any], Any]) -> Run:
        later = grown()
        held = type(later)()
        run = Run({"own": wrap(held), "other": number()})
        held.extend(later) if isinstance(later, list) else held.update(later)
        return run

    for suffix, wrap in (("", lambda value: value), ("-inside", lambda value: {"metrics": value, "n": number()})):
        add(
            f"{name}{suffix}",
            OUTGROWN,
            lambda wrap=wrap: Run({"own": wrap(saved()), "other": number()}),
            twin=lambda wrap=wrap: twin(wrap),
            steps=0,
            two_ranks=two_ranks,
        )


_outgrown(lambda: [1, 2, torch.rand(2)], lambda: [1, 2, torch.rand(2), 4, 5], "shorter-list")
_outgrown(lambda: {"a": 1, "c": 2, "d": [3]}, lambda: {"a": 0, "b": {"x": 5}}, "other-keys", two_ranks=True)
_outgrown(dict, lambda: {"a": 1, "b": {"c": 2}}, "rolled-back")


# ---- refused ---------------------------------------------------------------------------------------------------------


class Plain:
    """An object with no state_dict."""

    def __init__(self) -> None:
        self.a = 1


def _local_dataclass() -> Any:
    @dataclass
    class Local:
        a: int

    return Local(number())


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "flag": ("combined flags", lambda: [Bits.A | Bits.B, Bits(0), number()]),
    "object": ("objects without `state_dict`", Plain),
    "function": ("functions and lambdas", lambda: number),
    "lambda": ("functions and lambdas", lambda: lambda: 1),
    "default-dict-lambda": ("`defaultdict` with a function as factory", _default_dict(lambda: 1)),
    "local-dataclass": ("classes that are defined inside a function", _local_dataclass),
    "generator": ("iterators and generators", lambda: iter([1, 2])),
    "class": ("classes", lambda: Plain),
    "module": ("Python modules", lambda: random),
    "open-file": ("open files and locks", lambda: __import__("threading").Lock()),
}
for _name, (_kind, _make) in REFUSED.items():
    add(
        f"refused-{_name}",
        _kind,
        lambda make=_make: Run({"own": {"a": [1, {"x": make()}]}}),
        steps=0,
        refused=Refusal("own"),
    )
    add(f"refused-{_name}-alone", _kind, lambda make=_make: Run({"own": make()}), steps=0, refused=Refusal("own"))


def _cycle() -> Any:
    made: Any = {"a": 1}
    made["self"] = made
    return made


add("refused-cycle", "trees that contain themselves", lambda: Run({"own": _cycle()}), steps=0, refused=Refusal("own"))
