"""What a power loss may leave, and what it may not: the model of a disk on which only what was synced is sure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from distckpt.testing.power_loss import AllKept, AllLost, Disk, Drawn, Event, Fate, Tree, read_tree, write_tree

ROOT, FOLDER, OTHER, FILE = 1, 2, 3, 9
STATES = 200


def disk_after(*events: Event) -> Disk:
    """A disk to which this has been done."""
    disk = Disk()
    for event in (Event("root", inode=ROOT), *events):
        disk.apply(event)
    return disk


def states(*events: Event) -> list[Tree]:
    """Every different state in which the folder may be after these events."""
    disk = disk_after(*events)
    found: list[Tree] = [disk.after_power_loss(AllLost())]
    fates: list[Fate] = [AllKept(), *(Drawn(random.Random(seed)) for seed in range(STATES))]
    for fate in fates:
        state = disk.after_power_loss(fate)
        if state not in found:
            found.append(state)
    return found


def created(name: str = "f", folder: int = ROOT, inode: int = FILE) -> Event:
    return Event("create", folder, name, inode)


def written(data: bytes, offset: int = 0, inode: int = FILE) -> Event:
    return Event("write", inode=inode, offset=offset, length=len(data), data=data)


def synced(inode: int) -> Event:
    return Event("sync", inode=inode)


def named(name: str, inode: int = FILE, folder: int = ROOT) -> Event:
    return Event("link", folder, name, inode)


def removed(name: str, folder: int = ROOT) -> Event:
    return Event("unlink", folder, name)


def same(one: Sequence[Tree], other: Sequence[Tree]) -> bool:
    """The same states, in whatever order."""
    return all(state in other for state in one) and all(state in one for state in other)


def test_a_synced_file_in_a_synced_folder_is_sure() -> None:
    assert states(created(), written(b"data"), synced(FILE), synced(ROOT)) == [{"f": b"data"}]


def test_a_name_in_a_folder_that_was_not_synced_may_be_missing() -> None:
    assert same(states(created(), written(b"data"), synced(FILE)), [{}, {"f": b"data"}])


def test_bytes_that_were_not_synced_may_be_there_or_missing_or_zeros() -> None:
    found = states(created(), written(b"data"), synced(ROOT))
    assert same(found, [{"f": b""}, {"f": b"data"}, {"f": bytes(4)}])


def test_a_write_may_be_torn_at_a_sector() -> None:
    found = states(created(), synced(ROOT), written(b"a" * 1024))
    whole, torn = b"a" * 1024, b"a" * 512
    assert same(found, [{"f": one} for one in (b"", torn, torn + bytes(512), bytes(1024), whole)])


def test_of_two_writes_the_second_may_have_come_alone() -> None:
    found = states(created(), synced(ROOT), written(b"one"), written(b"two", 3))
    assert {"f": bytes(3) + b"two"} in found
    assert {"f": b"one"} in found


def test_what_was_synced_stays_below_what_was_written_over_it() -> None:
    found = states(created(), written(b"old!"), synced(FILE), synced(ROOT), written(b"new"))
    assert same(found, [{"f": b"old!"}, {"f": b"new!"}])


def test_a_file_may_be_as_long_as_it_was_before_it_was_cut() -> None:
    found = states(created(), written(b"data"), synced(FILE), synced(ROOT), Event("truncate", inode=FILE, length=1))
    assert same(found, [{"f": b"data"}, {"f": b"d"}])


def test_a_file_that_was_removed_may_be_back() -> None:
    found = states(created(), synced(FILE), synced(ROOT), removed("f"))
    assert same(found, [{"f": b""}, {}])
    assert states(created(), synced(FILE), synced(ROOT), removed("f"), synced(ROOT)) == [{}]


def test_what_was_done_to_two_names_may_have_happened_by_halves() -> None:
    found = states(created(".new"), synced(FILE), synced(ROOT), named("f"), removed(".new"))
    assert same(found, [{".new": b""}, {".new": b"", "f": b""}, {"f": b""}, {}])


def test_what_was_done_to_one_name_has_happened_in_order() -> None:
    events = [created(), synced(FILE), synced(ROOT), removed("f"), created(inode=10), removed("f")]
    assert same(states(*events), [{"f": b""}, {}])


def test_a_rename_happens_whole() -> None:
    events = [
        Event("mkdir", ROOT, "d", FOLDER),
        Event("mkdir", ROOT, "e", OTHER),
        created(".new", FOLDER),
        written(b"data"),
        synced(FILE),
        synced(FOLDER),
        synced(ROOT),
        Event("rename", FOLDER, ".new", FILE, OTHER, "f"),
    ]
    assert same(states(*events), [{"d": {".new": b"data"}, "e": {}}, {"d": {}, "e": {"f": b"data"}}])
    assert states(*events, synced(FOLDER)) == [{"d": {}, "e": {"f": b"data"}}]


def test_a_folder_whose_name_is_lost_is_lost_with_all_that_is_in_it() -> None:
    events = [Event("mkdir", ROOT, "d", FOLDER), created(folder=FOLDER), synced(FILE), synced(FOLDER)]
    assert same(states(*events), [{}, {"d": {"f": b""}}])


def test_two_names_of_one_file_have_the_same_bytes() -> None:
    for state in states(created(), named("g"), synced(ROOT), written(b"a" * 4096)):
        assert state["f"] == state["g"]


def test_the_number_of_a_file_that_has_gone_may_be_another_ones() -> None:
    events = [created(), written(b"old"), synced(FILE), synced(ROOT), removed("f"), created("g"), written(b"new")]
    assert {"f": b"old", "g": b"new"} in states(*events)
    assert disk_after(*events).after_power_loss(AllKept()) == {"g": b"new"}


NAMES = st.sampled_from("abc")
DATA = st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=600))


@given(
    st.lists(st.tuples(NAMES, DATA | st.sampled_from(["sync", "remove", "create", "root"])), max_size=30), st.randoms()
)
def test_what_was_synced_is_there_whatever_is_drawn(steps: list[tuple[str, object]], dice: random.Random) -> None:
    """Against a model that is much simpler: what a file was like when all was synced last, if nothing came after."""
    disk = disk_after()
    now: dict[str, tuple[int, bytearray]] = {}
    sure: dict[str, bytes | None] = dict.fromkeys("abc")  # of those that nothing has been done to since
    fresh = 10
    for name, step in steps:
        match step:
            case "create" if name not in now:
                fresh += 1
                now[name] = fresh, bytearray()
                disk.apply(created(name, inode=fresh))
                sure.pop(name, None)
            case "remove" if name in now:
                del now[name]
                disk.apply(removed(name))
                sure.pop(name, None)
            case "sync" if name in now:
                disk.apply(synced(now[name][0]))
            case "root":
                for other, (inode, content) in now.items():
                    disk.apply(synced(inode))
                    sure[other] = bytes(content)
                disk.apply(synced(ROOT))
                sure.update({other: None for other in "abc" if other not in now})
            case (int(offset), bytes(data)) if name in now:
                inode, content = now[name]
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
                disk.apply(written(data, offset, inode))
                sure.pop(name, None)
    assert disk.after_power_loss(AllKept()) == {name: bytes(content) for name, (_, content) in now.items()}
    state = disk.after_power_loss(Drawn(dice))
    assert {name: state.get(name) for name in sure} == sure


def test_a_tree_is_written_and_read(tmp_path: Path) -> None:
    tree: Tree = {"a": b"1", "d": {"e": {}, "f": b"", ".g": b"2"}}
    write_tree(tree, tmp_path)
    assert read_tree(tmp_path) == tree
