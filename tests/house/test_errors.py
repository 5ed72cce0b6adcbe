"""Every error: an example of each, its journey between processes, and the tree that the package draws."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest

from distckpt import errors
from distckpt.coordinator.client import error_text

EXAMPLES: list[errors.DistckptError] = [
    errors.DistckptError("something"),
    errors.StorageError("gs://b/x", "failed"),
    errors.AlreadyExistsError("gs://b/x"),
    errors.AccessDeniedError("/x/_log", "could not be written: Permission denied to user 1000"),
    errors.BlockedError("/x/_log", "a pipe is there"),
    errors.ObjectNotFoundError("gs://b/x"),
    errors.StorageFullError("/x", "no space"),
    errors.StoreOutcomeUnknownError("/x", "no answer"),
    errors.StoreUnsuitableError("/x", "overwrites"),
    errors.DamagedError("/x/00000-0.arrow", "flipped", "model.weight"),
    errors.UnsupportedFormatError("/x/manifest.json", "format version 2"),
    errors.LogMissingError("/x", ["ckpt-1", "ckpt-2"]),
    errors.StateFileError("/x/checkpoint"),
    errors.CheckpointNotFoundError("/x/ckpt-1", "not there"),
    errors.DataElsewhereError("/x/ckpt-1: its shards are not in gs://b"),
    errors.ForeignError("/x.pt", {"args": "an object of argparse.Namespace"}),
    errors.LeaseLostError("/x", "e1-00000001aa", 120.0),
    errors.SaveError(3, "failed"),
    errors.EncodeError("state.bad", "needs pickle"),
    errors.PlanError(3, "w", [0, 2], "a hole"),
    errors.MissingRanksError(3, [1, 2], {1: "host-1"}, 30.0, "to join"),
    errors.RankFailedError(3, 1, "host-1", "no space"),
    errors.NotSharedError(3, "/x", [1], {1: "host-1"}),
    errors.NumberMismatchError(None, {0: 1, 1: 2}),
    errors.CommitUnknownError(3, "no answer"),
    errors.UnreadableError(3, "a log entry would be too long to be read"),
    errors.CoordinatorError("refused"),
    errors.FencedError("/x", 3, 4),
    errors.StaleRunError("/x", 1, 2),
    errors.DirectoryLostError("/x", 2, 0),
    errors.CoordinatorUnavailableError("no answer"),
    errors.CoordinatorFailedError("/x", "MemoryError: "),
    errors.AbsentRanksError([1, 2], 30.0),
    errors.PeerFailedError(1, "host-1", "ValueError", "bad record", "Traceback ..."),
    errors.RankSilentError(1, "host-1", 60.5),
    errors.OutOfRangeError("no more records"),
    errors.PeerFailedError(3, "node-7", "OSError", "the disk is gone", "Traceback ..."),
    errors.RankSilentError(3, "node-7", 61.0),
    errors.LaunchError("there are more"),
    errors.AgreementError("rank 1 has left"),
    errors.OutOfRangeError("no more batches"),
    errors.GroupError("something"),
    errors.GroupMismatchError("/x", "eval", {"mode": ("all", "latest")}),
    errors.GroupNotFoundError("/x", "eval"),
    errors.ClaimLostError("/x/ckpt-1", "eval", 2),
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
def test_errors_survive_a_journey_as_text(example: errors.DistckptError) -> None:
    other = error_text.from_text(error_text.to_text(example))
    assert type(other) is type(example)
    assert str(other) == str(example)
    assert vars(other) == vars(example)
    assert other.args == example.args


def test_a_text_makes_no_error_of_a_class_that_is_none_of_ours() -> None:
    assert type(error_text.from_text('["sys", ["text"], {"items": []}]')) is errors.CoordinatorError
    assert type(error_text.from_text('["annotations", ["text"], {"items": []}]')) is errors.CoordinatorError


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_errors_keep_what_they_were_made_of(example: errors.DistckptError) -> None:
    signature = inspect.signature(type(example).__init__)
    made_of = set(signature.parameters) - {"self", "message", "args", "kwargs"}
    assert made_of <= set(vars(example)), "a field that was given is not there"


def test_an_error_keeps_its_cause_through_ray() -> None:
    cloudpickle = importlib.import_module("ray.cloudpickle")
    for example in EXAMPLES:
        assert str(cloudpickle.loads(cloudpickle.dumps(example))) == str(example)
