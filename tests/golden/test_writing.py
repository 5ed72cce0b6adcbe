"""What this release writes is of the same form as what the first release of the format version wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distckpt.format import names
from tests.golden.write import EXPORTED, GOLDEN, ONE_RANK, THREE_RANKS, write_exported, write_one_rank
from tests.support.gang import Gang

OF_TORCH = "optimizer.param_groups"
"""Its value has members that come and go with torch's releases."""

NUMPY = ',{"array":"numpy"}'
"""Since then, arrays say that they are no tensors. Readers take a path without it for a tensor's."""

SINCE = ("origin", "commits", "order", "ended")
"""Since then, a log has a name, counts its commits, and says when training is over. Readers take one without for one that
has none, or did not."""


def test_one_rank_writes_what_it_wrote_then(tmp_path: Path) -> None:
    write_one_rank(tmp_path)
    assert_same_form(tmp_path, GOLDEN / ONE_RANK)


def test_three_ranks_write_what_they_wrote_then(tmp_path: Path, gang3: Gang) -> None:
    gang3.run("golden.write:write_three_ranks", directory=str(tmp_path / "run"))
    assert_same_form(tmp_path / "run", GOLDEN / THREE_RANKS)


def test_an_export_is_written_as_it_was_then(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    write_exported(tmp_path)
    assert_same_form(tmp_path, GOLDEN / EXPORTED)


def assert_same_form(found: Path, golden: Path) -> None:
    """Both have files of the same names, but for ids; JSON of the same members and types; Arrow of the same schemas,
    whose rows say the same of the same chunks."""
    ours, theirs = forms(found), forms(golden)
    assert sorted(ours) == sorted(theirs)
    for name, form in theirs.items():
        assert ours[name] == form, name


def forms(directory: Path) -> dict[str, Any]:
    """What each file is like, by its name without what is unique for ever. Of the log, what each kind of entry is."""
    found: dict[str, Any] = {}
    for path in sorted(file for file in directory.rglob("*") if file.is_file() and file.parent.name != names.STATS):
        name = re.sub(r"[0-9a-f]{32}", "<id>", str(path.relative_to(directory)))
        if name.startswith(f"{names.LOG}/"):
            entry = json.loads(path.read_bytes())
            assert re.fullmatch(rf"{names.LOG}/\d{{20}}\.json", name)
            found.setdefault(f"{names.LOG}: {entry['kind']}", form_of_json(entry))
        elif path.suffix == ".json":
            found[name] = form_of_json(json.loads(path.read_bytes()))
        elif path.suffix == ".arrow":
            found[name] = form_of_arrow(path)
        elif name == names.STATE_FILE:
            found[name] = sorted({line.partition(":")[0] for line in path.read_text().splitlines()})
        else:
            found[name] = path.stat().st_size
    return {re.sub(r"e\d+-[0-9a-f]*<id>", "<attempt>", name): form for name, form in found.items()}


def form_of_json(value: Any) -> Any:
    """Members in their order, and types; of a list, each form that is in it."""
    if isinstance(value, dict):
        return [(name, form_of_json(inside)) for name, inside in value.items() if name not in SINCE]
    if isinstance(value, list):
        return sorted({repr(form_of_json(inside)) for inside in value})
    return type(value).__name__


def form_of_arrow(path: Path) -> Any:
    """The schema with its metadata, and the rows; not where their bytes are."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        schema = [(field.name, str(field.type), field.nullable, field.metadata) for field in reader.schema]
        return schema, dict(reader.schema.metadata), sorted(rows(pa.Table.from_batches(batches)))


def rows(table: pa.Table) -> Iterator[str]:
    for row in table.to_pylist():
        kept = {name: value for name, value in row.items() if name not in ("position", "size", "block", "blocks")}
        kept["path"] = str(row.get("path", "")).replace(NUMPY, "")
        if row["key"] == OF_TORCH:
            kept = {"key": OF_TORCH, "dtype": row["dtype"]}
        yield repr(kept)
