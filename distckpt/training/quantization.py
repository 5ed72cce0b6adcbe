"""Training with the rounding of an integer model: fake quantization by torchao, with ranges kept like weights."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

try:
    from torchao.quantization.pt2e import (
        FakeQuantize,
        FakeQuantizeBase,
        MovingAverageMinMaxObserver,
        move_exported_model_to_eval,
        move_exported_model_to_train,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
except ImportError as error:
    raise ImportError("do_quantize_training needs torchao: pip install 'distckpt[quantize]'") from error

logger = logging.getLogger(__name__)

MIN_BITS, MAX_BITS = 2, 16
"""What torchao's observers and the integer types that it converts to can do, and a float32 still resolves."""

KEPT = 0.999
"""How much of a range stays when the next batch comes, as in TensorFlow."""

aten = torch.ops.aten
OPERATIONS = {
    aten.linear.default: slice(2),
    aten.conv2d.default: slice(2),
    aten.conv2d.padding: slice(2),
    aten.mm.default: slice(2),
    aten.addmm.default: slice(1, 3),
}
"""The operations of a program that are quantized, and which of their arguments are multiplied."""


def do_quantize_training(
    model: nn.Module | ExportedProgram, num_bits: int, *, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """A copy of ``model`` that trains with inputs and weights rounded to ``num_bits``; ``model`` stays as it is.

    The counterpart of TensorFlow's ``do_quantize_training_on_graphdef(input_graph, num_bits)``. Gradients pass
    straight through the rounding. An input's range is tracked: the first batch's smallest and largest value, then a
    moving average that keeps 0.999; a weight's range is that of its present values. All are buffers, so that a
    checkpoint holds them and restores them exactly, on any number of ranks. ``eval()`` freezes them; an input whose
    range is not known yet passes unrounded; a batch with an infinite value or NaN leaves the ranges alone.

    In a module the layers that are exactly ``nn.Linear`` or ``nn.Conv2d`` are covered. Those of a subclass are named
    in a warning of the log. Everything else computes as before: other layers, biases, functions such as
    ``torch.matmul`` or attention, and code that reads a layer's weight past its ``forward`` (``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer`` in eval mode). In an exported program, which becomes a module with the same names,
    every ``linear``, ``conv2d``, ``mm`` and ``addmm`` outside of nested graphs is covered, layers that read the same
    value share one range, batch norms behind convolutions are folded in, and torchao's ``convert_pt2e`` makes an
    integer model of the result. Its ``train()`` and ``eval()`` switch dropout and batch norm as far as torchao can,
    which takes about half a second.

    With torch.distributed every rank calls each covered layer equally often while it trains, because ranks agree on
    a batch's range, with one all-reduce of two numbers for each input and step. ``group`` names the ranks that run the
    same layers, such as those of one pipeline stage; None means all. Call this before ``fully_shard`` or DDP. Ranges
    stay in float32 when the model's dtype changes. A layer below activation checkpointing sees each batch twice.

    Better than the original: the ranges of inputs need not be symmetric, so no bit is lost on values that are never
    negative; weights that grow are not cut off by a range that lags behind; ranks agree. Relu6, Sigmoid and Tanh have
    tracked ranges like all others instead of constant ones.

    Raises ImportError without torchao (``distckpt[quantize]``), TypeError for anything but a module or a program,
    ValueError for ``num_bits`` outside of 2 to 16 (TensorFlow: 1 to 63), for a model that is fake-quantized already,
    sharded or without memory (``meta``), and for one in which nothing can be quantized.
    """
    bits = operator.index(num_bits)
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"num_bits is {bits}; it must be from {MIN_BITS} to {MAX_BITS}")
    plan = _Plan(_spec(bits, _Ranks(group), of_weights=False), _spec(bits, _Ranks(group), of_weights=True))
    if isinstance(model, ExportedProgram):
        return _quantized_program(model, plan)
    if isinstance(model, nn.Module):
        return _quantized_module(model, plan)
    raise TypeError(f"an nn.Module or an ExportedProgram is wanted, not {type(model).__name__}")


