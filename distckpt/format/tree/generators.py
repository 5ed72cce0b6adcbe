"""Generators of random numbers as their states: a list of numbers, each in its range, because C code trusts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.format.tree.classes import Refused, Unresolved, type_name
from distckpt.format.tree.content import Read, Write, as_text, bytes_in, int_in, list_in, text_in

_U32, _U64, _U128 = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1


@dataclass(frozen=True, slots=True)
class _Words:
    """An array of unsigned integers."""

    count: int
    bits: int


_Schema = Mapping[str, "int | _Words | _Schema"]
"""What a state has in it: for a number the largest that it may be."""

_BUFFERED: _Schema = {"has_uint32": 1, "uinteger": _U32}
_STATES: dict[str, _Schema] = {
    "PCG64": {"state": {"state": _U128, "inc": _U128}, **_BUFFERED},
    "PCG64DXSM": {"state": {"state": _U128, "inc": _U128}, **_BUFFERED},
    "MT19937": {"state": {"key": _Words(624, 32), "pos": 624}},
    "Philox": {
        "state": {"counter": _Words(4, 64), "key": _Words(2, 64)},
        "buffer": _Words(4, 64),
        "buffer_pos": 4,
        **_BUFFERED,
    },
    "SFC64": {"state": {"state": _Words(4, 64)}, **_BUFFERED},
}
_KINDS = ("Generator", "BitGenerator", "RandomState")
_MOST_ENTROPY = 1 << 4096
_MOST_WORDS = 1024


# ---- NumPy --------------------------------------------------------------------------------------------------------


def is_numpy_generator(value: object) -> bool:
    """Whether ``value`` is a Generator, RandomState or BitGenerator of NumPy's own."""
    import numpy as np

    return type(value) in (np.random.Generator, np.random.RandomState) or _is_bits(value)


def _is_bits(value: object) -> bool:
    import numpy as np

    return type(value) in [vars(np.random)[name] for name in _STATES]


def write_numpy_generator(value: Any, write: Write) -> Any:
    """Which generator it is, its state, what it spawns from; of a RandomState also the normal number it has in store."""
    kind = "BitGenerator" if _is_bits(value) else type(value).__name__
    legacy = value.get_state(legacy=False) if kind == "RandomState" else None
    bits = value if kind == "BitGenerator" else value._bit_generator if legacy else value.bit_generator
    if not _is_bits(bits):
        raise Refused(f"is a generator of {type_name(type(bits))}. Use one of {', '.join(_STATES)}")
    state = _plain(bits.state, _STATES[type(bits).__name__])
    gauss = [int(legacy["has_gauss"]), float(legacy["gauss"])] if legacy else None
    parts = {"state": state, "seed_seq": _plain_sequence(bits), "gauss": gauss}
    return {
        "$numpy.random": [kind, type(bits).__name__, *(write(part, name) for name, part in parts.items())],
    }


def read_numpy_generator(content: Any, read: Read) -> Any:
    """A new generator in that state."""
    import numpy as np

    kind, name, *parts = list_in(content, 5)
    state, spawns, gauss = map(read, parts)
    if kind not in _KINDS or text_in(name) not in _STATES or (gauss is None) == (kind == "RandomState"):
        raise ValueError("an unknown generator")
    bits = _bits(name, spawns)
    bits.state = {"bit_generator": name, **_checked(state, _STATES[name])}
    if kind == "BitGenerator":
        return bits
    if kind == "Generator":
        return np.random.Generator(bits)
    found = np.random.RandomState(bits)
    has_gauss, number = list_in(gauss, 2)
    if type(number) is not float:
        raise ValueError("a float is expected")
    found.set_state({**bits.state, "has_gauss": int_in(has_gauss, 0, 1), "gauss": number})
    return found


def _plain(state: Mapping[str, Any], schema: _Schema) -> dict[str, Any]:
    return {
        name: _plain(state[name], form)
        if isinstance(form, Mapping)
        else state[name].tolist()
        if isinstance(form, _Words)
        else int(state[name])
        for name, form in schema.items()
    }


def _checked(state: Any, schema: _Schema) -> dict[str, Any]:
    import numpy as np

    if type(state) is not dict or state.keys() != schema.keys():
        raise ValueError(f"a state of {', '.join(schema)} is expected")
    found: dict[str, Any] = {}
    for name, form in schema.items():
        if isinstance(form, Mapping):
            found[name] = _checked(state[name], form)
        elif isinstance(form, _Words):
            words = [int_in(word, 0, (1 << form.bits) - 1) for word in list_in(state[name], form.count)]
            found[name] = np.array(words, f"u{form.bits // 8}")
        else:
            found[name] = int_in(state[name], 0, form)
    return found


def _plain_sequence(bits: Any) -> Any:
    import numpy as np

    sequence: Any = bits.seed_seq
    if sequence is None and type(bits) is np.random.MT19937:
        return None  # as RandomState(7) seeds it
    if type(sequence) is not np.random.SeedSequence:
        raise Refused(f"is a generator that spawns from a {type_name(type(sequence))}. Seed it with a SeedSequence")
    entropy: Any = sequence.entropy
    plain = int(entropy) if not hasattr(entropy, "__len__") else [int(word) for word in entropy]
    try:
        return _checked_sequence(
            [plain, [int(word) for word in sequence.spawn_key], sequence.pool_size, sequence.n_children_spawned]
        )
    except ValueError as error:
        raise Refused(f"is a generator whose seed sequence cannot be stored: {error}") from error


def _checked_sequence(content: Any) -> list[Any]:
    entropy, spawn_key, pool_size, children = list_in(content, 4)
    for words in [entropy] if type(entropy) is list else []:
        for word in words:
            int_in(word, 0, _MOST_ENTROPY)
    if type(entropy) is not list:
        int_in(entropy, 0, _MOST_ENTROPY)
    if max(len(entropy) if type(entropy) is list else 0, len(list_in(spawn_key))) > _MOST_WORDS:
        raise ValueError(f"more than {_MOST_WORDS} numbers to seed with")
    for word in spawn_key:
        int_in(word, 0, _U32)
    return [entropy, spawn_key, int_in(pool_size, 4, _MOST_WORDS), int_in(children, 0, _U32)]


def _bits(name: str, spawns: Any) -> Any:
    import numpy as np

    if spawns is None:
        if name != "MT19937":
            raise ValueError("a seed sequence is expected")
        return np.random.RandomState(0)._bit_generator
    entropy, spawn_key, pool_size, children = _checked_sequence(spawns)
    sequence = np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=children)
    return vars(np.random)[name](sequence)


# ---- torch --------------------------------------------------------------------------------------------------------


def write_torch_generator(value: Any) -> Any:
    """The device and the bytes of the state."""
    return {"$torch.Generator": [str(value.device), as_text(value.get_state().numpy().tobytes())]}


def read_torch_generator(content: Any, read: Read) -> Any:
    """A new generator of that device in that state; Unresolved if there is no such device here."""
    import numpy as np
    import torch

    device, text = map(text_in, list_in(content, 2))
    raw = bytes_in(text)
    try:
        found = torch.Generator(torch.device(device))
    except (RuntimeError, AssertionError):  # the second if torch was built without the device
        return Unresolved("torch.Generator", device, raw)
    try:
        found.set_state(torch.from_numpy(np.frombuffer(raw, np.uint8).copy()))
    except RuntimeError as error:
        raise ValueError(f"no state of a generator: {error}") from error
    return found
