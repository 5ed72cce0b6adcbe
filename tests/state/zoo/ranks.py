"""What lives on many ranks. Builders run inside rank processes; the register is read by tests and the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler as lr

import distckpt
from tests.state.zoo.averages import Normed
from tests.state.zoo.entry import Entry, Run
from tests.state.zoo.oracle import restore_by_torch
from tests.state.zoo.training import batch, small, stepper


@dataclass(frozen=True, slots=True)
class RankEntry:
    """Something on many ranks. ``worlds`` are pairs of world sizes, that which saves and that which restores.

    ``refused`` is the key that the refusal names, "" for what is carried; ``advice`` what it says to do.
    ``exact`` says that each rank comes back to the very state that it had.
    """

    name: str
    kind: str
    build: Callable[[], Run]
    worlds: tuple[tuple[int, int], ...]
    twin: Callable[[], Run] | None = None
    refused: str = ""
    advice: str = ""
    exact: bool = True
    torch_can: bool = True

    def entry(self) -> Entry:
        """The same for a round trip on the ranks that run now."""
        oracle = restore_by_torch if self.torch_can else None
        return Entry(
            self.name, "ranks", self.kind, self.build, self.twin or self.build, 3, oracle, self.exact, None, True
        )


RANK_ENTRIES: dict[str, RankEntry] = {}

SAME = ((2, 2),)
ELASTIC = ((1, 2), (2, 1), (2, 3))


def add(
    name: str, kind: str, build: Callable[[], Run], worlds: tuple[tuple[int, int], ...] = SAME, **more: Any
) -> None:
    """Add an entry to the register."""
    assert name not in RANK_ENTRIES, name
    RANK_ENTRIES[name] = RankEntry(name, kind, build, worlds, **more)


def own_batch(at: int) -> torch.Tensor:
    """Data of this rank alone."""
    return batch(at * 7 + dist.get_rank())


# ---- DDP -----------------------------------------------------------------------------------------------------------


def _ddp(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], Run]:
    def build() -> Run:
        model = wrap(make())
        optimizer = optim.Adam(model.parameters())
        step = stepper(model, optimizer, loss=lambda at: (model(own_batch(at)) ** 2).mean() + model(batch(at)).mean())
        return Run({"model": model, "optimizer": optimizer}, step)

    return build


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _ddp_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(DistributedDataParallel(model), nn.Identity())


_DDP = "`DistributedDataParallel` anywhere"
add("ddp", _DDP, _ddp(_plain, DistributedDataParallel))
add("ddp-inside", _DDP, _ddp(_plain, _ddp_inside))
add("ddp-compiled", _DDP, _ddp(_plain, lambda m: torch.compile(DistributedDataParallel(m), backend="eager")))  # type: ignore[arg-type,return-value]
add(
    "ddp-into-bare",
    _DDP,
    _ddp(_plain, DistributedDataParallel),
    twin=_ddp(_plain, lambda m: m),
    exact=False,
    torch_can=False,
)


def _batch_norm(broadcast: bool) -> Callable[[], Run]:
    """Every rank sees other data, so its running statistics are its own until DDP sends rank 0's."""

    def build() -> Run:
        model = DistributedDataParallel(Normed(), broadcast_buffers=broadcast)
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = stepper(model, optimizer, loss=lambda at: (model(own_batch(at)) ** 2).mean())
        return Run({"model": model, "optimizer": optimizer}, step)

    return build


add("ddp-batch-norm", "batch-norm buffers under DDP: rank 0's, whole", _batch_norm(True))


# ---- each rank its own ---------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A router that all ranks share and experts of this rank, under the names that ``named`` gives."""

    def __init__(self, named: Callable[[int], str]) -> None:
        super().__init__()
        self.router = nn.Linear(6, 6)
        state = torch.get_rng_state()
        torch.manual_seed(torch.initial_seed() * 10 + dist.get_rank())
        self.experts = nn.ModuleDict({named(at): nn.Linear(6, 3) for at in range(2)})
        torch.set_rng_state(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.tanh(expert(self.router(x))) for expert in self.experts.values())  # type: ignore[return-value]


def _experts(named: Callable[[int], str], per_rank: bool) -> Callable[[], Run]:
    def build() -> Run:
        model = Experts(named)
        optimizer = optim.Adam(model.parameters())

        def step(at: int) -> Any:
            optimizer.zero_grad()
            loss = (model(own_batch(at)) ** 2).mean()
            loss.backward()
            for parameter in model.router.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            return loss.detach()

        if not per_rank:
            return Run({"model": model, "optimizer": optimizer}, step)
        return Run({"model": distckpt.PerRank(model), "optimizer": distckpt.PerRank(optimizer)}, step)

    return build