def do_quantize_training_on_graphdef(input_graph: nn.Module | ExportedProgram, num_bits: int) -> nn.Module:
    """TensorFlow's name for ``do_quantize_training``. What it takes is a module or an exported program, not a GraphDef."""
    return do_quantize_training(input_graph, num_bits)


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The ranks that agree on ranges. Copies of a model share it: a process group cannot be copied."""

    group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranks:
        return self

    def largest(self, values: Tensor) -> None:
        """Replace each value by the largest that any rank has."""
        if dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)


class AgreedRange(MovingAverageMinMaxObserver):  # type: ignore[misc]  # torchao has no types
    """torchao's moving average of what a tensor's smallest and largest values are, the same on all ranks.

    With ``ranks`` None nobody else is asked: all ranks have the same tensor.
    """

    def __init__(self, *, ranks: _Ranks | None, **options: Any) -> None:
        super().__init__(**options)
        self._ranks = ranks

    def forward(self, values: Tensor) -> Tensor:
        bounds = torch.full((2,), -torch.inf, device=values.device)
        if values.numel():
            low, high = torch.aminmax(values)
            # An infinity is seen by every rank, NaN might not be.
            bounds = torch.stack((-low, high)).float().nan_to_num(torch.inf, torch.inf, -torch.inf)
        if self._ranks is not None:
            self._ranks.largest(bounds)
        if torch.isfinite(bounds).all():
            super().forward(bounds * bounds.new_tensor((-1, 1)))
        return values


class TrackedFakeQuantize(FakeQuantize):  # type: ignore[misc]  # torchao has no types
    """torchao's FakeQuantize, which follows its input only in training, and whose buffers keep their shapes."""

    def forward(self, values: Tensor) -> Tensor:
        observer = self.activation_post_process
        if self.training and self.observer_enabled[0] == 1:
            observer(values.detach())
            if torch.isfinite(observer.min_val):
                scale, zero_point = self.calculate_qparams()
                self.scale.copy_(scale)
                self.zero_point.copy_(zero_point)
        rounded = torch.fake_quantize_per_tensor_affine(
            values, self.scale, self.zero_point, self.quant_min, self.quant_max
        )
        # Not an if, so that the model can be exported.
        known: Tensor = torch.isfinite(observer.min_val) & (self.fake_quant_enabled == 1)
        return torch.where(known, rounded, values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrackedFakeQuantize:
        """Moves with the model, but stays in float32 when the model does not: bfloat16 is too coarse for an average."""

        def kept(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(kept, recurse)
        return self


class FakeQuantizedLinear(nn.Linear):
    """nn.Linear whose input and weight pass through fake quantization."""

    activation_fake_quantizer: nn.Module
    weight_fake_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight_fake_quantizer(self.weight)
        return F.linear(self.activation_fake_quantizer(input), weight, self.bias)


class FakeQuantizedConv2d(nn.Conv2d):
    """nn.Conv2d whose input and weight pass through fake quantization."""

    activation_fake_quantizer: nn.Module
    weight_fake_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight_fake_quantizer(self.weight)
        result: Tensor = self._conv_forward(self.activation_fake_quantizer(input), weight, self.bias)
        return result


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FakeQuantizedLinear, nn.Conv2d: FakeQuantizedConv2d}


def _spec(bits: int, ranks: _Ranks, *, of_weights: bool) -> QuantizationSpec:
    """How one kind of tensor is quantized."""
    constructor = TrackedFakeQuantize.with_args(
        observer=AgreedRange,
        averaging_constant=1 if of_weights else 1 - KEPT,
        # Every rank has the whole weight while it computes.
        ranks=None if of_weights else ranks,
    )
    return QuantizationSpec(
        dtype=torch.int8 if bits <= 8 else torch.int16,
        observer_or_fake_quant_ctr=constructor,
        quant_min=-(1 << bits - 1),
        quant_max=(1 << bits - 1) - 1,
        qscheme=torch.per_tensor_symmetric if of_weights else torch.per_tensor_affine,
    )


class _Plan(Quantizer):  # type: ignore[misc]  # torchao has no types
    """How inputs and weights are quantized; also tells torchao where, in a program's graph."""

    def __init__(self, inputs: QuantizationSpec, weights: QuantizationSpec) -> None:
        self.inputs = inputs
        self.weights = weights

    def make(self, spec: QuantizationSpec, like: nn.Module) -> nn.Module:
        """A fake quantizer for a layer: on its device, training if it does."""
        made: nn.Module = spec.observer_or_fake_quant_ctr(
            dtype=spec.dtype, quant_min=spec.quant_min, quant_max=spec.quant_max, qscheme=spec.qscheme
        )
        return made.to(next(like.parameters()).device).train(like.training)

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            factors = node.args[OPERATIONS[node.target]] if node.target in OPERATIONS else ()
            specs = {factor: self.weights if factor.op == "get_attr" else self.inputs for factor in factors}
            if specs:
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        if not any("quantization_annotation" in node.meta for node in model.graph.nodes):
            raise ValueError("the program has no linear, conv2d, mm or addmm to quantize")


def _quantized_module(model: nn.Module, plan: _Plan) -> nn.Module:
    _check_plain(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("a model on the meta device has no values to begin with: quantize it once it has memory")
    result = copy.deepcopy(model)
    layers = [layer for layer in result.modules() if type(layer) in LAYERS]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d to quantize")
    for layer in layers:
        layer.activation_fake_quantizer = plan.make(plan.inputs, layer)
        layer.weight_fake_quantizer = plan.make(plan.weights, layer)
        layer.__class__ = LAYERS[type(layer)]  # hooks, ties and names stay as they are
    left = [
        name for name, layer in model.named_modules() if isinstance(layer, tuple(LAYERS)) and type(layer) not in LAYERS
    ]
    if left:
        logger.warning("not quantized, because they are of a subclass: %s", ", ".join(left))
    return result


def _check_plain(model: nn.Module) -> None:
    if any(isinstance(module, FakeQuantizeBase) for module in model.modules()):
        raise ValueError("the model is fake-quantized already")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the model is sharded already: quantize it first, then shard the copy")


def _quantized_program(program: ExportedProgram, plan: _Plan) -> nn.Module:
    if any("fake_quantize" in str(node.target) for node in program.graph.nodes):
        raise ValueError("the program is fake-quantized already")
    module = program.module()
    _own_tensors(module)
    prepared: nn.Module = prepare_qat_pt2e(module, plan)
    prepared.train = MethodType(_train_program, prepared)  # type: ignore[method-assign]
    prepared.eval = MethodType(_eval_program, prepared)  # type: ignore[method-assign]
    return prepared


def _own_tensors(module: nn.Module) -> None:
    """Replace every parameter and buffer, which the program shares with its module, by a copy; ties stay ties."""
    copied: dict[int, Any] = {}
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                tensors[name] = copy.deepcopy(tensor, copied)


def _train_program(self: GraphModule, mode: bool = True) -> GraphModule:
    nn.Module.train(self, mode)
    move = move_exported_model_to_train if mode else move_exported_model_to_eval
    move(self)
    return self


def _eval_program(self: GraphModule) -> GraphModule:
    return _train_program(self, False)
