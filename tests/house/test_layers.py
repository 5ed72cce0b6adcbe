"""Imports run downwards only: from floor to floor in the package, and from room to room in the coordinator."""

from __future__ import annotations

import ast

import pytest

from tests.house.source import PACKAGE, file_of, imports, imports_when_imported, modules, part, users

FLOORS = (
    ("errors",),
    ("world", "terminal"),
    ("storage", "format", "threads"),
    ("sharding", "state_file", "keep"),
    ("transfer",),
    ("directory",),
    ("state", "coordinator", "iterators"),
    ("rank", "reader", "testing"),
    ("telemetry",),
    ("manager",),
    ("checkpoint",),
    ("training", "export", "evaluation", "dcp"),
    ("foreign",),
    ("integrations", "cli"),
    ("ray",),
)
"""From the lowest up. What is on one floor may use its own room, and the floors below; nothing beside it."""

ROOMS = ("messages", "machine", "shell", "ray", "client")
"""Those of the coordinator, likewise."""

USERS_WORDS = {"__init__", "world", "state_file", "checkpoint", "manager", "ray", "reader", "iterators", "keep"}
"""The modules at the top of the package: what people import and what they meet in a traceback."""


def floor(name: str) -> int:
    """The height of a module of the package."""
    found = [number for number, parts in enumerate(FLOORS) if part(name) in parts]
    assert found, f"{name} is on no floor: say to which it belongs"
    return found[0]


def room(name: str) -> int:
    """The height of a module of the coordinator."""
    return ROOMS.index(name.split(".")[2])


def used_of_ours() -> list[tuple[str, str]]:
    """Every import of one part of the package by another, or by itself."""
    return [
        (name, used)
        for name, tree in modules().items()
        for used in imports(tree)
        if name != "distckpt" and used.startswith("distckpt.")
    ]


def test_imports_run_downwards_only() -> None:
    upwards = [
        f"{name} uses {used}"
        for name, used in used_of_ours()
        if part(used) != part(name) and floor(used) >= floor(name)
    ]
    assert upwards == []


def test_inside_the_coordinator_imports_run_downwards_too() -> None:
    upwards = [
        f"{name} uses {used}"
        for name, used in used_of_ours()
        if part(name) == part(used) == "coordinator" and room(used) > room(name)
    ]
    assert upwards == []


def test_the_top_of_the_package_has_only_users_words() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == USERS_WORDS


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | USERS_WORDS - {"__init__"} == {part for parts in FLOORS for part in parts}


def test_the_package_itself_only_names_what_is_public() -> None:
    tree = modules()["distckpt"]
    assert {used for used in imports_when_imported(tree) if not used.startswith(("typing", "__future__"))} == {
        "importlib"
    }


def test_no_module_needs_itself() -> None:
    """Imports form no circle, those inside functions and those for type checkers included."""
    needs = {
        name: {other for used in imports(tree) for other in (used, used.rpartition(".")[0]) if other in modules()}
        - {name, "distckpt"}
        for name, tree in modules().items()
        if name != "distckpt"
    }
    while free := [name for name, used in needs.items() if not used]:
        needs = {name: used - set(free) for name, used in needs.items() if name not in free}
    assert needs == {}


def test_wall_clock_time_is_read_at_the_rim_and_through_time_time_alone() -> None:
    """So a test can set it, and what decides (the machine, retention) is told."""
    rim = {"coordinator.shell.shell", "storage.memory", "storage.examine", "export.task"}
    rim |= {
        "directory.groups",
        "directory.reports",
        "evaluation.claims",
        "training.hooks",
        "rank.chronicle",
        "rank.reference",
        "telemetry.outlet",
    }
    rim |= {"storage.remote.s3_signing"}
    rim |= {
        f"cli.{command}"
        for command in ("adopting", "collecting", "copying", "importing", "pinning", "removing", "reporting")
    }
    harmless = {"time.monotonic", "time.perf_counter", "time.sleep"}
    harmless |= {"time.clock_gettime", "time.CLOCK_MONOTONIC"}  # of stillness.elapsed: no wall clock either
    calendar = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")
    readers, others = set(), set()
    for name, tree in modules().items():
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text == "time.time":
                readers.add(name.removeprefix("distckpt."))
            elif (text.startswith("time.") and text not in harmless) or text.endswith(calendar):
                others.add(f"{name} uses {text}")
        others |= {f"{name} imports {used}" for used in imports(tree) if used.startswith("time.")}
    assert others == set()
    assert readers == rim


def test_ray_is_used_only_where_actors_are() -> None:
    allowed = {"distckpt.export.places", "distckpt.export.packing", "distckpt.integrations.ray_train",
               "distckpt.integrations.ray_evaluation"}  # fmt: skip
    # world.py only looks whether this is a Ray Train worker, who has imported ray.train already.
    found = users("ray") - {"distckpt.world"}
    assert {name for name in found if not name.startswith("distckpt.coordinator.ray")} <= allowed
    assert "distckpt.coordinator.ray.actor" in found
    world = [used for used in imports(modules()["distckpt.world"]) if used.startswith("ray")]
    assert all(used.startswith("ray.train") for used in world)
    assert not any(used.startswith("ray") for used in imports_when_imported(modules()["distckpt.world"]))


@pytest.mark.parametrize("package", ["fsspec", "gcsfs", "s3fs", "aiohttp", "boto3", "google.cloud"])
def test_object_stores_are_known_only_to_storage(package: str) -> None:
    assert all(name.startswith("distckpt.storage.") for name in users(package))


OF_THE_FILE_SYSTEM = {"os.open", "os.remove", "os.unlink", "os.rename", "os.replace", "os.mkdir", "os.makedirs",
                      "os.rmdir", "os.listdir", "os.scandir", "os.stat", "os.link", "io.open"}  # fmt: skip
WITH_FILES = ("pathlib", "shutil", "tempfile")
WITH_RAYS_FILES = {f"distckpt.coordinator.ray.{name}" for name in ("cluster", "node", "keeper", "starter")}
"""Those look for a token of Ray's, and make a folder for what Ray writes."""


def test_only_storage_touches_the_file_system() -> None:
    """Everything else goes through a store."""
    found = set()
    for name, tree in modules().items():
        if part(name) in ("storage", "testing") or name in WITH_RAYS_FILES:
            continue
        found |= {f"{name} imports {used}" for used in imports(tree) if used.split(".")[0] in WITH_FILES}
        texts = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        found |= {f"{name} uses {text}" for text in texts & OF_THE_FILE_SYSTEM}
    assert found == set()


def test_modules_are_short() -> None:
    longest = {name: len(file_of(name).read_text().splitlines()) for name in modules()}
    assert {name: lines for name, lines in longest.items() if lines > 450} == {}