_EXPERTS = "expert parallelism: each rank its own experts"
add("experts-own-names", f"{_EXPERTS}, under names of its own", _experts(lambda at: f"{dist.get_rank()}_{at}", False))
add("experts-per-rank", f"{_EXPERTS}, under equal names inside `PerRank`", _experts(str, True))
add(
    "experts-equal-names",
    "plain tensors under one key that differ between ranks",
    _experts(str, False),
    refused="model.experts.0.",
    advice=r"(?s)(?=.*rank)(?=.*\b0\b)(?=.*\b1\b)(?=.*(PerRank|name))",
)
add(
    "tensors-differ",
    "plain tensors under one key that differ between ranks",
    lambda: Run({"own": {"t": torch.full((3,), float(dist.get_rank()))}}),
    refused="own.t",
    advice=r"(?s)(?=.*rank)(?=.*\b0\b)(?=.*\b1\b)(?=.*(PerRank|name))",
)
add(
    "values-differ",
    "plain values under one key that differ between ranks",
    lambda: Run({"own": {"n": dist.get_rank()}}),
    refused="own.n",
    advice=r"(?s)(?=.*rank)(?=.*PerRank)",
)


def _stages() -> Run:
    rank = dist.get_rank()
    stage = nn.ModuleDict({str(at): nn.Linear(6, 6) for at in (2 * rank, 2 * rank + 1)})
    optimizer = optim.AdamW(stage.parameters())

    def loss(at: int) -> torch.Tensor:
        x = own_batch(at)
        for layer in stage.values():
            x = torch.tanh(layer(x))
        return (x**2).mean()

    return Run({"model": stage, "optimizer": optimizer}, stepper(stage, optimizer, loss=loss))


add("stages", "pipeline stages: each rank its own layers", _stages)


def _per_rank_everything() -> Run:
    """What belongs to one rank, of every kind, and another on every rank."""
    rank = dist.get_rank()
    torch.manual_seed(torch.initial_seed() * 10 + rank)
    model = small()
    optimizer = optim.Adam(model.parameters(), lr=0.01 * (rank + 1))
    scheduler = lr.StepLR(optimizer, 2, 0.5)
    generator = torch.Generator().manual_seed(rank + torch.initial_seed())
    own = {"seen": [], "best": None, "t": torch.rand(2 + rank)}
    take = stepper(model, optimizer, scheduler)

    def step(at: int) -> Any:
        own["seen"] = [*own["seen"], (at, rank)]  # type: ignore[misc]
        own["best"] = {"at": at, "t": torch.rand(rank + 1, generator=generator)}
        return take(at)

    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "generator": generator, "own": own}
    return Run({name: distckpt.PerRank(value) for name, value in objects.items()}, step, lambda: (own, generator))


add("per-rank-everything", "`PerRank` around modules, optimizers, schedulers, generators, trees", _per_rank_everything)


def _zero() -> Run:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(_plain())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.Adam, lr=0.01)
    step = stepper(model, optimizer, loss=lambda at: (model(own_batch(at)) ** 2).mean())
    return Run({"model": model, "optimizer": optimizer}, step)


add(
    "zero-redundancy",
    "`ZeroRedundancyOptimizer`",
    _zero,
    refused="optimizer",
    advice=r"(?i)fsdp2|fully_shard|PerRank|consolidate",
)


def _fsdp1() -> Run:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(_plain(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = optim.Adam(model.parameters())
    step = stepper(model, optimizer, loss=lambda at: (model(batch(at)) ** 2).mean())
    return Run({"model": model, "optimizer": optimizer}, step)


add("fsdp1", "FSDP1: `FullyShardedDataParallel`", _fsdp1, torch_can=False, refused="model")


# ---- FSDP2 on other numbers of ranks -----------------------------------------------------------------------------------


def sharded(model: nn.Module, *parts: nn.Module, **options: Any) -> nn.Module:
    """The model on a mesh of all ranks. Gradients are those of rank 0's loss alone, so no world size changes a bit."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, **options)
        part.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def lead(value: torch.Tensor) -> torch.Tensor:
    """The loss on rank 0, nothing on the others."""
    return value * (1.0 if dist.get_rank() == 0 else 0.0)


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def _fsdp(
    make: Callable[[Any], optim.Optimizer], model: Callable[[], nn.Module] = _layers, **options: Any
) -> Callable[[], Run]:
    def build() -> Run:
        module = model()
        sharded(module, *(part for part in module.children() if any(True for _ in part.parameters())), **options)
        optimizer = make(module.parameters())
        step = stepper(module, optimizer, loss=lambda at: lead((module(batch(at)) ** 2).mean()))
        return Run({"model": module, "optimizer": optimizer}, step)

    return build


class UnusedHead(nn.Module):
    """A head that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 7)
        self.unused = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x))


