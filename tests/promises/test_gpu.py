"""On a GPU: what is saved is the state at the call of save, whatever training does next, and all of it comes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import DataLoader

import distckpt
import distckpt.dcp
from distckpt.errors import SaveError
from tests.support.gang import environment, free_port

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LARGE = 1 << 26
"""Elements of a tensor that is copied for longer than Python needs to go on."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True, amsgrad=True),
    "capturable": lambda parameters: torch.optim.AdamW(parameters, capturable=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
}


class Training:
    """Something of what people train with: dropout, running means, scaled half precision, a schedule."""

    def __init__(self, directory: Path, optimizer: str, seed: int, device: str = "cuda") -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 8)]
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.scaler = torch.amp.GradScaler("cuda", growth_interval=3)
        self.checkpoint = distckpt.Checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            random=distckpt.PerRank(distckpt.RandomState()),
        )
        self.manager = distckpt.CheckpointManager(self.checkpoint, directory)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = self.model(torch.randn(16, 32, device="cuda")).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_never_stopped(optimizer: str, tmp_path: Path) -> None:
    first = Training(tmp_path, optimizer, seed=1)
    with first.manager:
        first.steps(5)
        first.manager.save(5)
        expected = first.steps(5)
    again = Training(tmp_path, optimizer, seed=2)
    with again.manager:
        again.steps(2)
        again.manager.restore()
        assert again.steps(5) == expected
        assert {parameter.device.type for parameter in again.model.parameters()} == {"cuda"}
        assert {
            (name, value.device.type)
            for state in again.optimizer.state.values()
            for name, value in state.items()
            if torch.is_tensor(value)
        } == {
            (name, value.device.type)
            for state in first.optimizer.state.values()
            for name, value in state.items()
            if torch.is_tensor(value)
        }


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_what_was_saved_on_one_device_comes_back_on_another(here: str, there: str, tmp_path: Path) -> None:
    def made(seed: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(5, 3, device=device)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 5, device=device)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(1, here)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=model, optimizer=optimizer), tmp_path) as manager:
        manager.save(1)
    other, others = made(2, there)
    with distckpt.CheckpointManager(distckpt.Checkpoint(model=other, optimizer=others), tmp_path) as manager:
        manager.restore()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert theirs.device.type == there
        assert torch.equal(mine.cpu(), theirs.cpu())
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value.cpu(), others.state[theirs][name].cpu())
            assert name == "step" or others.state[theirs][name].device.type == there


class Counting:
    """A large parameter of which every element is the number of steps that were made."""

    def __init__(self, directory: Path, elements: int = LARGE, **options: Any) -> None:
        self.weight = nn.Parameter(torch.zeros(elements, device="cuda"))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.weight.grad = torch.full_like(self.weight, -1.0)
        self.directory = directory
        checkpoint = distckpt.Checkpoint(weight=self.weight, optimizer=self.optimizer)
        self.manager = distckpt.CheckpointManager(checkpoint, directory, max_to_keep=None, **options)
        self.manager.prepare()

    def saved(self, number: int) -> set[float]:
        """What is in the weight of that checkpoint."""
        with distckpt.open(self.directory / f"ckpt-{number}") as reader:
            weight = reader.tensor("weight")
            return set(weight.unique().tolist())


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Counting]:
    found = Counting(tmp_path)
    with found.manager:
        yield found


def test_steps_that_follow_at_once_are_in_no_save_before_them(counting: Counting) -> None:
    for number in range(6):
        pending = counting.manager.save(number)
        for _ in range(3):
            counting.optimizer.step()
        pending.result()
    assert [counting.saved(number) for number in range(6)] == [{3.0 * number} for number in range(6)]
    assert counting.manager.stats().device_waited.times > 0


def test_steps_wait_for_the_copies_of_all_saves_that_are_under_way(tmp_path: Path) -> None:
    counting = Counting(tmp_path, buffers=3)
    with counting.manager:
        counting.manager.save(0).result()
        counting.optimizer.step()
        pending = [counting.manager.save(number) for number in (1, 2, 3)]
        counting.optimizer.step()
        pending.append(counting.manager.save(4))
        counting.optimizer.step()
        for save in pending:
            save.result()
    assert [counting.saved(number) for number in range(5)] == [{0.0}, {1.0}, {1.0}, {1.0}, {2.0}]


