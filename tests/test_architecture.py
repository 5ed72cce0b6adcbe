"""What the code may depend on, what it must never use, and what every public name must have."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distckpt"

LAYERS = (
    ("errors",),
    ("storage", "format"),
    ("sharding",),
    ("transfer",),
    ("state_file", "world"),
    ("agreeing", "coordinator"),
    (
        "checkpoint",
        "collecting",
        "ending",
        "leasing",
        "loading",
        "manager",
        "objects",
        "ordering",
        "reading",
        "restoring",
        "resuming",
        "saving",
        "watching",
    ),
    ("hooks", "exporting", "quantizing"),
    ("session",),
    ("cli", "integrations", "testing"),
)
"""From the lowest up. What is in one layer may use its own part of it, and the layers below."""

MANAGING = next(parts for parts in LAYERS if "manager" in parts)
"""These modules are one layer together, and may use each other."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """The full name of everything that is imported anywhere below."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_when_imported(tree: ast.AST) -> Iterator[str]:
    """As ``imports``, without those inside functions and those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        yield from imports_when_imported(node)


def part(name: str) -> str:
    """Of ``distckpt.transfer.log`` it is transfer."""
    return name.split(".")[1] if "." in name else ""


def layer(name: str) -> int:
    """The height of a module of the package."""
    found = [number for number, parts in enumerate(LAYERS) if part(name) in parts]
    assert found, f"{name} is in no layer: say in which it belongs"
    return found[0]


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_imports_run_downwards_only() -> None:
    upwards = []
    for name, tree in modules().items():
        if name == "distckpt":
            continue
        for used in imports(tree):
            if not used.startswith("distckpt.") or part(used) == part(name):
                continue
            beside = {part(name), part(used)} <= set(MANAGING)
            if layer(used) >= layer(name) and not beside:
                upwards.append(f"{name} uses {used}")
    assert upwards == []


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
    rim = {"coordinator.shell", "coordinator.housekeeping", "storage.local", "storage.memory"}
    rim |= {"exporting.task", "hooks", "leasing"}
    harmless = {"time.monotonic", "time.perf_counter", "time.sleep"}
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


def users(package: str) -> set[str]:
    """The modules that import anything of a third party's package."""
    return {
        name
        for name, tree in modules().items()
        if any(used == package or used.startswith(f"{package}.") for used in imports(tree))
    }


def test_ray_is_used_only_where_actors_are() -> None:
    allowed = {f"distckpt.coordinator.{name}" for name in ("actor", "watcher", "client")}
    allowed |= {"distckpt.exporting.places", "distckpt.exporting.packing", "distckpt.integrations.ray_train"}
    found = users("ray")
    # world.py only looks whether this is a Ray Train worker, who has imported ray.train already.
    assert found - {"distckpt.world"} <= allowed
    assert "distckpt.coordinator.actor" in found
    world = [used for used in imports(modules()["distckpt.world"]) if used.startswith("ray")]
    assert all(used.startswith("ray.train") for used in world)
    assert not any(used.startswith("ray") for used in imports_when_imported(modules()["distckpt.world"]))


@pytest.mark.parametrize("package", ["fsspec", "gcsfs", "s3fs", "aiohttp", "boto3", "google.cloud"])
def test_object_stores_are_known_only_to_storage(package: str) -> None:
    assert all(name.startswith("distckpt.storage.") for name in users(package))


OF_THE_FILE_SYSTEM = {"os.open", "os.remove", "os.unlink", "os.rename", "os.replace", "os.mkdir", "os.makedirs",
                      "os.rmdir", "os.listdir", "os.scandir", "os.stat", "os.link", "io.open"}  # fmt: skip
WITH_FILES = ("pathlib", "shutil", "tempfile")


def test_only_storage_touches_the_file_system() -> None:
    """Everything else goes through a store. The actor looks for a token of Ray's."""
    found = set()
    for name, tree in modules().items():
        if part(name) in ("storage", "testing") or name == "distckpt.coordinator.actor":
            continue
        found |= {f"{name} imports {used}" for used in imports(tree) if used.split(".")[0] in WITH_FILES}
        texts = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        found |= {f"{name} uses {text}" for text in texts & OF_THE_FILE_SYSTEM}
    assert found == set()


