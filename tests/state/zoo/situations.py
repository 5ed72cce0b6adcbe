"""What programs do to optimizers: skipped steps, frozen layers, groups, parameters of no module, hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim

import distckpt
from tests.state.zoo.entry import Run, register
from tests.state.zoo.training import batch, loss_of, small, stepper, trained_by

SECTION = "optimizers"

add = partial(register, SECTION)


# ---- parameters without gradients, skipped steps, frozen layers ------------------------------------------------------


class TwoHeads(nn.Module):
    """One of two heads is used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.used = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, also: bool = False) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return self.used(hidden) + (self.unused(hidden) if also else 0)


def _never(kind: type[optim.Optimizer], options: dict[str, Any]) -> Callable[[], Run]:
    return trained_by(lambda parameters: kind(parameters, **options), TwoHeads)


for _kind, _options in (
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.Adam, {}),
    (optim.AdamW, {"fused": True}),
    (optim.Adafactor, {}),
    (optim.Adagrad, {}),
    (optim.NAdam, {}),
    (optim.LBFGS, {}),
):
    if _kind is not optim.LBFGS:
        add(
            f"no-gradient-{_kind.__name__.lower()}",
            "parameters that never got a gradient",
            _never(_kind, _options),
            two_ranks=_kind in (optim.SGD, optim.Adam),
        )


def _joins_later() -> Run:
    model = TwoHeads()
    optimizer = optim.Adam(model.parameters())
    step = stepper(model, optimizer, loss=lambda at: (model(batch(at), also=at >= 2) ** 2).mean())
    return Run({"model": model, "optimizer": optimizer}, step)


add("gradient-later", "parameters that got their first gradient later", _joins_later, two_ranks=True)
add("gradient-only-after-restore", "parameters that got their first gradient later", _joins_later, steps=1)
add("not-stepped", "an optimizer that has not stepped", trained_by(optim.Adam), steps=0, two_ranks=True)
add(
    "not-stepped-adagrad",
    "an optimizer that has not stepped",
    trained_by(lambda parameters: optim.Adagrad(parameters, initial_accumulator_value=0.3)),
    steps=0,
)
add(
    "sgd-without-state",
    "an optimizer that keeps no state",
    trained_by(lambda parameters: optim.SGD(parameters, lr=0.1)),
    two_ranks=True,
)


