"""Containers that come back as the type that they were: what they are, what is in them, and how they are made again.

A *kind* says all of a container but what is in it: ``("OrderedDict",)``, ``("deque", 5)``,
``("dataclass", "train", "State")``. It stands in the paths of tensors that are somewhere inside, and its parts in the
value of a container that holds none.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from distckpt.format.tree.classes import (
    Refused,
    Unresolved,
    base_of,
    check_key,
    fields_of,
    form_of,
    made_of_fields,
    made_of_plain,
    named,
    names_of,
    plain_of,
    type_name,
)
from distckpt.format.tree.content import HERE, Read, Write, WriteAll, int_in, list_in, text_in
from distckpt.format.tree.many import ATOMS

Kind = tuple[str | int | None, ...]

_MOST = (1 << 63) - 1
_STANDARD = (OrderedDict, Counter, defaultdict, deque)
_PARTS = {"OrderedDict": "pairs", "Counter": "pairs", "defaultdict": "pairs", "deque": "items"} | {
    "dataclass": "fields",
    "namedtuple": "fields",
}
_OF_BASE = {"dict": "pairs", "list": "items", "tuple": "items"}
_BASES: dict[str, type] = {"dict": dict, "list": list, "tuple": tuple}

_FACTORIES: dict[str, type] = {
    kind.__name__: kind
    for kind in (list, dict, set, tuple, int, float, str, bool, bytes, complex, frozenset, OrderedDict, Counter, deque)
}
_OF_TORCH = {"_metadata"}
"""What torch notes on the OrderedDict of a state_dict; it is made again by the module."""


def is_container(value: Any) -> bool:
    """Whether ``value`` is a container with a kind: anything but a plain dict, list or tuple that has items."""
    kind = type(value)
    if kind in _STANDARD:
        return True
    if kind is Unresolved:
        return value.kind in _PARTS or (value.kind == "subclass" and type(value.content).__name__ in _OF_BASE)
    form = form_of(kind)
    return form in _PARTS or (form == "subclass" and base_of(kind).__name__ in _OF_BASE)


def parts_of(kind: Kind) -> str:
    """What containers of this kind have in them: ``pairs`` of key and value, ``items``, or ``fields``."""
    return _OF_BASE[str(kind[3])] if kind[0] == "subclass" else _PARTS[str(kind[0])]


def kind_of(value: Any) -> Kind:
    """The kind of a container. Refused if none says it."""
    kind = type(value)
    if kind is defaultdict:
        return ("defaultdict", _factory_name(value.default_factory))
    if kind is deque:
        return ("deque", value.maxlen)
    if kind in _STANDARD:
        return (kind.__name__,)
    if kind is Unresolved:
        module, _, name = value.type_name.partition(":")
        return (value.kind, module, name, *([type(value.content).__name__] if value.kind == "subclass" else []))
    form = form_of(kind)
    return (form, *named(kind), *([base_of(kind).__name__] if form == "subclass" else []))


def entries_of(value: Any) -> list[tuple[Any, Any]]:
    """All that is in a container, each with its key, position or field. Refused if that is not all that it holds."""
    kind = type(value)
    if kind in _STANDARD:
        return list(zip(*_keys_and_items(value), strict=True))
    if kind is Unresolved:
        return list(value.content) if value.kind in _PARTS else _entries(value.content)
    form = form_of(kind) or ""
    return list(fields_of(value, form).items()) if form in _PARTS else _entries(plain_of(value))


def items_of(value: Any) -> Collection[Any]:
    """The items alone, in no particular order. Refused as by ``entries_of``."""
    kind = type(value)
    if kind not in _STANDARD:
        return [item for _, item in entries_of(value)]
    _check_attributes(value)
    return value if kind is deque else dict.values(value)


def _keys_and_items(value: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of a container of the standard library, apart: so many pairs would keep the garbage collector busy."""
    _check_attributes(value)
    if type(value) is deque:
        return range(len(value)), list(value)
    keys = list(value)
    # An OrderedDict takes twenty times as long to give its items by itself.
    return keys, [dict.__getitem__(value, key) for key in keys]


def _check_attributes(value: Any) -> None:
    if type(value) is OrderedDict and (more := [name for name in vars(value) if name not in _OF_TORCH]):
        raise Refused(f"is an OrderedDict with attributes ({', '.join(more[:5])}). Store them as items")


