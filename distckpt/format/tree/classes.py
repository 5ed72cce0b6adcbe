"""Values of classes that people wrote: what may be taken apart, by which name it is found again, how it is put together.

Dataclasses, namedtuples, and subclasses of str, int, float, bytes, tuple, list and dict that hold nothing else. A class
is looked up among the modules that are imported already, and none of its code runs in either direction: what is read
was chosen by a file. For that reason a class with ``__del__``, or with a metaclass that decides what its attributes are,
is not used at all, and one with a hash or equality of its own not as the key of a dict.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import EnumMeta
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, cast


class Refused(ValueError):
    """A value cannot be stored; the text goes on from "what is at this place". An EncodeError or DamagedError is made of it."""


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A value whose class this process has not imported, or has in another form; saved again, it is what it was.

    ``kind`` is ``dataclass``, ``namedtuple``, ``subclass``, ``path`` or ``torch.Generator``; ``type_name`` is
    ``module:qualified.name``, or the device of a generator. ``content`` is ``((field, value), ...)`` of the first two,
    and the plain value of the others.
    """

    kind: str
    type_name: str
    content: Any


@dataclass(frozen=True, slots=True)
class UnresolvedEnum:
    """An enum member whose class this process has not imported. ``type_name`` is ``module:qualified.name``."""

    type_name: str
    member: str
    value: Any


BASES: tuple[type, ...] = (str, int, float, bytes, tuple, list, dict)
"""What a class may be a subclass of, and still be nothing but a plain value with a name."""

_MISSING = object()
_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_DICT_OF = type.__dict__["__dict__"].__get__
_MRO_OF = type.__dict__["__mro__"].__get__
_FLAGS_OF = type.__dict__["__flags__"].__get__
_FORGOTTEN = {"__orig_class__"}
"""What ``Box[int](...)`` notes on its instances for type checkers; it is no part of the value."""


# ---- classes and their names --------------------------------------------------------------------------------------


def find_class(module: str, name: str) -> type | None:
    """The class of that name in a module that is imported already. Runs no code of that module."""
    found: Any = sys.modules.get(module)
    if not issubclass(type(found), ModuleType):
        return None
    # A module's or class's own __getattr__ could import or do anything, so only its dictionary is looked at.
    for part in name.split("."):
        if issubclass(type(found), type):
            found = _DICT_OF(found).get(part)
        elif issubclass(type(found), ModuleType):
            found = object.__getattribute__(found, "__dict__").get(part)
        else:
            return None
    return found if issubclass(type(found), type) else None


def find_enum(module: str, name: str) -> EnumMeta | None:
    """The enum class of that name in a module that is imported already. Runs no code of that module."""
    found = find_class(module, name)
    return cast(EnumMeta, found) if issubclass(type(found), EnumMeta) else None


def names_of(kind: type) -> tuple[str, str]:
    """Module and qualified name, whatever the class has put in their place."""
    made_by_python = _FLAGS_OF(kind) & _MADE_BY_PYTHON
    module = static(kind, "__module__") if made_by_python else type.__dict__["__module__"].__get__(kind)
    name = type.__dict__["__qualname__"].__get__(kind)
    return (module if type(module) is str else ""), name


def type_name(kind: type) -> str:
    """The class as people write it: ``bytearray``, ``torch.nn.modules.linear.Linear``."""
    module, name = names_of(kind)
    return name if module in ("", "builtins") else f"{module}.{name}"


def static(kind: type, name: str) -> Any:
    """What the class or one it is made of has under that name, without asking it; a private mark if there is nothing."""
    for base in _MRO_OF(kind):
        found = _DICT_OF(base).get(name, _MISSING)
        if found is not _MISSING:
            return found
    return _MISSING


def _has(kind: type, name: str) -> bool:
    return static(kind, name) is not _MISSING


def named(kind: type) -> tuple[str, str]:
    """Module and name by which readers find the class. Refused if they cannot, or must not."""
    module, name = names_of(kind)
    if "<locals>" in name:
        raise Refused(f"is of the class {name}, which is made inside a function. Define it at the top of a module")
    if find_class(module, name) is not kind:
        raise Refused(f"is of the class {module}.{name}, which no import can find. Define it at the top of a module")
    return module, name


# ---- which classes ------------------------------------------------------------------------------------------------


