"""What the trainers that people use make of the hook: their own loops, real small models, nothing simulated."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.ranks import integrations as scenarios
from tests.support.gang import ROOT, Gang
from tests.support.small_runs import until
from tests.support.snippets import play

FINAL = ("model", "optimizer", "lr_scheduler", "random")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are far too small to be worth more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def uncaught() -> Iterator[list[int]]:
    """SIGTERMs that came to this process while nothing else caught them."""
    found: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    yield found
    ours = signal.signal(signal.SIGTERM, before)
    assert found == []
    ours(0, None)
    assert found == [0], "a handler was left behind"


def digests(path: str | Path, *parts: str) -> dict[str, str]:
    """SHA-256 of each tensor, and the text of each value, below these names."""
    found = {}
    with distckpt.open(path) as reader:
        for key in reader.keys():  # noqa: SIM118 - a reader is no dict
            if key.partition(".")[0].partition("@")[0] in parts:
                is_value = reader.info(key).dtype == "json"
                data = repr(reader.value(key)).encode() if is_value else reader.tensor(key).numpy().tobytes()
                found[key] = hashlib.sha256(data).hexdigest()
    assert found
    return found


def numbers(directory: Path) -> list[int]:
    """The checkpoints that are there."""
    return sorted(int(path.name.rpartition("-")[2]) for path in directory.glob("ckpt-*"))


def seen_over(results: list[dict[str, Any]]) -> list[list[int]]:
    """What all ranks saw, step by step."""
    return [
        [item for batch in batches for item in batch]
        for batches in zip(*[result["seen"] for result in results], strict=True)
    ]


# ---- Transformers ---------------------------------------------------------------------------------------------------


class Hugging:
    """Runs of Transformers' Trainer in one directory after the other; ``whole`` is one that nothing interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = self.run("whole")

    def run(self, name: str, **arguments: Any) -> dict[str, Any]:
        return scenarios.transformers(str(self.folder / name), str(self.folder / "unused"), **arguments)


@pytest.fixture(scope="module")
def hugging(tmp_path_factory: pytest.TempPathFactory) -> Hugging:
    return Hugging(tmp_path_factory.mktemp("transformers"))


def test_transformers_trains_and_saves(hugging: Hugging) -> None:
    assert hugging.whole["error"] == ""
    assert hugging.whole["step"] == 12
    assert numbers(hugging.folder / "whole") == [3, 6, 9, 12]
    assert list((hugging.folder / "unused").iterdir()) == [], "Trainer saved something itself"
    state = json.loads(distckpt.load(hugging.folder / "whole/ckpt-3", "trainer@0.state"))
    assert [entry["step"] for entry in state["log_history"]] == [0, 1, 2, 3], "saved before it was logged"
    assert state["log_history"][0] == {"step": 0, "odd": 1.5, "odder": None}


@pytest.mark.parametrize("stops", [[4], [5, 7]], ids=["within an epoch", "between epochs and again"])
def test_transformers_goes_on_where_it_was_stopped(hugging: Hugging, stops: list[int]) -> None:
    name = "-".join(map(str, stops))
    seen, losses = [], {}
    for stop in [*stops, None]:
        result = hugging.run(name, stop_at=stop)
        assert result["error"] == ""
        assert result["step"] == (12 if stop is None else stop + 1)
        seen += result["seen"]
        losses = result["losses"]
    assert seen == hugging.whole["seen"]
    assert losses == hugging.whole["losses"]
    assert digests(hugging.folder / name / "ckpt-12", *FINAL) == digests(hugging.folder / "whole/ckpt-12", *FINAL)