def _scaled(skipped: tuple[int, ...]) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        optimizer = optim.Adam(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

        def step(at: int) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, at) * (float("inf") if at in skipped else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        return Run({"model": model, "optimizer": optimizer, "scaler": scaler}, step)

    return build


add("gradscaler", "`torch.amp.GradScaler`", _scaled(()), two_ranks=True)
add("gradscaler-skipped-first", "a first step that was skipped", _scaled((0,)), steps=1, two_ranks=True)
add("gradscaler-skipped-second", "a step that was skipped", _scaled((1,)))


def _frozen(freeze_at: int | None, thaw_at: int | None, at_start: bool) -> Callable[[], Run]:
    """The first layer is frozen or thawed at a step; with ``at_start`` it is frozen when the run begins."""

    def build() -> Run:
        model = small()
        optimizer = optim.Adam(model.parameters())
        first = model.get_submodule("0")
        first.requires_grad_(not at_start)

        def step(at: int) -> Any:
            if at == freeze_at:
                first.requires_grad_(False)
            if at == thaw_at:
                first.requires_grad_(True)
            return stepper(model, optimizer)(at)

        return Run({"model": model, "optimizer": optimizer}, step)

    return build


add("frozen-midway", "layers frozen midway", _frozen(2, None, False), twin=_frozen(None, None, True), two_ranks=True)
add("frozen-from-the-start", "frozen layers", _frozen(None, None, True), two_ranks=True)
add("thawed-midway", "layers unfrozen midway", _frozen(None, 2, True), twin=_frozen(None, None, False), two_ranks=True)
add("thawed-after-the-restore", "layers unfrozen midway", _frozen(None, 3, True))


def _frozen_outside() -> Run:
    model = small()
    model.get_submodule("0").requires_grad_(False)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


add("frozen-not-in-optimizer", "frozen layers", _frozen_outside, two_ranks=True)


# ---- groups --------------------------------------------------------------------------------------------------------


def _groups() -> Run:
    model = small()
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = optim.AdamW([{"params": rest, "weight_decay": 0.0, "name": "rest"}, {"params": decay, "lr": 0.01}])
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _changed_groups() -> Run:
    run = _groups()
    optimizer, take = run.objects["optimizer"], run.step

    def step(at: int) -> Any:
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.param_groups[1]["betas"] = (0.8, 0.9 + at / 1000)
        optimizer.param_groups[1]["note"] = {"at": at, "seen": [at]}
        optimizer.param_groups[1]["limit"] = torch.tensor([at, 2.0])
        return take(at)

    run.step = step
    return run


def _group_added(added_at: int) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        parameters = list(model.parameters())
        optimizer = optim.Adam(parameters[:2], lr=0.01)
        if added_at < 0:
            optimizer.add_param_group({"params": parameters[2:], "lr": 0.02})

        def step(at: int) -> Any:
            if at == added_at:
                optimizer.add_param_group({"params": parameters[2:], "lr": 0.02})
            return stepper(model, optimizer)(at)

        return Run({"model": model, "optimizer": optimizer}, step)

    return build


def _named_parameters() -> Run:
    model = small()
    optimizer = optim.Adam(model.named_parameters())
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _empty_group() -> Run:
    model = small()
    optimizer = optim.Adam([{"params": list(model.parameters())}, {"params": [], "lr": 0.5}])
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


def _shuffled() -> Run:
    model = small()
    optimizer = optim.Adam(reversed(list(model.parameters())))
    return Run({"model": model, "optimizer": optimizer}, stepper(model, optimizer))


add("groups", "parameter groups", _groups, two_ranks=True)
add(
    "groups-changed", "parameter groups changed midway, with keys of the program's own", _changed_groups, two_ranks=True
)
add("group-added", "a parameter group added midway", _group_added(1), twin=_group_added(-1), two_ranks=True)
add("group-empty", "a parameter group without parameters", _empty_group)
add("named-parameters", "an optimizer made from `named_parameters()`", _named_parameters, two_ranks=True)
add("another-order", "parameters in another order than the module's", _shuffled)


def _removed(removed_at: int) -> Callable[[], Run]:
    """The parameter leaves the group, and its state stays behind, which torch's own state_dict cannot bear."""

    def build() -> Run:
        model = small()
        optimizer = optim.Adam(model.parameters())
        if removed_at < 0:
            del optimizer.param_groups[0]["params"][1]

        def step(at: int) -> Any:
            if at == removed_at:
                del optimizer.param_groups[0]["params"][1]
            model.zero_grad()
            return stepper(model, optimizer)(at)

        return Run({"model": model, "optimizer": optimizer}, step)

    return build


add("removed-parameter", "state left behind by removed parameters", _removed(2), twin=_removed(-1), torch_can=False)


# ---- without the module ----------------------------------------------------------------------------------------------


def _alone(number_of: Callable[[nn.Module], Any]) -> Callable[[], Run]:
    """An optimizer whose parameters no object of the checkpoint holds; the program sets them by itself."""

    def build() -> Run:
        model = small()
        optimizer = optim.Adam(number_of(model))
        own = {"weights": model.state_dict()}
        return Run({"optimizer": optimizer, "own": own}, stepper(model, optimizer))

    return build


def _free_parameter(saved: bool) -> Callable[[], Run]:
    def build() -> Run:
        log_alpha = nn.Parameter(torch.rand(()))
        optimizer = optim.Adam([log_alpha])

        def step(at: int) -> Any:
            optimizer.zero_grad()
            loss = (log_alpha.exp() - at) ** 2
            loss.backward()
            optimizer.step()
            return loss.detach()

        own = {"log_alpha": log_alpha} if saved else {"own": {"values": [log_alpha.detach()]}}
        return Run({**own, "optimizer": optimizer}, step)

    return build


def _free_beside_module() -> Run:
    model = small()
    log_alpha = nn.Parameter(torch.rand(()))
    optimizer = optim.Adam([*model.parameters(), log_alpha])
    step = stepper(model, optimizer, loss=lambda at: loss_of(model, at) + log_alpha.exp())
    return Run({"model": model, "own": {"log_alpha": log_alpha}, "optimizer": optimizer}, step)


def _two_modules(**names: str) -> Run:
    one, two = small(), small()
    optimizer = optim.Adam([*one.parameters(), *two.parameters()])
    step = stepper(one, optimizer, loss=lambda at: loss_of(one, at) + loss_of(two, at))
    return Run({"one": one, "two": two, "optimizer": optimizer}, step)


def _two_modules_one_saved() -> Run:
    one, two = small(), small()
    optimizer = optim.Adam([*one.parameters(), *two.parameters()])
    step = stepper(one, optimizer, loss=lambda at: loss_of(one, at) + loss_of(two, at))
    return Run({"one": one, "own": {"two": two.state_dict()}, "optimizer": optimizer}, step)


def _in_per_rank(optimizer_too: bool) -> Callable[[], Run]:
    def build() -> Run:
        model = small()
        optimizer = optim.Adam(model.parameters())
        held: Any = distckpt.PerRank(optimizer) if optimizer_too else optimizer
        return Run({"model": distckpt.PerRank(model), "optimizer": held}, stepper(model, optimizer))

    return build


def _two_optimizers() -> Run:
    model, critic = small(), small()
    actor, other = optim.Adam(model.parameters()), optim.RMSprop(critic.parameters(), momentum=0.5)

    def step(at: int) -> Any:
        return stepper(model, actor)(at) + stepper(critic, other)(at)

    return Run({"optimizer": actor, "critic_optimizer": other, "model": model, "critic": critic}, step)


def _submodule() -> Run:
    model = small()
    optimizer = optim.Adam(model.get_submodule("0").parameters())
    model.get_submodule("2").requires_grad_(False)
    return Run({"part": model.get_submodule("0"), "model": model, "optimizer": optimizer}, stepper(model, optimizer))


add("module-elsewhere", "an optimizer without its module", _alone(lambda model: model.parameters()), two_ranks=True)
add("free-parameter", "an optimizer over a free parameter", _free_parameter(True), two_ranks=True)
add("free-parameter-elsewhere", "an optimizer over a free parameter", _free_parameter(False), two_ranks=True)
add("free-parameter-beside", "an optimizer over a module and a free parameter", _free_beside_module, two_ranks=True)
add("two-modules", "an optimizer over two modules", _two_modules, two_ranks=True)
add("two-modules-one-saved", "an optimizer over a module and one that is not saved", _two_modules_one_saved)
add("per-rank-module", "an optimizer of a module inside PerRank", _in_per_rank(False), two_ranks=True)
add("per-rank-both", "an optimizer of a module inside PerRank", _in_per_rank(True), two_ranks=True)
add("two-optimizers", "two optimizers, given before their modules", _two_optimizers, two_ranks=True)
add("submodule-twice", "a module and a part of it under two names", _submodule)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _hooked() -> Run:
    """The hooks count; what they count must be the steps of the program and nothing else."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    counts = {"before": 0, "after": 0, "gradient": 0, "forward": 0}

    def counting(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    optimizer.register_step_pre_hook(counting("before"))
    optimizer.register_step_post_hook(counting("after"))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(counting("gradient"))
    model.register_forward_hook(counting("forward"))
    start = {"at": 0}
    take = stepper(model, optimizer)

    def step(at: int) -> Any:
        if not counts["before"]:
            start["at"] = at
        return take(at)

    return Run({"model": model, "optimizer": optimizer}, step, lambda: _steps_off(counts, start["at"], optimizer))


def _steps_off(counts: dict[str, int], first: int, optimizer: optim.Optimizer) -> dict[str, int]:
    taken = next((int(state["step"]) for state in optimizer.state.values()), 0)
    hooks = counts["before"]
    return {
        "hooks run beyond steps": hooks - (taken - first if hooks else 0),
        "after": counts["after"] - hooks,
        "gradient": counts["gradient"] - 4 * hooks,
        "forward": counts["forward"] - hooks,
    }


add("hooks", "hooks on optimizers and modules, not run by a save or a restore", _hooked, two_ranks=True)


def _state_dict_hooks() -> Run:
    """Optimizer hooks that change what ``state_dict`` gives and ``load_state_dict`` takes."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    noted: dict[str, Any] = {"epoch": 0}

    def on_save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "epoch": noted["epoch"]}

    def on_load(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        noted["epoch"] = state["epoch"]
        return {key: value for key, value in state.items() if key != "epoch"}

    optimizer.register_state_dict_post_hook(on_save)
    optimizer.register_load_state_dict_pre_hook(on_load)

    def step(at: int) -> Any:
        noted["epoch"] += 1
        return stepper(model, optimizer)(at)

    return Run({"model": model, "optimizer": optimizer}, step, lambda: noted)


add("state-dict-hooks", "optimizer hooks on `state_dict` and `load_state_dict`", _state_dict_hooks, two_ranks=True)
