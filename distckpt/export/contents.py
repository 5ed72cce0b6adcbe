"""The files of one exported module, made one after the other so that no more is in memory than must be."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distckpt.export.building import built_on_meta, filled, traced
from distckpt.export.recipes import Recipe, class_name, config_of, tied_names
from distckpt.export.weights import MAX_FILE_BYTES, Weights, files_of, index_of, without_tied, write_safetensors
from distckpt.format import names
from distckpt.reader import CheckpointReader


def contents(
    reader: CheckpointReader, recipe: Recipe, max_bytes: int = MAX_FILE_BYTES
) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Every file's name, and what writes it to a local path, to be called before the next one is asked for.

    ``max_bytes`` is the most for one safetensors file. Raises what building, filling or tracing the module raises.
    """
    how = recipe.how
    weights = Weights(reader, how.key, how.dtype)
    module = _module(recipe, weights, reader)
    tied = recipe.tied or (tied_names(module) if module is not None else {})
    kept = without_tied(weights, tied)
    if module is not None and how.example_inputs is not None:
        yield names.PROGRAM, functools.partial(torch.export.save, traced(module, how))
    files = files_of({name: weights.sizes[name] for name in kept}, max_bytes)
    for file, tensors in files.items():
        yield file, functools.partial(write_safetensors, weights, tensors, tied)
    if len(files) > 1:
        yield names.WEIGHTS_INDEX, functools.partial(_write_json, index_of(files, weights.sizes))
    config = _config(recipe, module)
    if config is not None:
        yield names.CONFIG, functools.partial(_write_json, config)


def _module(recipe: Recipe, weights: Weights, reader: CheckpointReader) -> nn.Module | None:
    """The module with its values if it is to be traced, else without, if it can be built at all without.

    ValueError if the checkpoint lacks some of them, since they were left out of it.
    """
    if recipe.how.build is None:
        return None
    if recipe.how.example_inputs is None:
        return built_on_meta(recipe.how.build)
    try:
        return filled(recipe.how.build, weights.state())
    except RuntimeError as error:
        left_out = reader.manifest.left_out
        if left_out is None or not left_out.covers(recipe.how.key):
            raise
        raise ValueError(
            f"{reader.path} does not have all of {recipe.how.key!r}: some was left out when it was saved, with {left_out}. "
            f"Save all of it, or give this Export no example_inputs: then it has the weights that there are ({error})"
        ) from error


def _config(recipe: Recipe, module: nn.Module | None) -> dict[str, Any] | None:
    given = recipe.config
    if module is None:
        return given
    if given is None:
        return config_of(module)
    if "model_type" in given and not given.get("architectures"):
        return {**given, "architectures": [class_name(module)]}
    return given


def _write_json(content: dict[str, Any], path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