def test_transformers_fails_and_resumes_with_what_its_callbacks_knew(hugging: Hugging) -> None:
    """A greater loss counts as better here, so early stopping counts evaluations: at 3, 6 and 9, over the failure."""
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss", "patience": 2,
                 "greater_is_better": True, "restore_callback_states_from_checkpoint": True,
                 "gradient_accumulation_steps": 2, "batch": 2}  # fmt: skip
    whole = hugging.run("patient", **arguments)
    assert whole["step"] == 9
    assert whole["best"] == pytest.approx(2.97, abs=0.1)
    failed = hugging.run("failing", fail_at=7, **arguments)
    assert failed["error"] == "Stopped: step 7"
    assert numbers(hugging.folder / "failing") == [3, 6]
    resumed = hugging.run("failing", **arguments)
    assert {name: resumed[name] for name in ("step", "epoch", "best")} == {
        name: whole[name] for name in ("step", "epoch", "best")
    }
    assert resumed["losses"] == whole["losses"]
    assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :]
    assert digests(hugging.folder / "failing/ckpt-9", *FINAL) == digests(hugging.folder / "patient/ckpt-9", *FINAL)


def test_transformers_resumes_a_run_whose_trainer_saves_too(hugging: Hugging) -> None:
    arguments = {"save_strategy": "epoch"}
    assert hugging.run("both", stop_at=4, **arguments)["error"] == ""
    resumed = hugging.run("both", patience=2, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss",
                          **arguments)  # fmt: skip
    assert (resumed["error"], resumed["step"]) == ("", 12)
    assert resumed["losses"] == hugging.whole["losses"]
    kept = json.loads((hugging.folder / "unused/checkpoint-12/trainer_state.json").read_text())
    assert kept["stateful_callbacks"].keys() == {"EarlyStoppingCallback", "TrainerControl"}


def test_transformers_begins_at_the_newest_good_checkpoint(hugging: Hugging) -> None:
    hugging.run("damaged", stop_at=7)
    folder = hugging.folder / "damaged/ckpt-8"
    with distckpt.open(folder) as reader:
        shard = next(Path(path) for path in folder.glob("*/*.arrow") if path.name != "index.arrow")
        place = int(reader._index.position[int(reader._index.rows("model.transformer.ln_f.weight")[0])])
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    result = hugging.run("damaged")
    assert (result["step"], len(result["seen"])) == (12, 6)
    assert digests(hugging.folder / "damaged/ckpt-12", *FINAL) == digests(hugging.folder / "whole/ckpt-12", *FINAL)