def _entries(plain: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return list(plain.items()) if isinstance(plain, dict) else list(enumerate(plain))


def _factory_name(factory: Any) -> str | None:
    if factory is None:
        return None
    if type(factory) is type:
        name = names_of(factory)[1]
        if _FACTORIES.get(name) is factory:
            return name
    raise Refused(
        f"is a defaultdict whose factory is code ({type_name(type(factory))}). "
        f"Store dict(...) of it, or use a factory of {', '.join(_FACTORIES)}"
    )


# ---- made again ---------------------------------------------------------------------------------------------------


def check_kind(content: Any) -> Kind:
    """The kind that JSON says. ValueError if it says none."""
    name, *rest = list_in(content)
    match name, rest:
        case (("OrderedDict" | "Counter"), []):
            return (name,)
        case "defaultdict", [factory]:
            return (name, None if factory is None else _known(factory, _FACTORIES))
        case "deque", [length]:
            return (name, None if length is None else int_in(length, 0, _MOST))
        case (("dataclass" | "namedtuple"), [module, of]):
            return (name, text_in(module), text_in(of))
        case "subclass", [module, of, base]:
            return (name, text_in(module), text_in(of), _known(base, _OF_BASE))
    raise ValueError("an unknown kind of container")


def _known(name: Any, names: Mapping[str, Any]) -> str:
    if text_in(name) not in names:
        raise ValueError(f"{name[:40]!r} is none of {', '.join(names)}")
    return str(name)


def container(kind: Kind, entries: Sequence[tuple[Any, Any]]) -> Any:
    """The container of that kind with these entries, in their order. ValueError if it cannot have them."""
    match kind:
        case ("dataclass" | "namedtuple") as form, str(module), str(name):
            return made_of_fields(form, module, name, _distinct(entries))
        case "subclass", str(module), str(name), str(base):
            return made_of_plain(module, name, _plain(base, entries))
        case "deque", length:
            if length is not None and len(entries) > int(length):
                raise ValueError(f"a deque of at most {length} items has {len(entries)}")
            return deque([item for _, item in entries], None if length is None else int(length))
        case "defaultdict", factory:
            return defaultdict(None if factory is None else _FACTORIES[str(factory)], _distinct(entries))
        case ("Counter",):
            counter: Counter[Any] = Counter()
            dict.update(counter, _distinct(entries))
            return counter
    return OrderedDict(_distinct(entries))


def _plain(base: str, entries: Sequence[tuple[Any, Any]]) -> Any:
    return _distinct(entries) if base == "dict" else _BASES[base](item for _, item in entries)


def _distinct(entries: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, _ in entries:
        check_key(key)
    found = dict(entries)
    if len(found) != len(entries):
        raise ValueError("equal keys in one container")
    return found


# ---- as values ----------------------------------------------------------------------------------------------------


def write_container(value: Any, write: Write, write_all: WriteAll) -> dict[str, Any]:
    """The value of a container."""
    kind = kind_of(value)
    name, rest = str(kind[0]), kind[1:]
    if name == "subclass":
        return {"$subclass": [*rest[:2], write(plain_of(value), HERE)]}
    if parts_of(kind) == "fields":
        return {f"${name}": [*rest, {key: write(item, key) for key, item in entries_of(value)}]}
    if type(value) in _STANDARD:
        keys, items = _keys_and_items(value)
    else:
        entries = entries_of(value)
        keys, items = [key for key, _ in entries], [item for _, item in entries]
    body = write_all(items, keys)
    if parts_of(kind) != "items":
        if not set(map(type, keys)) <= ATOMS:
            for key in keys:
                check_key(key)
        body = list(zip(write_all(keys, keys), body, strict=True))
    return {f"${name}": [*rest, body] if rest else body}


def _read(name: str, args: int) -> Callable[[Any, Read], Any]:
    def read_container(content: Any, read: Read) -> Any:
        *rest, body = list_in(content, args + 1) if args else [content]
        kind = check_kind([name, *rest])
        if parts_of(kind) == "fields":
            if type(body) is not dict:
                raise ValueError("an object of fields is expected")
            return container(kind, [(field, read(item)) for field, item in body.items()])
        if parts_of(kind) == "items":
            return container(kind, [(at, read(item)) for at, item in enumerate(list_in(body))])
        return container(kind, [(read(key), read(item)) for key, item in (list_in(pair, 2) for pair in list_in(body))])

    return read_container


READERS: dict[str, Callable[[Any, Read], Any]] = {
    f"${name}": _read(name, args)
    for name, args in {
        "OrderedDict": 0,
        "Counter": 0,
        "defaultdict": 1,
        "deque": 1,
        "dataclass": 2,
        "namedtuple": 2,
    }.items()
}