def test_steps_that_are_replayed_as_a_graph_are_in_no_save_before_them(counting: Counting) -> None:
    counting.optimizer.step()  # as torch asks for before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counting.optimizer.step()
    for number in range(1, 5):
        pending = counting.manager.save(number)
        for _ in range(3):
            graph.replay()
        pending.result()
    assert [counting.saved(number) for number in range(1, 5)] == [{3.0 * number - 2} for number in range(1, 5)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
def test_steps_that_are_compiled_are_in_no_save_before_them(counting: Counting) -> None:
    pytest.importorskip("triton")
    step = torch.compile(counting.optimizer.step)
    step()
    for number in range(1, 4):
        pending = counting.manager.save(number)
        step()
        step()
        pending.result()
    assert [counting.saved(number) for number in range(1, 4)] == [{2.0 * number - 1} for number in range(1, 4)]


def test_a_graph_that_is_captured_while_a_save_is_under_way_captures(counting: Counting) -> None:
    counting.manager.save(0).result()
    counting.optimizer.step()
    pending = counting.manager.save(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counting.optimizer.step()
    graph.replay()
    pending.result()
    counting.manager.save(2).result()
    assert [counting.saved(number) for number in range(3)] == [{0.0}, {1.0}, {2.0}]


def test_what_changes_before_the_step_is_whole_or_refused(counting: Counting) -> None:
    def changed_after(number: int) -> None:
        pending = counting.manager.save(number)
        with torch.no_grad():
            counting.weight.add_(0.5)
        pending.result()

    changed_after(1)  # no step before it, so all that follows waits
    counting.optimizer.step()
    with pytest.raises(SaveError, match="weight changed on its GPU while it was copied"):
        changed_after(2)
    changed_after(3)
    counting.optimizer.step()
    counting.manager.save(4).result()
    assert [counting.saved(number) for number in (1, 3, 4)] == [{0.0}, {2.0}, {3.5}]
    assert [Path(path).name for path in counting.manager.checkpoints] == ["ckpt-1", "ckpt-3", "ckpt-4"]


def test_a_save_takes_no_memory_of_the_gpu_and_gives_up_its_pinned_memory(tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    with counting.manager:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        counting.manager.save(1).result()
        assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_workers_that_are_forked_beside_a_save_do_no_harm(tmp_path: Path) -> None:
    counting = Counting(tmp_path, 1 << 22)
    with counting.manager:
        for number in range(3):
            pending = counting.manager.save(number)
            loader = DataLoader([torch.ones(1)] * 8, num_workers=2, pin_memory=True)
            for batch in loader:
                counting.weight.grad = -batch.cuda().mean().expand_as(counting.weight).clone()
                counting.optimizer.step()
            pending.result()
    assert [counting.saved(number) for number in range(3)] == [{8.0 * number} for number in range(3)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as no_dist says
def test_dcp_saves_and_loads_gpu_tensors_through_it(tmp_path: Path) -> None:
    state: dict[str, Any] = {"weight": torch.randn(1000, 3, device="cuda"), "step": 7}
    dcp.save(state, storage_writer=distckpt.dcp.Writer(tmp_path, number=1), no_dist=True)
    found: dict[str, Any] = {"weight": torch.zeros(1000, 3, device="cuda"), "step": 0}
    dcp.load(found, storage_reader=distckpt.dcp.Reader(tmp_path), no_dist=True)  # type: ignore[attr-defined]
    assert torch.equal(found["weight"], state["weight"])
    assert found["step"] == 7


PROGRAM = Path(__file__).parents[1] / "ranks" / "programs" / "gpu.py"


def run_on_ranks(size: int, *arguments: object) -> list[str]:
    """What ranks that share the GPU print."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *map(str, arguments)],
            env=environment(rank, size, port, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        told = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(err[-3000:] for _, err in told)
    return [out.splitlines()[-1] for out, _ in told]


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_a_rank_with_nccl_goes_on_where_it_was_killed(backend: str, tmp_path: Path) -> None:
    assert run_on_ranks(1, backend, tmp_path, 6) == run_on_ranks(1, backend, tmp_path, 6, "again")


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ranks_that_share_a_gpu_are_followed_by_one_with_nccl_and_the_other_way_round(tmp_path: Path) -> None:
    first, other = run_on_ranks(2, "gloo", tmp_path / "two", 6)
    assert first == other
    assert run_on_ranks(1, "cpu:gloo,cuda:nccl", tmp_path / "two", 6, "again") == [first]
    (alone,) = run_on_ranks(1, "cpu:gloo,cuda:nccl", tmp_path / "one", 6)
    assert run_on_ranks(2, "gloo", tmp_path / "one", 6, "again") == [alone, alone]