def test_transformers_own_train_cannot_resume_and_says_so(hugging: Hugging) -> None:
    assert hugging.run("plain", plainly=True, stop_at=2)["step"] == 3
    result = hugging.run("plain", plainly=True)
    assert result["seen"] == []
    assert result["error"].startswith("_ElsewhereError")
    for part in ("plain/ckpt-3 was saved at step 3", "begins at step 0", "callback.train(trainer)"):
        assert part in result["error"]


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # of Trainer 5.0, on one that saves twice in a second
@pytest.mark.parametrize("greater", [True, False], ids=["the first is best", "the last is best"])
def test_transformers_saves_and_keeps_what_trainer_would_and_ends_with_the_best_model(
    hugging: Hugging, greater: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a Trainer that saves by itself. Ours is made to fail, and goes on."""
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "patience": 9,
                 "metric_for_best_model": "loss", "greater_is_better": greater, "load_best_model_at_end": True,
                 "save_total_limit": 3}  # fmt: skip
    name = f"as-trainer-{greater}"
    scratch = str(hugging.folder / f"trainer-{greater}")
    itself = scenarios.transformers("unused", scratch, by="itself", **arguments)
    failed = hugging.run(name, by="trainer", fail_at=7, **arguments)
    assert (failed["error"], failed["saves"]) == ("Stopped: step 7", [2, 4, 6])
    resumed = hugging.run(name, by="trainer", **arguments)
    for what in ("step", "best", "best_step", "losses", "weights"):
        assert resumed[what] == itself[what], what
    assert failed["saves"] + resumed["saves"] == itself["saves"] == [2, 4, 6, 8, 10, 12]
    assert Path(resumed["best_path"]).name == Path(itself["best_path"]).name.replace("checkpoint", "ckpt")
    kept = sorted(int(path.name.rpartition("-")[2]) for path in Path(scratch).iterdir())
    assert kept == ([2, 10, 12] if greater else [8, 10, 12])
    ours = [2, 10, 12] if greater else [10, 12]  # the best and the two latest
    assert until(lambda: numbers(hugging.folder / name) == ours)
    assert list((hugging.folder / "unused").glob("checkpoint-2")) == [], "Trainer saved something itself"
    assert "without load_best_model_at_end" not in caplog.text
    last = digests(hugging.folder / name / "ckpt-12", "model")
    assert greater == (last != digests(resumed["best_path"], "model")), "the best model was saved as the last one"


def test_transformers_stops_by_a_signal_also_where_trainer_says_when_to_save(hugging: Hugging) -> None:
    arguments = {"save_strategy": "epoch"}
    stopped = hugging.run("by-epoch", by="trainer", stop_at=8, **arguments)
    assert (stopped["error"], stopped["step"], stopped["saves"]) == ("", 9, [6, 9])
    resumed = hugging.run("by-epoch", by="trainer", **arguments)
    assert (resumed["step"], resumed["saves"]) == (12, [12])
    assert resumed["losses"] == hugging.whole["losses"]
    assert numbers(hugging.folder / "by-epoch") == [6, 9, 12]
    assert hugging.whole["saves"] == [3, 6, 9, 12], "on_save is called where the callback says when, too"


@pytest.mark.timeout(120)
def test_transformers_loads_the_export_that_was_made_beside_its_training(hugging: Hugging) -> None:
    from transformers import AutoModelForCausalLM

    result = hugging.run("exported/run-7", by="trainer", save_strategy="steps", save_steps=12, export=True)
    pushed: list[str] = []
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "distckpt": distckpt, "pushed": pushed}
    told = {"model.push_to_hub": "pushed.append"}
    again = play("docs/coming-from-transformers.md", 2, names, hugging.folder / "exported", told)["model"]
    assert result["weights"] == scenarios.digest(again)
    assert pushed == ["me/run-7"]


def test_transformers_with_nothing_that_says_when_to_save_is_refused(hugging: Hugging) -> None:
    with pytest.raises(ValueError, match="nothing says when to save"):
        hugging.run("never", by="trainer", save_strategy="no")
    with pytest.raises(ValueError, match=r"callback\.train\(trainer\)"):
        hugging.run("plainly", by="trainer", save_strategy="epoch", plainly=True)


@pytest.mark.wide(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shard", [True, False], ids=["fsdp2", "ddp"])
def test_transformers_over_ranks_stops_together_and_resumes(hugging: Hugging, gang2: Gang, shard: bool) -> None:
    def train(name: str, **arguments: Any) -> list[dict[str, Any]]:
        directory, scratch = str(hugging.folder / name), str(hugging.folder / "unused")
        return gang2.run("ranks.integrations:on_rank", kind="transformers", directory=directory, scratch=scratch,
                         batch=2, dropout=0.0, items=24, shard=shard, **arguments)  # fmt: skip

    name, alone = f"ranks {shard}", hugging.run(f"dry {shard}", dropout=0.0, items=24)
    whole, stopped = train(f"whole {shard}"), train(name, stop_at=6, rank=1)
    assert [(result["step"], result["error"]) for result in stopped] == [(7, "")] * 2
    assert [result["sharded"] for result in stopped] == [shard] * 2
    assert numbers(hugging.folder / name) == [3, 6, 7]
    assert distckpt.open(hugging.folder / name / "ckpt-7").manifest.world_size == 2
    shutil.copytree(hugging.folder / name, hugging.folder / f"{name} on one")
    resumed = train(name)
    assert seen_over(stopped) + seen_over(resumed) == seen_over(whole) == alone["seen"]
    assert [result["losses"] for result in resumed] == [result["losses"] for result in whole]
    assert [result["weights"] for result in resumed] == [result["weights"] for result in whole]
    on_one = hugging.run(f"{name} on one", dropout=0.0, items=24)
    assert on_one["error"] == ""
    assert seen_over(stopped) + on_one["seen"] == alone["seen"]
    assert on_one["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    last, expected = (
        distckpt.load(f"{hugging.folder}/{of}/ckpt-12", "model") for of in (f"{name} on one", f"dry {shard}")
    )
    assert last.keys() == expected.keys()
    for key, tensor in last.items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-3, rtol=0)  # one step moves by 1e-2


@pytest.mark.timeout(120)
def test_what_accelerate_has_sharded_goes_on_where_it_was(tmp_path: Path, gang2: Gang) -> None:
    def train(name: str, steps: int) -> list[dict[str, Any]]:
        return gang2.run("ranks.integrations:on_rank", kind="accelerate", directory=str(tmp_path / name), steps=steps)

    whole, first, then = train("whole", 8), train("parts", 4), train("parts", 8)
    assert all(result["sharded"] for result in whole)
    assert [one["losses"] + two["losses"] for one, two in zip(first, then, strict=True)] == [
        result["losses"] for result in whole
    ]
    assert [result["weights"] for result in then] == [result["weights"] for result in whole]


# ---- Lightning ------------------------------------------------------------------------------------------------------

OF_LIGHTNING = [
    "ignore:.*LeafSpec:FutureWarning",  # Lightning uses a class of torch's that is deprecated
    "ignore:.*does not have many workers",  # Lightning's advice about loaders
]
lightning = pytest.mark.filterwarnings(*OF_LIGHTNING)


@pytest.mark.wide(4)
@lightning
@pytest.mark.parametrize("stops", [[2], [5, 7], [8, 11, 12]], ids=lambda stops: "-".join(map(str, stops)))
@pytest.mark.parametrize(
    "arguments",
    [{"max_epochs": 3, "min_epochs": 2}, {"max_steps": 14, "max_epochs": 3, "validate": True},
     {"max_epochs": 5, "accumulate_grad_batches": 2, "resumable": True}],
    ids=["epochs", "steps and validation", "accumulated, from a loader that resumes"],
)  # fmt: skip
def test_lightning_goes_on_where_it_was_stopped(tmp_path: Path, arguments: dict[str, Any], stops: list[int]) -> None:
    whole = scenarios.lightning(str(tmp_path / "whole"), **arguments)
    filters = list(warnings.filters)
    seen: list[list[int]] = []
    result = {}
    for restores, stop in enumerate([*stops, None]):
        result = scenarios.lightning(str(tmp_path / "parts"), stop_at=stop, **arguments)
        assert result["step"] == (whole["step"] if stop is None else stop + 1)
        assert result["restores"] == restores, "the datamodule was not restored"
        seen += result.pop("seen")
    assert seen == whole.pop("seen")
    assert {**result, "restores": 0, "looked_at": whole["looked_at"]} == whole
    assert list(warnings.filters) == filters
    last = f"ckpt-{whole['step']}"
    assert digests(tmp_path / "parts" / last, *FINAL) == digests(tmp_path / "whole" / last, *FINAL)


@lightning
def test_lightning_fails_and_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = scenarios.lightning(str(tmp_path / "whole"), max_epochs=2)
    told = [record.getMessage() for record in caplog.records if record.name == "distckpt.integrations.carrying"]
    assert len(told) == 1, "told once, though there were four saves"
    assert "Odd is not saved" in told[0]
    failed = scenarios.lightning(str(tmp_path / "parts"), max_epochs=2, fail_at=8)
    assert failed["error"] == "step 8"
    assert numbers(tmp_path / "parts") == [3, 6]
    resumed = scenarios.lightning(str(tmp_path / "parts"), max_epochs=2)
    assert resumed["seen"] == whole["seen"][6:]
    assert resumed["counted"] == whole["counted"] == 12
    assert digests(tmp_path / "parts/ckpt-12", *FINAL) == digests(tmp_path / "whole/ckpt-12", *FINAL)
    again = scenarios.lightning(str(tmp_path / "parts"), max_epochs=2)
    assert (again["step"], again["seen"]) == (12, [])


@lightning
def test_lightning_trains_on_within_an_epoch_that_the_number_of_steps_ended(tmp_path: Path) -> None:
    whole = scenarios.lightning(str(tmp_path / "whole"), max_steps=10)
    first = scenarios.lightning(str(tmp_path / "parts"), max_steps=4)
    then = scenarios.lightning(str(tmp_path / "parts"), max_steps=10)
    assert first["seen"] + then["seen"] == whole["seen"]
    assert digests(tmp_path / "parts/ckpt-10", *FINAL) == digests(tmp_path / "whole/ckpt-10", *FINAL)


@pytest.mark.wide(2)
@lightning
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "ddp"])
def test_lightning_over_ranks_stops_together_and_resumes(tmp_path: Path, gang2: Gang, shard: bool) -> None:
    def train(name: str, **arguments: Any) -> list[dict[str, Any]]:
        directory = str(tmp_path / name)
        return gang2.run("ranks.integrations:on_rank", kind="lightning", directory=directory, ranks=2,
                         batch=2, max_epochs=2, shard=shard, **arguments)  # fmt: skip

    whole, stopped = train("whole"), train("parts", stop_at=7, rank=1)
    assert [result["step"] for result in stopped] == [8, 8]
    assert numbers(tmp_path / "parts") == [3, 6, 8]
    resumed = train("parts")
    assert seen_over(stopped) + seen_over(resumed) == seen_over(whole)
    # Python's own random numbers aside: Ray draws some when the first of the runs connects to it.
    assert digests(tmp_path / "parts/ckpt-12", *FINAL[:3]) == digests(tmp_path / "whole/ckpt-12", *FINAL[:3])
    alone = scenarios.lightning(str(tmp_path / "parts"), batch=4, max_epochs=3)
    assert (alone["step"], alone["epoch"], len(alone["seen"])) == (18, 3, 6)


@lightning
@pytest.mark.parametrize("mode", ["min", "max"])
def test_lightning_keeps_and_finds_the_best_as_its_own_callback_does(tmp_path: Path, mode: str) -> None:
    """Beside ModelCheckpoint, which keeps the two best; ours keeps the newest too, and is made to fail in between."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    arguments = {"max_epochs": 4, "validate": True}
    own = ModelCheckpoint(tmp_path / "own", "{step}", monitor="validated", mode=mode, save_top_k=2)
    theirs = scenarios.lightning("unused", callback=own, look=("test", "best"), **arguments)
    options = {"monitor": "validated", "mode": mode, "save_top_k": 2}
    failed = scenarios.lightning(str(tmp_path / "ours"), options=options, fail_at=15, **arguments)
    assert failed["error"] == "step 15"
    ours = scenarios.lightning(str(tmp_path / "ours"), options=options, look=("test", "best"), **arguments)
    steps = sorted(int(path.stem.partition("=")[2]) for path in (tmp_path / "own").iterdir())
    assert until(lambda: numbers(tmp_path / "ours") == sorted({*steps, 24}))
    assert Path(ours["best"]).name == f"ckpt-{Path(theirs['best']).stem.partition('=')[2]}"
    assert ours["score"] == pytest.approx(theirs["score"], rel=1e-6)
    assert ours["looked_at"] == theirs["looked_at"]


@lightning
def test_lightning_takes_paths_of_ours_and_its_own(tmp_path: Path) -> None:
    whole = scenarios.lightning(str(tmp_path / "whole"), max_epochs=2, validate=True)
    path = str(tmp_path / "whole/ckpt-6")
    there = {verb: scenarios.lightning(str(tmp_path / verb), max_epochs=0, validate=True, look=(verb, path))["looked_at"]
             for verb in ("validate", "test", "predict")}  # fmt: skip
    assert len(set(there.values())) == 1
    assert there["test"] != whole["looked_at"]
    again = scenarios.lightning(str(tmp_path / "again"), max_epochs=2, validate=True, begin=path)
    assert again["seen"] == whole["seen"][6:]
    assert digests(tmp_path / "again/ckpt-12", *FINAL) == digests(tmp_path / "whole/ckpt-12", *FINAL)
    back = scenarios.lightning(str(tmp_path / "whole"), max_epochs=2, validate=True, begin=path)
    assert back["seen"] == whole["seen"][6:], "of its own directory, where there are newer ones"


def small_lightning(*callbacks: Any) -> tuple[Any, Any, Any]:
    """A trainer of one epoch, a module that adds to checkpoints of Lightning's, and its data."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Adding(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, at: int) -> torch.Tensor:
            return self.layer(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = 1

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=1, callbacks=[*callbacks], **quiet), Adding(), DataLoader(TensorDataset(torch.ones(4, 4)))


@lightning
def test_lightnings_hooks_that_are_not_called_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lightning.pytorch.callbacks import Callback, EarlyStopping

    from distckpt.integrations.lightning import DistckptCallback

    class Averaging(Callback):
        """Puts into the file what it keeps, as EMAWeightAveraging of Lightning 2.6 does."""

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["average"] = 1

    stopping = EarlyStopping("loss", strict=False, check_on_train_epoch_end=False)
    trainer, module, loader = small_lightning(DistckptCallback(tmp_path), Averaging(), stopping)
    with caplog.at_level("WARNING", logger="distckpt"):
        trainer.fit(module, loader)
    told = [record.getMessage() for record in caplog.records if "on_save_checkpoint" in record.getMessage()]
    assert [text.split()[1] for text in told] == ["Adding.on_save_checkpoint", "Averaging.on_save_checkpoint"]


@lightning
def test_two_callbacks_of_ours_in_one_lightning_trainer_are_refused(tmp_path: Path) -> None:
    from distckpt.integrations.lightning import DistckptCallback

    both = [DistckptCallback(tmp_path / "best", monitor="loss"), DistckptCallback(tmp_path / "often", save_steps=1)]
    trainer, module, loader = small_lightning(*both)
    with pytest.raises(ValueError, match=r"two DistckptCallbacks in one Trainer.*EveryNumbers"):
        trainer.fit(module, loader)
    assert not list(tmp_path.iterdir())


@lightning
def test_lightning_saves_with_each_step_what_was_logged_for_it(tmp_path: Path) -> None:
    options = {"every_n_train_steps": 2, "max_to_keep": None}
    scenarios.lightning(str(tmp_path), max_epochs=1, validate=True, options=options)
    with distckpt.open(tmp_path / "ckpt-4") as before, distckpt.open(tmp_path / "ckpt-6") as after:
        assert (list(before.metrics), list(after.metrics)) == ([], ["validated"])
    options = {"train_time_interval": timedelta(seconds=0.001), "monitor": "validated", "save_top_k": -1}
    scenarios.lightning(str(tmp_path / "often"), max_epochs=1, options=options)
    assert numbers(tmp_path / "often")[-1] == 6


@lightning
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"save_steps": 3, "every_n_train_steps": 3}, "by another name"),
        ({"save_steps": 3, "every_n_epochs": 1}, "instead of steps"),
        ({"every_n_epochs": 0}, "at least 1"),
        ({"save_top_k": 3}, "needs a monitor"),
        ({"monitor": "loss", "save_top_k": 3, "max_to_keep": 3}, "give one of them"),
        ({"monitor": "loss", "mode": "best"}, '"min" or "max"'),
    ],
)
def test_lightning_callback_refuses_what_makes_no_sense(wrong: dict[str, Any], words: str) -> None:
    from distckpt.integrations.lightning import DistckptCallback

    with pytest.raises(ValueError, match=words):
        DistckptCallback("unused", **wrong)


# ---- Ray Train ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(180)
def test_ray_train_goes_on_after_a_worker_was_killed(tmp_path: Path, ray_address: str) -> None:
    directory, notes = tmp_path / "run", tmp_path / "notes"
    notes.mkdir()
    program = ROOT / "tests" / "ranks" / "programs" / "on_ray_train_session.py"
    done = subprocess.run(
        [sys.executable, str(program), str(directory), str(tmp_path / "results"), str(notes)],
        env={
            **os.environ,
            "RAY_ADDRESS": ray_address,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # it collects reports, and finds the dead, that often
        },
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        steps = [int(line) for line in (notes / f"rank-{rank}").read_text().split()]
        assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 7], "each step once, but for the one in which a worker died"
    assert (notes / "changed").read_text() == "", "the workers' processes stay as Ray Train has made them"
    reports = [json.loads(line) for line in (notes / "reports").read_text().splitlines()]
    assert reports[-1] == [{"global_step": 8, "rank": rank, "loss": 8.0} for rank in (0, 1)]
    result = json.loads((notes / "result").read_text())
    assert result == {"newest": str(directory / "ckpt-8"), "best": str(directory / "ckpt-2"), "metrics": reports[-1][0]}
    with distckpt.open(result["best"]) as reader:
        assert reader.metrics == {"global_step": 2.0, "rank": 0.0, "loss": 2.0}
    assert numbers(directory) == [2, 4, 6, 8]

    from distckpt.integrations.ray_train import path_of, to_ray_checkpoint
    from tests.ranks.programs.on_ray_train_session import STEPS, make_module, make_step

    module, optimizer = make_module()
    step = make_step(module, optimizer)
    for number in range(STEPS):
        step(number)
    with pytest.raises(ValueError, match="does not stand for a checkpoint"):
        path_of(to_ray_checkpoint(directory / "ckpt-8"), directory)
    with to_ray_checkpoint(directory / "ckpt-8").as_directory() as folder:
        saved = distckpt.load(folder, "model")
    assert saved.keys() == module.state_dict().keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "needed", "extra"),
    [("transformers", "transformers.trainer_callback", "transformers"), ("lightning", "lightning.pytorch", "lightning"),
     ("ray_train", "ray.train", "train"), ("jax", "jax", "jax")],
)  # fmt: skip
def test_a_missing_library_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, needed: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, needed, None)
    monkeypatch.delitem(sys.modules, f"distckpt.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'distckpt\[{extra}\]'"):
        importlib.import_module(f"distckpt.integrations.{name}")


def test_transformers_callback_refuses_a_trainer_that_is_not_its_own(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from distckpt.integrations.transformers import DistckptCallback

    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    callback = DistckptCallback(tmp_path, 1)
    trainer = Trainer(scenarios.language_model(0.0), settings, train_dataset=scenarios.Texts(4))
    with pytest.raises(ValueError, match="not among the trainer's"):
        callback.train(trainer)
    with pytest.raises(TypeError, match="resume from"):
        callback.train(trainer, resume_from_checkpoint=True)


def test_a_session_of_ray_train_is_told_when_to_save(tmp_path: Path) -> None:
    from distckpt.integrations.ray_train import training_session

    with pytest.raises(ValueError, match="nothing says when to save"):
        training_session(distckpt.Checkpoint(step=1), tmp_path)


@lightning
@pytest.mark.parametrize("name", ["transformers", "lightning"])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"save_steps": 1, "save_secs": 1.0}, ValueError),
        ({"save_steps": 1, "kept": 3}, TypeError),
        ({"save_steps": 1, "keep": 3}, TypeError),
        ({"save_steps": 1, "max_to_keep": 0}, ValueError),
    ],
)
def test_wrong_arguments_are_refused_at_once(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    callback = importlib.import_module(f"distckpt.integrations.{name}").DistckptCallback
    with pytest.raises(error):
        callback("unused", **arguments)