def form_of(kind: type) -> str | None:
    """How values of the class are taken apart: ``dataclass``, ``namedtuple``, ``subclass``, or None: not at all."""
    if not _FLAGS_OF(kind) & _MADE_BY_PYTHON or issubclass(type(kind), EnumMeta):
        return None
    if type(static(kind, "__dataclass_fields__")) is dict:
        return "dataclass"
    if issubclass(kind, BASES):
        return "namedtuple" if issubclass(kind, tuple) and _namedtuple_fields(kind) is not None else "subclass"
    return None


def base_of(kind: type) -> type:
    """The builtin type that the class is a subclass of."""
    mro: tuple[type, ...] = _MRO_OF(kind)
    return next(base for base in mro if base in BASES)


def _namedtuple_fields(kind: type) -> tuple[str, ...] | None:
    fields = static(kind, "_fields")
    return fields if type(fields) is tuple and all(type(field) is str for field in fields) else None


def _dataclass_fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _unusable(kind: type, form: str) -> str | None:
    """Why no value of the class can be made without running its code; None if one can."""
    if static(type(kind), "__getattribute__") is not type.__dict__["__getattribute__"]:
        return "whose metaclass decides what its attributes are"
    if _has(kind, "__del__"):
        return "which has __del__, so that making and dropping one runs code"
    if type(static(kind, "__dict__")) not in (GetSetDescriptorType, object):
        return "which has a __dict__ of its own making"
    if form == "dataclass":
        for name in _dataclass_fields(kind):
            if _is_computed(static(kind, name)):
                return f"whose field {name} is computed by a descriptor"
    try:
        _bare(kind, form)
    except TypeError as error:
        return f"of which no bare instance can be made: {error}"
    return None


def _is_computed(member: Any) -> bool:
    return type(member) is not MemberDescriptorType and (
        _has(type(member), "__set__") or _has(type(member), "__delete__")
    )


def _bare(kind: type, form: str) -> Any:
    base: Any = object if form == "dataclass" else base_of(kind)
    return base.__new__(kind)


# ---- taking apart -------------------------------------------------------------------------------------------------


def fields_of(value: Any, form: str) -> Mapping[str, Any]:
    """Fields and values of a dataclass or namedtuple. Refused if it could not be put together again, or holds more."""
    kind = type(value)
    check_storable(kind, form)
    if form == "namedtuple":
        names = _namedtuple_fields(kind) or ()
        if len(names) != tuple.__len__(value) or len(set(names)) != len(names):
            raise Refused(
                f"is of the class {type_name(kind)}, and has another number of items than the class has fields"
            )
        _refuse_more(value, ())
        return dict(zip(names, tuple.__iter__(value), strict=True))
    if _has(kind, "state_dict") and _has(kind, "load_state_dict"):
        raise Refused(
            f"is of the class {type_name(kind)}, which has state_dict(). Give it to Checkpoint by its own name"
        )
    names = _dataclass_fields(kind)
    _refuse_more(value, names)
    return {name: _field(value, name) for name in names}


def plain_of(value: Any) -> Any:
    """The builtin value that an instance of a subclass is. Refused if it could not be made again, or holds more."""
    check_storable(type(value), "subclass")
    _refuse_more(value, ())
    return as_base(value)


def as_base(value: Any) -> Any:
    """The value as an instance of its builtin base; no method that its class has overridden is used."""
    base: Any = base_of(type(value))
    if base is dict:
        return dict(dict.items(value))
    if base in (list, tuple):
        return base(base.__iter__(value))
    return _PLAIN[base](value)


_PLAIN: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda value: bytes.__getitem__(value, slice(None, None, None)),
}


def check_storable(kind: type, form: str) -> None:
    """Refused if readers could not make values of the class."""
    named(kind)
    why = _unusable(kind, form)
    if why is not None:
        raise Refused(f"is of the class {type_name(kind)}, {why}. Store its parts in a dict instead")


def _refuse_more(value: Any, fields: Iterable[str]) -> None:
    kind = type(value)
    more = [name for name in _own(value) if name not in fields and name not in _FORGOTTEN]
    for base in _MRO_OF(kind):
        for name, member in _DICT_OF(base).items():
            if type(member) is MemberDescriptorType and name not in fields and _slot(member, value) is not _MISSING:
                more.append(name)
    if more:
        shown = ", ".join(str(name) for name in more[:5])
        raise Refused(
            f"is a {type_name(kind)} that holds more than its value: {shown}. Store its parts in a dict instead"
        )


