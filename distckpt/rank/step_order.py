"""On a GPU: what may change the state waits, on the device, until the state has been copied. The host does not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.transfer.staging import StagedCopy


class StepOrder:
    """Orders the next ``step()`` of every optimizer after the copy that is under way.

    Only the parameters and state of ``optimizers``, asked for at each copy, may wait for so long, and only if every one of
    them has made a step since the copy before: one that is replayed as a CUDA graph, or compiled, steps and says nothing.
    Else, and with anything else on a GPU, such as a buffer that the forward pass updates, the whole of the current stream
    waits.

    At each copy ``waited`` is told for how many seconds the GPUs have stood still for the one before.
    """

    def __init__(
        self,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]],
        waited: Callable[[float], object] = bool,
    ) -> None:
        self._optimizers = optimizers
        self._waited = waited
        self._waits: dict[torch.device, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._copies: list[StagedCopy] = []
        self._devices: frozenset[torch.device] = frozenset()
        self._stepped: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._replayed: WeakSet[torch.optim.Optimizer] = WeakSet()
        # All optimizers of the process: the one that steps next may have taken the place of one that was here.
        self._hook = register_optimizer_step_pre_hook(self._before_step) if torch.cuda.is_available() else None

    def after(self, copied: StagedCopy, sources: Sequence[torch.Tensor]) -> None:
        """See to it that nothing changes ``sources`` before ``copied``, which reads them, has arrived."""
        on_gpu = [source for source in sources if source.is_cuda]
        if not on_gpu:
            return
        self._tell()
        self._devices = frozenset(source.device for source in on_gpu)
        optimizers = list(self._optimizers())
        tell = all(optimizer in self._stepped and optimizer not in self._replayed for optimizer in optimizers)
        self._stepped.clear()
        owned = _memory(optimizers)
        # With several buffers those of earlier saves may be on their way still, each on a stream of its own.
        self._copies = [*(each for each in self._copies if not each.has_arrived), copied]
        if not (tell and all(source.untyped_storage().data_ptr() in owned for source in on_gpu)):
            self._order()

    def close(self) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return  # what is traced here would be played at every step
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._replayed.add(optimizer)  # nothing steps now, and its replays will not come here
            return
        self._stepped.add(optimizer)
        self._order()

    def _order(self) -> None:
        for copied in self._copies:
            for device in self._devices:
                self._order_after(copied, device)

    def _order_after(self, copied: StagedCopy, device: torch.device) -> None:
        """Have the device's stream wait, and take the time of the first wait for each copy."""
        stream = torch.cuda.current_stream(device)
        if device in self._waits:
            copied.order_after(stream)
            return
        before, after = _timer(), _timer()
        before.record(stream)
        copied.order_after(stream)
        after.record(stream)
        self._waits[device] = before, after

    def _tell(self) -> None:
        waits, self._waits = self._waits, {}
        milliseconds = [before.elapsed_time(after) for before, after in waits.values() if after.query()]  # type: ignore[no-untyped-call]
        if milliseconds:
            self._waited(max(milliseconds) / 1000)


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _memory(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    found = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
                    if isinstance(tensor, torch.Tensor):
                        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                        found.add(local.untyped_storage().data_ptr())
    return found
