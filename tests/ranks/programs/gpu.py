"""Train with FSDP2 on CUDA: ``gpu.py BACKEND DIRECTORY STEPS [again]``. Prints a digest of the state after the last step.

The ranks save halfway. With ``again`` they begin there.
"""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt


def main(backend: str, directory: str, steps: int, again: bool) -> None:
    """Train for so many steps, or for the second half of them."""
    torch.cuda.set_device(0)
    dist.init_process_group(backend)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    torch.manual_seed(7 + again)
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 4)).cuda()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    progress = {"step": 0}
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, progress=progress)
    with distckpt.CheckpointManager(checkpoint, directory) as manager:
        if again:
            manager.restore()
            assert progress["step"] == steps // 2
        while progress["step"] < steps:
            # The same for every rank and the sums exact, so that the number of ranks makes no difference.
            x = torch.eye(16, device="cuda") * (progress["step"] + 1)
            model(x).sum().backward()
            for parameter in model.parameters():
                assert isinstance(parameter.grad, DTensor)
                parameter.grad._local_tensor.round_()
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            if progress["step"] == steps // 2 and not again:
                manager.save(progress["step"])
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        assert isinstance(value, DTensor)
        parts: list[torch.Tensor] = [torch.empty(0)] * dist.get_world_size()
        dist.all_gather_object(parts, value._local_tensor.cpu())  # full_tensor crashes where ranks share a GPU
        digest.update(torch.cat(parts).numpy().tobytes())
    print(digest.hexdigest())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), "again" in sys.argv[4:])