def _own(value: Any) -> dict[str, Any]:
    """The instance's dictionary; an empty one if it has none."""
    return cast("dict[str, Any]", object.__getattribute__(value, "__dict__")) if _has(type(value), "__dict__") else {}


def _slot(member: MemberDescriptorType, value: Any) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return _MISSING


def _field(value: Any, name: str) -> Any:
    member = static(type(value), name)
    # A field that __init__ does not set has the class's default.
    found = _slot(member, value) if type(member) is MemberDescriptorType else _own(value).get(name, member)
    if found is _MISSING:
        raise Refused(f"is a {type_name(type(value))} whose field {name} has no value")
    return found


# ---- putting together ---------------------------------------------------------------------------------------------


def made_of_fields(form: str, module: str, name: str, fields: Mapping[str, Any]) -> Any:
    """The dataclass or namedtuple of that class with these fields; Unresolved if there is no such class here."""
    kind = find_class(module, name)
    if kind is None or form_of(kind) != form or _unusable(kind, form) is not None:
        return Unresolved(form, f"{module}:{name}", tuple(fields.items()))
    names = _namedtuple_fields(kind) if form == "namedtuple" else _dataclass_fields(kind)
    if names is None or len(names) != len(fields) or any(field not in fields for field in names):
        return Unresolved(form, f"{module}:{name}", tuple(fields.items()))
    if form == "namedtuple":
        return tuple.__new__(kind, [fields[field] for field in names])
    return _with_fields(object.__new__(kind), fields)


def _with_fields(made: Any, fields: Mapping[str, Any]) -> Any:
    for name, value in fields.items():
        member = static(type(made), name)
        if type(member) is MemberDescriptorType:
            member.__set__(made, value)
        else:
            object.__getattribute__(made, "__dict__")[name] = value
    return made


def made_of_plain(module: str, name: str, plain: Any) -> Any:
    """The value of a subclass of the plain one's type; Unresolved if there is no such class here."""
    kind = find_class(module, name)
    usable = kind is not None and form_of(kind) == "subclass" and base_of(kind) is type(plain)
    if kind is None or not usable or _unusable(kind, "subclass") is not None:
        return Unresolved("subclass", f"{module}:{name}", plain)
    base: Any = type(plain)
    if base is dict:
        made: Any = dict.__new__(kind)
        dict.update(made, plain)
        return made
    if base is list:
        items: Any = list.__new__(kind)
        list.extend(items, plain)
        return items
    return base.__new__(kind, plain)


# ---- keys ---------------------------------------------------------------------------------------------------------

_ATOMS = {type(None), bool, int, float, complex, str, bytes}


def check_key(value: Any) -> None:
    """Refused if hashing or comparing the value runs code that people wrote: then it is no key, and in no set."""
    kind = type(value)
    if kind in _ATOMS:
        return
    if kind in (tuple, frozenset):
        for item in value:
            check_key(item)
    elif kind is Unresolved:
        check_key(value.content)
    elif (form := form_of(kind)) is not None:
        _check_hash(kind, form)
        if form == "dataclass":
            for name in _dataclass_fields(kind):
                check_key(_field(value, name))
        elif issubclass(kind, tuple):
            for item in tuple.__iter__(value):
                check_key(item)


def _check_hash(kind: type, form: str) -> None:
    base = object if form == "dataclass" else base_of(kind)
    for name in ("__hash__", "__eq__"):
        method = static(kind, name)
        if form == "dataclass":
            plain = type(method) is FunctionType and method.__code__.co_filename == "<string>"  # dataclass wrote it
        else:
            plain = method is static(base, name)
        if not plain:
            raise Refused(f"is a key of the class {type_name(kind)}, which has {name} of its own. Use plain keys")


def is_step(key: Any) -> bool:
    """Whether a dict key can stand in a path: its text, hash and equality need no code that people wrote, but enums'."""
    kind = type(key)
    if kind in _ATOMS:
        return True
    if kind in (tuple, frozenset):
        return all(form_of(type(item)) is None and is_step(item) for item in key)
    if kind is Unresolved:
        return key.kind == "subclass" and is_step(key.content)
    form = form_of(kind)
    if form is None:
        return True
    try:
        check_key(key)
    except Refused:
        return False
    return form == "subclass" and base_of(kind) in _ATOMS


def key_text(key: Any) -> str:
    """The key as people write it; that of a subclass is its plain value's."""
    if type(key) is Unresolved:
        return str(key.content)
    return str(as_base(key) if form_of(type(key)) == "subclass" else key)
