"""Text that no writer of typed values makes: always damage, whatever it asks for, and nothing is imported."""

from __future__ import annotations

import json
import pathlib
import random
import sys
from typing import Any

import numpy as np
import pytest

from distckpt.errors import DamagedError
from distckpt.format.tree.values import decode_value, encode_value

HOSTILE = [
    '{"$OrderedDict":1}', '{"$OrderedDict":[[1]]}', '{"$OrderedDict":[["a",1],["a",2]]}', '{"$OrderedDict":[[[1],1]]}',
    '{"$OrderedDict":{"a":1}}', '{"$Counter":[[{"$dict":[]},1]]}', '{"$Counter":["ab"]}', '{"$defaultdict":[1,[]]}',
    '{"$defaultdict":["eval",[]]}', '{"$defaultdict":["defaultdict",[]]}', '{"$defaultdict":[]}',
    '{"$defaultdict":["list",{}]}', '{"$deque":[-1,[]]}', '{"$deque":[1,[1,2]]}', '{"$deque":[9223372036854775808,[]]}',
    '{"$deque":[true,[]]}', '{"$deque":[1.0,[]]}', '{"$deque":[null]}', '{"$dataclass":["a","b"]}',
    '{"$dataclass":["a","b",[]]}', '{"$dataclass":[1,"b",{}]}', '{"$namedtuple":["a",null,{}]}',
    '{"$namedtuple":["a","b",{},1]}', '{"$subclass":["a","b"]}', '{"$subclass":["a","b",null]}',
    '{"$subclass":["a","b",{"$set":[]}]}', '{"$subclass":["a",1,"c"]}', '{"$subclass":["a","b",{"$subclass":["a","b","c"]}]}',
    '{"$Decimal":"abc"}', '{"$Decimal":"1_0"}', '{"$Decimal":" 1"}', '{"$Decimal":"1e5"}', '{"$Decimal":1}',
    '{"$Decimal":"1E+9999999999999999999"}', '{"$Decimal":"\u0661"}', '{"$Fraction":[1,0]}', '{"$Fraction":[2,4]}',
    '{"$Fraction":[1,-2]}', '{"$Fraction":[1.0,2]}', '{"$Fraction":[true,1]}', '{"$Fraction":"1/2"}',
    '{"$range":[0,1,0]}', '{"$range":[0,1]}', '{"$range":[0,1,true]}', '{"$range":[0,1.0,1]}', '{"$slice":[1,2]}',
    '{"$bytearray":100}', '{"$bytearray":"a"}', '{"$date":"2024-13-01"}', '{"$date":"20240101"}', '{"$date":1}',
    '{"$datetime":["2024-01-01T00:00:00",null,2]}', '{"$datetime":["2024-01-01",null,0]}',
    '{"$datetime":["2024-01-01T00:00:00","UTC",0]}', '{"$datetime":["2024-01-01T00:00:00+00:00",null,0]}',
    '{"$time":["25:00:00",null,0]}', '{"$time":["12:00:00",null]}', '{"$timedelta":[1000000000,0,0]}',
    '{"$timedelta":[0,86400,0]}', '{"$timedelta":[999999999,86399,1000000]}', '{"$timedelta":[0,0,1.0]}',
    '{"$timezone":[{"$timedelta":[1,0,0]}]}', '{"$timezone":[1]}', '{"$timezone":[]}',
    '{"$timezone":[{"$timedelta":[0,0,0]},"a","b"]}', '{"$path":["open","a"]}', '{"$path":["Path",1]}',
    '{"$path":["os.path","a"]}', '{"$Random":[3,[1],null]}', '{"$Random":[2,[],null]}', '{"$Random":3}',
    '{"$numpy.array":["O",[1],"C","AAAAAAAAAAA="]}', '{"$numpy.array":["<f4",[2],"C","AAAAAA=="]}',
    '{"$numpy.array":["<f4",[-1],"C",""]}', '{"$numpy.array":["<f4",[1],"K","AAAAAA=="]}',
    '{"$numpy.array":["<f4",[4611686018427387904,4611686018427387904],"C",""]}',
    '{"$numpy.array":["|S0",[4611686018427387904],"C",""]}', '{"$numpy.array":["<f16",[0],"C",""]}',
    '{"$numpy.array":["<M8[7zz]",[0],"C",""]}', '{"$numpy.array":["i4,O",[0],"C",""]}',
    '{"$numpy.array":["<f4",[0,9223372036854775807,9223372036854775807],"C",""]}',
    '{"$numpy.array":["<f4",' + json.dumps([0] * 33) + ',"C",""]}',
    '{"$numpy.array":[{"of":"O","shape":[]},[0],"C",""]}', '{"$numpy.array":[{"of":"<f4"},[0],"C",""]}',
    '{"$numpy.array":[{"fields":[["a",0,"O"]],"itemsize":8,"align":false},[0],"C",""]}',
    '{"$numpy.array":[{"fields":[["a",8,"<f4"]],"itemsize":8,"align":false},[0],"C",""]}',
    '{"$numpy.array":[{"fields":[["a",0,"<f4"],["a",0,"<f4"]],"itemsize":8,"align":false},[0],"C",""]}',
    '{"$numpy.array":[{"fields":[],"itemsize":0,"align":false},[4611686018427387904],"C",""]}',
    '{"$numpy.array":[' + '{"shape":[1],"of":' * 40 + '"<f4"' + "}" * 40 + ',[0],"C",""]}',
    '{"$numpy.random":["Generator","PCG64",{},null,null]}', '{"$numpy.random":["Generator","os",{},null,null]}',
    '{"$numpy.random":["bytes","PCG64",{},null,null]}', '{"$numpy.random":1}', '{"$torch.Generator":["cpu","AAAA"]}',
    '{"$torch.Generator":["cpu",1]}', '{"$torch.Generator":[1,""]}', '{"$torch.Generator":"cpu"}', '{"$nothing":1}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_malformed_form_is_damage_and_imports_nothing(text):
    for module in (np.random, random, pathlib):  # what the forms use is there
        assert module.__name__ in sys.modules
    before = set(sys.modules)
    with pytest.raises(DamagedError) as caught:
        decode_value(text.encode(), "shard", "model.x")
    assert caught.value.key == "model.x"
    assert set(sys.modules) == before


def state_of(generator: Any) -> Any:
    return json.loads(encode_value(generator, "key"))


def changed(state: Any, at: list[Any], value: Any) -> bytes:
    inside = state
    for step in at[:-1]:
        inside = inside[step]
    inside[at[-1]] = value
    return json.dumps(state).encode()


TAG = "$numpy.random"


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("MT19937", [TAG, 2, "state", "pos"], 625),
        ("MT19937", [TAG, 2, "state", "pos"], -1),
        ("MT19937", [TAG, 2, "state", "pos"], 2.0),
        ("MT19937", [TAG, 2, "state", "key"], [1] * 623),
        ("MT19937", [TAG, 2, "state", "key", 5], 1 << 32),
        ("MT19937", [TAG, 2, "state", "key", 5], -1),
        ("Philox", [TAG, 2, "buffer_pos"], 5),
        ("Philox", [TAG, 2, "buffer_pos"], -1),
        ("Philox", [TAG, 2, "buffer"], [0] * 5),
        ("Philox", [TAG, 2, "state", "counter"], "text"),
        ("SFC64", [TAG, 2, "has_uint32"], 2),
        ("SFC64", [TAG, 2, "more"], 1),
        ("PCG64", [TAG, 2, "state", "inc"], {"$int": "1" + "0" * 32}),
        ("PCG64", [TAG, 3], None),
        ("PCG64", [TAG, 3, 0], -1),
        ("PCG64", [TAG, 3, 0], None),
        ("PCG64", [TAG, 3, 0], [1] * 5000),
        ("PCG64", [TAG, 3, 1], [1 << 32]),
        ("PCG64", [TAG, 3, 2], 1 << 40),
        ("PCG64", [TAG, 3, 3], 1 << 32),
        ("PCG64", [TAG, 4], [0, 0.0]),
        ("PCG64", [TAG, 1], "MT19937"),
    ],
)
def test_a_state_that_c_code_would_trust_is_checked_number_by_number(name, at, value):
    data = changed(state_of(np.random.Generator(getattr(np.random, name)(7))), at, value)
    with pytest.raises(DamagedError):
        decode_value(data, "shard", "key")


def test_the_state_of_a_python_generator_is_checked_too():
    for at, value in ((["$Random", 1, 624], 700), (["$Random", 1, 3], -1), (["$Random", 2], "a"), (["$Random", 0], 2)):
        with pytest.raises(DamagedError):
            decode_value(changed(state_of(random.Random(1)), at, value), "shard", "key")