class Tiny(nn.Module):
    """Parameters that are smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 1))
        self.bias = nn.Parameter(torch.rand(1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x @ self.weight + self.bias


def _frozen_layers() -> nn.Sequential:
    model = _layers()
    model[0].requires_grad_(False)
    return model


def _fsdp_free() -> Run:
    run = _fsdp(optim.Adam)()
    module = run.objects["model"]
    log_alpha = nn.Parameter(torch.rand(()))
    optimizer = optim.Adam([log_alpha])
    take = run.step

    def step(at: int) -> Any:
        optimizer.zero_grad()
        ((log_alpha.exp() - at) ** 2).backward()
        optimizer.step()
        return take(at)

    return Run(
        {"model": module, "optimizer": run.objects["optimizer"], "alpha": log_alpha, "alpha_optimizer": optimizer}, step
    )


def _fsdp_two() -> Run:
    one, two = sharded(_layers()), sharded(_layers())
    optimizer = optim.Adam([*one.parameters(), *two.parameters()])
    step = stepper(one, optimizer, loss=lambda at: lead((one(batch(at)) ** 2).mean() + two(batch(at)).mean()))
    return Run({"one": one, "two": two, "optimizer": optimizer}, step)


def _fsdp_groups() -> Run:
    module = sharded(_layers())
    matrices = [p for p in module.parameters() if p.ndim == 2]
    others = [p for p in module.parameters() if p.ndim == 1]
    optimizer = optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": matrices, "lr": 0.01}])
    step = stepper(module, optimizer, loss=lambda at: lead((module(batch(at)) ** 2).mean()))
    return Run({"model": module, "optimizer": optimizer}, step)


def _fsdp_schedule() -> Run:
    run = _fsdp(lambda p: optim.SGD(p, lr=0.1, momentum=0.9))()
    optimizer, module = run.objects["optimizer"], run.objects["model"]
    parts = [lr.LinearLR(optimizer, 0.1, 1.0, 2), lr.MultiStepLR(optimizer, [1, 2], 0.5)]
    scheduler = lr.SequentialLR(optimizer, parts, [2])
    own = {"step": 0, "metrics": {}, "best": None}
    step = stepper(module, optimizer, scheduler, loss=lambda at: lead((module(batch(at)) ** 2).mean()))

    def counted(at: int) -> Any:
        own["step"] = at + 1
        own["metrics"] = {"seen": [at], "t": torch.full((2,), float(at))}
        own["best"] = {"at": at}
        return step(at)

    return Run({"scheduler": scheduler, "model": module, "optimizer": optimizer, "own": own}, counted)


def _fsdp_ema() -> Run:
    run = _fsdp(optim.Adam)()
    module, take = run.objects["model"], run.step
    average = sharded(_layers())

    @torch.no_grad()
    def step(at: int) -> Any:
        with torch.enable_grad():
            loss = take(at)
        for mine, other in zip(average.parameters(), module.parameters(), strict=True):
            mine.lerp_(other, 0.1)
        return loss

    return Run({**run.objects, "average": average}, step)


def _fsdp_skipped() -> Run:
    run = _fsdp(optim.Adam)()
    module, take = run.objects["model"], run.step
    return Run(run.objects, lambda at: take(at) if at >= 3 else module(batch(at)).detach().sum() * 0)


_FSDP = "FSDP2 on another number of ranks"
adam, elastic = optim.Adam, partial(add, worlds=ELASTIC)
elastic("fsdp-adam", f"{_FSDP}: weights and moments", _fsdp(adam))
elastic("fsdp-sgd", f"{_FSDP}: weights and moments", _fsdp(lambda p: optim.SGD(p, lr=0.1, momentum=0.9)))
elastic("fsdp-amsgrad", f"{_FSDP}: weights and moments", _fsdp(lambda p: adam(p, amsgrad=True, foreach=True)))
elastic(
    "fsdp-tensor-lr", f"{_FSDP}: weights and moments", _fsdp(lambda p: adam(p, lr=torch.tensor(0.01), foreach=False))
)
elastic("fsdp-adagrad", f"{_FSDP}: weights and moments", _fsdp(lambda p: optim.Adagrad(p, lr=0.1)))
elastic("fsdp-no-gradient", f"{_FSDP}: parameters that never got a gradient", _fsdp(adam, UnusedHead))
elastic("fsdp-frozen", f"{_FSDP}: frozen layers", _fsdp(adam, _frozen_layers))
elastic("fsdp-tiny", f"{_FSDP}: parameters smaller than the world", _fsdp(adam, lambda: nn.Sequential(Tiny())))
elastic("fsdp-skipped", f"{_FSDP}: an optimizer that has not stepped", _fsdp_skipped)
elastic("fsdp-free-parameter", f"{_FSDP}: a free parameter beside", _fsdp_free)
elastic("fsdp-two-modules", f"{_FSDP}: an optimizer over two modules", _fsdp_two)
elastic("fsdp-groups", f"{_FSDP}: parameter groups", _fsdp_groups)
elastic("fsdp-schedule", f"{_FSDP}: schedulers and plain state", _fsdp_schedule)
elastic("fsdp-ema", f"{_FSDP}: averages in a second model", _fsdp_ema)
elastic(
    "fsdp-compiled",
    f"{_FSDP}: compiled",
    _fsdp(adam, lambda: nn.Sequential(torch.compile(nn.Linear(6, 5), backend="eager"), nn.Tanh())),
)  # type: ignore[arg-type]
elastic(
    "fsdp-mixed",
    f"{_FSDP}: mixed precision",
    _fsdp(adam, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
)
elastic("fsdp-adam-into-adamw", f"{_FSDP}: Adam's state into AdamW", _fsdp(adam), twin=_fsdp(optim.AdamW), exact=False)
