"""NumPy arrays as values: those of plain bytes for which torch has no dtype. They come back to the last bit.

Big-endian and structured arrays, dates, texts. Most arrays are no values: they are stored as tensors are.
"""

from __future__ import annotations

import re
from typing import Any

from distckpt.format.tree.classes import Refused, type_name
from distckpt.format.tree.content import Read, as_text, bytes_in, int_in, list_in, text_in

NUMPY_SCALAR = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[mM]8(\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
NUMPY_DTYPE = re.compile(NUMPY_SCALAR.pattern + r"|[<>|][SUV][0-9]{1,9}")

MOST_BYTES = 16 << 20
"""Of an array that is stored as a value: it is text then, and is read as a whole."""

_OF_TENSORS = re.compile(r"[=<|](b1|[iu][1248]|f[248]|c8|c16)")
_MOST_DIMENSIONS = 32
_MOST_NESTED = 16
_MOST_SIZE = (1 << 63) - 1


def is_tensor_array(value: object) -> bool:
    """Whether ``value`` is a NumPy array that is stored as a tensor: of a dtype that torch has, and of no subclass.

    Any other array is a plain value: ``encode_value`` carries it exactly, or refuses it by name.
    """
    import numpy as np

    return type(value) in (np.ndarray, np.memmap) and _OF_TENSORS.fullmatch(value.dtype.str) is not None  # type: ignore[attr-defined]


def write_array(value: Any) -> Any:
    """The typed form of an array that is no tensor's. Refused, with what to do instead, if its bytes are not all."""
    import numpy as np

    if type(value) is not np.ndarray:
        raise Refused(f"is an array of type {type_name(type(value))}. Store np.asarray() of it, and a mask beside it")
    form = _dtype_form(value.dtype)
    _check_readable(form, value.dtype)
    if value.nbytes > MOST_BYTES:
        raise Refused(
            f"is an array of {value.dtype} and {value.nbytes} bytes; torch has no such dtype, and as a value no more than "
            f"{MOST_BYTES} bytes can be stored. Store its fields one by one, or astype() a native dtype"
        )
    if value.ndim > _MOST_DIMENSIONS:
        raise Refused(f"is an array of {value.ndim} dimensions, and {_MOST_DIMENSIONS} is the most that can be stored")
    order: Any = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return {"$numpy.array": [form, list(value.shape), order, as_text(_bytes_of(value, order))]}


def _bytes_of(value: Any, order: Any) -> bytes:
    import numpy as np

    if value.dtype.names is None:
        return bytes(value.tobytes(order))
    # What lies between fields is whatever was in memory: it would differ from rank to rank.
    clean = np.zeros(value.shape, value.dtype, order)
    _copy_fields(clean, value)
    return clean.tobytes(order)


def _copy_fields(into: Any, value: Any) -> None:
    """Field by field: from NumPy 2.5 on the assignment of all of a structured array takes what lies between them, too."""
    if value.dtype.names is None:
        into[...] = value
        return
    for name in value.dtype.names:
        _copy_fields(into[name], value[name])


def read_array(content: Any, read: Read) -> Any:
    """The array, in memory of its own."""
    import numpy as np

    form, shape, order, text = list_in(content, 4)
    dtype = _dtype(form, 0)
    sizes = _shape(shape)
    raw = bytes_in(text)
    count = dtype.itemsize
    for size in sizes:
        count *= size
    if count != len(raw) or dtype.itemsize == 0 or order not in ("C", "F"):
        raise ValueError(f"{count} bytes of elements in C or F order are expected")
    return np.ndarray(sizes, dtype, bytearray(raw), order=order)


# ---- dtypes -------------------------------------------------------------------------------------------------------


def _dtype_form(dtype: Any) -> Any:
    import numpy as np

    if dtype.subdtype is not None:
        return {"of": _dtype_form(dtype.base), "shape": list(dtype.shape)}
    if dtype.names is None:
        if not NUMPY_DTYPE.fullmatch(dtype.str) or np.dtype(dtype.str) != dtype or not dtype.itemsize:
            raise Refused(f"is an array of dtype {dtype}, which is not plain bytes everywhere. {_advice(dtype)}")
        _check_nothing_more(dtype)
        return dtype.str
    _check_nothing_more(dtype)
    if any(len(dtype.fields[name]) > 2 for name in dtype.names):
        raise Refused(f"is an array of dtype {dtype}, whose fields have titles. Store its fields one by one")
    fields = [[name, dtype.fields[name][1], _dtype_form(dtype.fields[name][0])] for name in dtype.names]
    return {"fields": fields, "itemsize": dtype.itemsize, "align": dtype.isalignedstruct}


def _check_readable(form: Any, dtype: Any) -> None:
    """A form that no reader would take, of a dtype nested too deeply say, is not written."""
    try:
        same = _dtype(form, 0) == dtype and dtype.itemsize > 0
        why = "nothing of it would come back"
    except ValueError as error:
        same, why = False, str(error)
    if not same:
        raise Refused(f"is an array of a dtype that cannot be stored: {why}. Store its fields one by one")


def _advice(dtype: Any) -> str:
    if dtype.hasobject:
        return "Store a list of its items: tolist()"
    return "Store another dtype, by astype(str) of text or astype(np.float64) of numbers"


def _check_nothing_more(dtype: Any) -> None:
    if dtype.metadata:
        raise Refused(f"is an array whose dtype {dtype} has metadata. Store the metadata beside a plain array")


def _dtype(form: Any, depth: int) -> Any:
    import numpy as np

    if depth > _MOST_NESTED:
        raise ValueError(f"a dtype nested deeper than {_MOST_NESTED} levels")
    if type(form) is str:
        return np.dtype(text_in(form, NUMPY_DTYPE))
    if type(form) is not dict:
        raise ValueError("a dtype is expected")
    if form.keys() == {"of", "shape"}:
        return np.dtype((_dtype(form["of"], depth + 1), _shape(form["shape"])))
    if form.keys() != {"fields", "itemsize", "align"} or type(form["align"]) is not bool:
        raise ValueError("a dtype with other members")
    fields = [list_in(field, 3) for field in list_in(form["fields"])]
    return np.dtype(
        {
            "names": [text_in(name) for name, _, _ in fields],
            "offsets": [int_in(offset, 0, _MOST_SIZE) for _, offset, _ in fields],
            "formats": [_dtype(inner, depth + 1) for _, _, inner in fields],
            "itemsize": int_in(form["itemsize"], 1, _MOST_SIZE),
        },
        align=form["align"],
    )


def _shape(content: Any) -> tuple[int, ...]:
    sizes = list_in(content)
    if len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"more than {_MOST_DIMENSIONS} dimensions")
    return tuple(int_in(size, 0, _MOST_SIZE) for size in sizes)