HEAVY = ["distckpt.manager", "distckpt.coordinator.actor"]
IMPORTING = """
import importlib, sys

def tell(name):
    print(name, *[heavy for heavy in ("torch", "ray", "fsspec", "gcsfs", "google.cloud", "pandas") if heavy in sys.modules])

for name in sys.argv[1].split(","):
    importlib.import_module(name)
    tell(name)
from tests.small_runs import assert_loads, run
run(sys.argv[2], 1)
assert_loads(sys.argv[2] + "/ckpt-1", 1)
tell("saved")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Which heavy packages are loaded after each module has been imported, in the order of the keys; last: "saved"."""
    light = ["distckpt", "distckpt.errors", "distckpt.watching", "distckpt.state_file", "distckpt.loading"]
    light += ["distckpt.leasing", "distckpt.exporting.listing"]
    below = [name for name in modules() if part(name) in ("storage", "format", "coordinator", "cli")]
    below = [name for name in below if not name.endswith("__main__") and name != "distckpt.coordinator.actor"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, ",".join([*light, *below, *HEAVY]), str(tmp_path_factory.mktemp("saved"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(heavy) for name, *heavy in lines}


@pytest.mark.timeout(150)
def test_what_needs_no_torch_does_not_import_it(loaded: dict[str, set[str]]) -> None:
    with_torch = {name for name, heavy in loaded.items() if "torch" in heavy}
    assert with_torch == {*HEAVY, "saved"}, "the last of all"
    assert loaded["distckpt"] == set()


def test_a_manager_of_one_process_needs_no_ray(loaded: dict[str, set[str]]) -> None:
    assert loaded["distckpt.manager"] == {"torch"}
    assert {name for name, heavy in loaded.items() if "ray" in heavy} == {"distckpt.coordinator.actor", "saved"}


def test_saving_and_reading_do_without_pandas(loaded: dict[str, set[str]]) -> None:
    """pyarrow would import it at the first number, for half a second."""
    assert not [name for name, heavy in loaded.items() if "pandas" in heavy]


# ---- what is never used -----------------------------------------------------------------------------------------------


FORBIDDEN_PACKAGES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "np.load",
    "np.save",
    "numpy.load",
}


PICKLED = {"distckpt.exporting.packing imports ray.cloudpickle"}
"""What goes from the training to the process that makes its exports, over a pipe."""


def test_nothing_is_ever_unpickled_or_evaluated() -> None:
    found = []
    for name, tree in modules().items():
        found += [f"{name} imports {used}" for used in imports(tree) if FORBIDDEN_PACKAGES & set(used.split("."))]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append(f"{name}:{node.lineno} speaks of allow_pickle")
    assert set(found) == PICKLED


def test_no_exception_is_swallowed_without_a_reason() -> None:
    """``except Exception`` either raises again or says in a comment why not."""
    found = []
    for name, tree in modules().items():
        lines = Path(_file(name)).read_text().splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else ""
            if caught not in ("", "Exception", "BaseException"):
                continue
            again = any(isinstance(inside, ast.Raise) for inside in ast.walk(node))
            said = "#" in lines[node.lineno - 1] or lines[node.lineno].lstrip().startswith("#")
            if not again and not said:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def _file(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_nothing_is_left_to_do() -> None:
    found = []
    for name, tree in modules().items():
        for number, line in enumerate(_file(name).read_text().splitlines(), 1):
            found += [f"{name}:{number}: {line.strip()}"] * bool(re.search(r"TODO|FIXME|NotImplementedError", line))
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        found += [f"{name}:{call.lineno} prints" for call in calls if ast.unparse(call.func) == "print"]
    assert found == []


def test_modules_are_short() -> None:
    longest = {name: len(_file(name).read_text().splitlines()) for name in modules()}
    assert {name: lines for name, lines in longest.items() if lines > 450} == {}


# ---- public names -------------------------------------------------------------------------------------------------------


PROMISED = {
    "Checkpoint", "PerRank", "CheckpointManager", "PendingSave", "LoadStatus", "load", "open", "CheckpointReader",
    "latest_checkpoint", "get_checkpoint_state", "update_checkpoint_state", "generate_checkpoint_state_proto",
    "checkpoints_iterator", "wait_for_new_checkpoint", "Coordinator", "LooperThread", "errors",
}  # fmt: skip


def test_public_names_are_complete() -> None:
    assert set(distckpt.__all__) >= PROMISED
    assert sorted(distckpt.__all__) == distckpt.__all__
    assert dir(distckpt) == distckpt.__all__
    for_type_checkers = {
        alias.asname
        for node in ast.walk(modules()["distckpt"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_type_checkers - {None} == set(distckpt.__all__) - {"errors"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = distckpt.nonsense


def documented(name: str, thing: Any) -> Iterator[str]:
    """What of ``thing`` has no docstring."""
    if not inspect.getdoc(thing):
        yield name
    if not inspect.isclass(thing):
        return
    for attribute, value in vars(thing).items():
        if attribute.startswith(("_", "test_")) or not (callable(value) or isinstance(value, property)):
            continue
        if not inspect.getdoc(getattr(thing, attribute)):
            yield f"{name}.{attribute}"


def test_every_public_name_has_a_docstring() -> None:
    without = []
    for name in distckpt.__all__:
        without += documented(name, getattr(distckpt, name))
    assert without == []


def test_every_public_thing_inside_has_a_docstring() -> None:
    without = []
    for name in modules():
        if name.endswith("__main__"):
            continue
        if ast.get_docstring(modules()[name]) is None and _file(name).read_text().strip():
            without.append(name)
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            ours = getattr(value, "__module__", None) == name
            if ours and not attribute.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                without += documented(f"{name}.{attribute}", value)
    assert without == []


# ---- errors ---------------------------------------------------------------------------------------------------------------


EXAMPLES: list[errors.DistckptError] = [
    errors.DistckptError("something"),
    errors.StorageError("gs://b/x", "failed"),
    errors.AlreadyExistsError("gs://b/x"),
    errors.ObjectNotFoundError("gs://b/x"),
    errors.StorageFullError("/x", "no space"),
    errors.StoreOutcomeUnknownError("/x", "no answer"),
    errors.StoreUnsuitableError("/x", "overwrites"),
    errors.DamagedError("/x/00000-0.arrow", "flipped", "model.weight"),
    errors.UnsupportedFormatError("/x/manifest.json", "format version 2"),
    errors.CheckpointNotFoundError("/x/ckpt-1", "not there"),
    errors.SaveError(3, "failed"),
    errors.EncodeError("state.bad", "needs pickle"),
    errors.PlanError(3, "w", [0, 2], "a hole"),
    errors.MissingRanksError(3, [1, 2], {1: "host-1"}, 30.0, "to join"),
    errors.RankFailedError(3, 1, "host-1", "no space"),
    errors.NotSharedError(3, "/x", [1], {1: "host-1"}),
    errors.NumberMismatchError(None, {0: 1, 1: 2}),
    errors.CommitUnknownError(3, "no answer"),
    errors.CoordinatorError("refused"),
    errors.FencedError("/x", 3, 4),
    errors.StaleRunError("/x", 1, 2),
    errors.CoordinatorUnavailableError("no answer"),
    errors.PeerFailedError(1, "host-1", "ValueError", "bad record", "Traceback ..."),
    errors.RankSilentError(1, "host-1", 60.5),
    errors.OutOfRangeError("no more records"),
    errors.PeerFailedError(3, "node-7", "OSError", "the disk is gone", "Traceback ..."),
    errors.RankSilentError(3, "node-7", 61.0),
    errors.AgreementError("rank 1 has left"),
    errors.OutOfRangeError("no more batches"),
    errors.ExportError(3, "encoder", "cannot be traced"),
    errors.RestoreError("failed"),
    errors.MismatchError("/x/ckpt-1", ["a"], ["b"], {"c": "saved [3], here [4]"}),
    errors.ResizeError("loader", 4, 3),
    errors.NoGoodCheckpointError("/x", [("/x/ckpt-1", "damaged")]),
]


def kinds() -> set[type[errors.DistckptError]]:
    """Every error there is."""
    return {
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.DistckptError)
    }


def test_there_is_an_example_of_every_error() -> None:
    assert {type(example) for example in EXAMPLES} == kinds()
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds() - {errors.DistckptError})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_a_journey_between_processes(example: errors.DistckptError, protocol: int) -> None:
    for other in (pickle.loads(pickle.dumps(example, protocol)), copy.copy(example), copy.deepcopy(example)):
        assert type(other) is type(example)
        assert str(other) == str(example)
        assert vars(other) == vars(example)
        assert other.args == example.args
    assert len(str(example)) > 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_errors_keep_what_they_were_made_of(example: errors.DistckptError) -> None:
    signature = inspect.signature(type(example).__init__)
    made_of = set(signature.parameters) - {"self", "message", "args", "kwargs"}
    assert made_of <= set(vars(example)), "a field that was given is not there"


def test_an_error_keeps_its_cause_through_ray() -> None:
    cloudpickle = importlib.import_module("ray.cloudpickle")
    for example in EXAMPLES:
        assert str(cloudpickle.loads(cloudpickle.dumps(example))) == str(example)


# ---- what is beside the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "cluster-configs").glob("*.yaml")), ids=lambda path: path.name)
def test_cluster_files_follow_rays_own_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "no_such_field": 1}, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    workers = [one.get("max_workers", 0) for name, one in types.items() if name != config["head_node_type"]]
    assert sum(workers) <= config["max_workers"]


@pytest.mark.parametrize("path", sorted((ROOT / "cluster-configs").glob("*.yaml")), ids=lambda path: path.name)
def test_what_cluster_files_run_exists(path: Path) -> None:
    for name in re.findall(r"distckpt/((?:examples|benchmarks)/[\w/]+\.py)", path.read_text()):
        assert (ROOT / name).is_file(), f"{path.name} runs {name}"


def test_a_cluster_file_for_google_cloud_is_there() -> None:
    import yaml

    providers = [
        yaml.safe_load(path.read_text())["provider"]["type"] for path in (ROOT / "cluster-configs").glob("*.yaml")
    ]
    assert "gcp" in providers
