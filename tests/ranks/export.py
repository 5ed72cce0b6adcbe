"""What processes do in the tests of exports: modules to export, rank functions, and a program that is to be killed."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distckpt


class Tower(nn.Module):
    """Tied weights, a buffer that is saved, one that is not, and a tensor that is neither parameter nor buffer."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 6)
        self.outer.weight = self.inner.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.shifts = [torch.arange(6.0)]
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.outer(torch.relu(self.inner(x)))) * self.scale + self.shifts[0] + self.seen


def inputs() -> tuple[torch.Tensor]:
    return (torch.linspace(-1, 1, 12).reshape(2, 6),)


def tower(seed: int) -> Tower:
    """The same for the same seed, and in training mode."""
    torch.manual_seed(seed)
    module = Tower()
    module.seen += seed
    return module


def output(module: nn.Module) -> torch.Tensor:
    """What it makes of the example inputs when it is deployed."""
    was, _ = module.training, module.eval()
    with torch.no_grad():
        found = module(*inputs())
    module.train(was)
    return found


def dies_once(marker: str) -> nn.Module:
    """Kills its process when it is built for the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Tower()


def blocks(marker: str) -> nn.Module:
    """Says which process it is in, and never comes to an end."""
    Path(marker).write_text(str(os.getpid()))
    while True:
        time.sleep(60)


# ---- ranks --------------------------------------------------------------------------------------------------------------


def small_gpt() -> Any:
    """A Transformers model with tied embeddings."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(gpt_config())


def gpt_config() -> Any:
    from transformers import GPT2Config

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16}
    return GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)


def export_sharded(directory: str) -> dict[str, Any]:
    """Shard a model over the ranks, train it, save it, export it in three ways; what the live model answers."""
    torch.manual_seed(0)
    model = small_gpt()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(8).reshape(1, 8)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    how = {
        "program": distckpt.Export(small_gpt, example_inputs=(tokens,)),
        "half": distckpt.Export(small_gpt, config=gpt_config(), dtype=torch.bfloat16),
        "weights": model,
    }
    model.example_inputs = (tokens,)
    try:
        distckpt.ExportCheckpointManager(distckpt.Checkpoint(model=model), directory, 5, {"sharded": model})
    except ValueError as error:
        refused = str(error)
    del model.example_inputs
    with distckpt.ExportCheckpointManager(distckpt.Checkpoint(model=model), directory, 5, how) as manager:
        manager.save(7)
        manager.wait_for_exports(100)
        dist.barrier()
        exports, others = manager.exports, manager.latest_savedmodel
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    return {"exports": exports, "latest": others, "logits": logits.tolist(), "refused": refused}


def export_in_a_task_that_dies(directory: str, marker: str) -> list[str]:
    """The process of the first try is killed; the second try succeeds."""
    model = tower(3)
    build = functools.partial(dies_once, marker)
    how = {"tower": distckpt.Export(build, example_inputs=inputs())}
    with distckpt.ExportCheckpointManager(distckpt.Checkpoint(model=model), directory, 5, how) as manager:
        manager.save(1)
        manager.wait_for_exports(100)
        dist.barrier()
        return manager.exports


# ---- a program that is to be killed -----------------------------------------------------------------------------------


def save_and_export(directory: str, died: str, blocked: str) -> None:
    """Save; the first export dies with its process, the second finishes one module and gets no further."""
    how = {
        "first": distckpt.Export(lambda: dies_once(died), example_inputs=inputs()),
        "second": distckpt.Export(lambda: blocks(blocked), example_inputs=inputs()),
    }
    with distckpt.ExportCheckpointManager(distckpt.Checkpoint(model=tower(1)), directory, 5, how) as manager:
        manager.save(1).result(30)
        manager.wait_for_exports()
