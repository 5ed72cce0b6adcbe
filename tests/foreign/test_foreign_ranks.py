"""Many ranks fill one model from files of other programs, and each reads its part alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.ranks.foreign import model
from tests.support.gang import Gang


@pytest.mark.timeout(150)
def test_ranks_fill_a_sharded_model_from_a_folder_and_read_only_what_they_hold(tmp_path: Path) -> None:
    state = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in model().state_dict().items()}
    parts = dict(list(state.items())[:3]), dict(list(state.items())[3:])
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, tmp_path / name)
    weights = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    torch.save(state, tmp_path / "pytorch_model.bin")
    with Gang(2) as gang:
        for path in (tmp_path, tmp_path / "pytorch_model.bin"):
            for told in gang.run("ranks.foreign:filled", folder=str(path), whole=str(tmp_path / "pytorch_model.bin")):
                assert told["differ"] == []
                assert told["read"] < 0.75 * told["whole"]
