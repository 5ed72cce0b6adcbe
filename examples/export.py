"""Train a little, and deploy while training goes on: every checkpoint is also exported, by a process of its own.

    python examples/export.py --directory /tmp/run

What it serves comes from the export alone: a program that torch.export loads, and weights that safetensors loads.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file
from torch import nn

import distckpt


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    example = (torch.randn(2, 8),)
    batch = torch.export.Dim("batch")
    regressor = distckpt.Export(make_model, "model", example, dynamic_shapes=({0: batch},), config={"inputs": 8})
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
    with distckpt.ExportCheckpointManager(
        checkpoint, arguments.directory, max_to_keep=2, modules_to_export={"regressor": regressor}
    ) as manager:
        manager.restore_or_initialize()
        for step in range(1, arguments.steps + 1):
            x = torch.randn(64, 8)
            loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                manager.save(step)  # returns at once; the export is made later, elsewhere
        # Leaving the block waits for both: what was saved is committed and exported.

    path = distckpt.latest_export(arguments.directory)
    program = torch.export.load(f"{path}/regressor/program.pt2").module()
    x = torch.randn(5, 8)
    print(f"serving {path}")
    print(f"the program and the model differ by {(program(x) - model(x)).abs().max():.1e}")
    print("weights:", ", ".join(sorted(load_file(f"{path}/regressor/model.safetensors"))))


if __name__ == "__main__":
    main()
