"""Fake quantization: the very formula, ranges that ranks agree on, that eval freezes and that checkpoints keep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import distckpt
from distckpt import do_quantize_training
from tests.ranks.quantizing import Small, batch, make, ranges, run_steps, trained
from tests.support.gang import Gang
from tests.support.warm import run_script

KINDS = pytest.mark.parametrize("kind", ["module", "program"])


def rounded(values: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    """An input with a range that was tracked."""
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor((high - low) / (2**bits - 1))
    zero = smallest - int(torch.round(torch.tensor(low) / scale))
    return torch.fake_quantize_per_tensor_affine(values, float(scale), zero, smallest, largest)


def rounded_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = float(weight.detach().abs().max() / ((2**bits - 1) / 2))
    return torch.fake_quantize_per_tensor_affine(weight, scale, 0, smallest, largest)


# ---- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [*range(2, 9), 12, 16])
def test_the_forward_and_the_gradients_are_those_of_the_formula(bits: int) -> None:
    torch.manual_seed(bits)
    layer = nn.Linear(6, 4)
    model = do_quantize_training(layer, bits)
    x = torch.randn(5, 6, requires_grad=True)
    low, high = x.detach().aminmax()
    weight = layer.weight.detach().clone().requires_grad_()
    expected = F.linear(rounded(x, low.item(), high.item(), bits), rounded_weight(weight, bits), layer.bias)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected.square().sum(), [x, weight])
    got = torch.autograd.grad(found.square().sum(), [x, model.weight])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, layer(x))


def test_the_first_batch_sets_a_range_and_later_ones_move_it_by_a_thousandth() -> None:
    model = do_quantize_training(nn.Conv2d(1, 1, 1), 8)
    low, high = -1.0, 3.0
    model(torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1))
    for step in range(1, 4):
        model(torch.tensor([-10.0 * step, 100.0]).reshape(2, 1, 1, 1))
        low, high = 0.999 * low - 0.001 * 10 * step, 0.999 * high + 0.1
        seen = model.activation_fake_quantizer.activation_post_process
        assert [float(seen.min_val), float(seen.max_val)] == pytest.approx([low, high], rel=1e-5)
    x = torch.linspace(-2, 4, 7).reshape(7, 1, 1, 1)
    expected = F.conv2d(rounded(x, low, high, 8), rounded_weight(model.weight, 8), model.bias)
    torch.testing.assert_close(model.eval()(x), expected)


def test_a_weights_range_is_that_of_its_present_values() -> None:
    model = do_quantize_training(nn.Linear(2, 2), 4)
    for scale in (1.0, 5.0, 0.5):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[scale, -scale], [0.25, 0.0]]))
        model(torch.ones(1, 2))
        seen = model.weight_fake_quantizer.activation_post_process
        assert [float(seen.min_val), float(seen.max_val)] == pytest.approx([-scale, scale])


def test_a_module_and_its_program_compute_the_same_in_training_and_after() -> None:
    module, program = make("module", 3), make("program", 3)
    for step in range(3):
        assert torch.equal(module(batch(step)), program(batch(step)))
    assert torch.equal(module.eval()(batch(9)), program.eval()(batch(9)))
    # What both layers read is tracked once.
    assert len(ranges(program)) == len(ranges(module)) - 2


@KINDS
def test_training_reduces_the_loss(kind: str) -> None:
    model = make(kind, seed=1, num_bits=4)
    x = batch(0) / 10
    target = torch.sin(x.flatten(1)[:, :5])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# ---- the input, and what is refused ---------------------------------------------------------------------------------


@KINDS
def test_the_input_stays_as_it_is(kind: str) -> None:
    torch.manual_seed(0)
    given: Any = Small()
    if kind == "program":
        given = torch.export.export(given, (batch(0),))
    before = {key: value.clone() for key, value in given.state_dict.items()} if kind == "program" else None
    before = before or {key: value.clone() for key, value in given.state_dict().items()}
    text = str(given)
    model = do_quantize_training(given, 8)
    run_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    after = given.state_dict if kind == "program" else given.state_dict()
    assert after.keys() == before.keys() < model.state_dict().keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert str(given) == text


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 63, 64])
def test_a_width_outside_of_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"num_bits is {bits}; it must be from 2 to 16"):
        do_quantize_training(nn.Linear(2, 2), bits)


def test_what_cannot_be_quantized_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError):
        do_quantize_training(nn.Linear(2, 2), 4.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not dict"):
        do_quantize_training({}, 8)  # type: ignore[arg-type]
    norm = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Conv2d"):
        do_quantize_training(norm, 8)
    with pytest.raises(ValueError, match="no linear, conv2d, mm or addmm"):
        do_quantize_training(torch.export.export(norm, (torch.ones(2, 3),)), 8)
    once = do_quantize_training(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match="already"):
        do_quantize_training(once, 8)
    with pytest.raises(ValueError, match="already"):
        do_quantize_training(torch.export.export(once.eval(), (torch.ones(1, 2),)), 8)


def test_layers_of_a_subclass_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"own": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    with caplog.at_level(logging.WARNING, "distckpt.training.quantization"):
        result = do_quantize_training(model, 8)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["attention.out_proj"]
    assert type(result["attention"].out_proj) is type(model["attention"].out_proj)
    assert isinstance(result["own"], nn.Linear)
    assert len(ranges(result)) == 4


def test_products_in_a_program_are_quantized_and_biases_are_not() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, torch.mm(x, self.weight), self.weight)

    model = do_quantize_training(torch.export.export(Products(), (torch.ones(2, 3),)), 5)
    x = torch.randn(2, 3)
    weight = rounded_weight(model.weight.detach(), 5)
    between = rounded(x, float(x.min()), float(x.max()), 5) @ weight
    last = rounded(between, float(between.min()), float(between.max()), 5)
    torch.testing.assert_close(model(x), last @ weight + model.bias)


# ---- training and evaluation ----------------------------------------------------------------------------------------


@KINDS
def test_eval_freezes_the_ranges_and_train_goes_on(kind: str) -> None:
    model = make(kind, 0)
    model(batch(0))
    before = ranges(model)
    model.eval()
    model(batch(1) * 100)
    assert ranges(model) == before
    model.train()
    model(batch(1) * 100)
    moved = [key for key, value in ranges(model).items() if value != before[key]]
    assert len(moved) == (4 if kind == "module" else 3)  # no weight moved, and the smallest after relu is 0


def test_inputs_without_a_range_pass_unrounded() -> None:
    torch.manual_seed(0)
    model = make("module", 0).eval()
    torch.manual_seed(0)
    assert torch.equal(model(batch(0)), Small()(batch(0)))
    assert not torch.equal(model.train()(batch(0)), model.eval()(batch(0) + 0.01))


def test_a_batch_that_is_not_finite_leaves_the_ranges_alone() -> None:
    model = do_quantize_training(nn.Linear(1, 1), 8)
    values = (["nan", 1.0], [-1.0, 1.0], ["inf", 0.0], ["-inf", 0.0], [5.0, "nan"])
    seen = model.activation_fake_quantizer.activation_post_process
    found = []
    for row in values:
        model(torch.tensor([float(value) for value in row]).reshape(2, 1))
        found.append((float(seen.min_val), float(seen.max_val)))
    assert found == [(float("inf"), float("-inf")), *[(-1.0, 1.0)] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_keeps_its_dtype_and_its_ranges_in_float32(dtype: torch.dtype) -> None:
    model = do_quantize_training(nn.Linear(3, 2), 8)
    model(torch.tensor([[0.1, 0.2, -0.7]]))
    before = ranges(model)
    model.to(dtype)
    assert ranges(model) == before
    result = model(torch.ones(1, 3, dtype=dtype))
    assert result.dtype == dtype
    assert {value.dtype for key, value in model.state_dict().items() if "_val" in key} == {torch.float32}
    assert ranges(model) != before


def test_dropout_and_batch_norm_of_a_program_follow_train_and_eval() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model = do_quantize_training(torch.export.export(layers, (batch(0),)), 8)
    model(batch(0))
    means = model.get_buffer("1.running_mean").clone()
    model.eval()
    assert torch.equal(model(batch(1)), model(batch(1)))
    assert torch.equal(model.get_buffer("1.running_mean"), means)
    model.train()
    assert not torch.equal(model(batch(1)), model(batch(1)))
    assert not torch.equal(model.get_buffer("1.running_mean"), means)


def test_torchao_makes_an_integer_model_of_a_trained_program() -> None:
    model = make("program", 0)
    run_steps(model, torch.optim.SGD(model.parameters(), lr=0.01), range(3))
    expected = model.eval()(batch(5)).detach()
    converted = convert_pt2e(model)
    assert torch.equal(converted(batch(5)), expected)
    assert torch.int8 in {value.dtype for value in converted.state_dict().values()}


def test_a_trained_module_can_be_exported() -> None:
    model = make("module", 0)
    model(batch(0))
    program = torch.export.export(model.eval(), (batch(1),))
    assert torch.equal(program.module()(batch(1)), model(batch(1)))


# ---- ranks and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.wide(2)
@pytest.mark.timeout(180)
@KINDS
def test_ranges_come_back_exactly_on_any_number_of_ranks(gang2: Gang, gang3: Gang, tmp_path: Path, kind: str) -> None:
    directory = str(tmp_path / "run")

    def on(gang: Gang, *, restore: bool) -> dict[str, Any]:
        asked = {"directory": directory, "kind": kind, "steps": 5, "restore": restore}
        results = gang.run("ranks.quantizing:trained", **asked)
        assert all(result == results[0] for result in results), "ranks see different data and agree"
        return results[0]

    saved = on(gang2, restore=False)
    assert sum("_val" in key for key in saved["middle"]) == len(saved["ranges"]) == (12 if kind == "module" else 10)
    assert saved["middle"] != saved["end"]
    again = on(gang2, restore=True)
    assert again == {**saved, "losses": saved["losses"][2:]}
    for elsewhere in (on(gang3, restore=True), trained(directory, kind, 5, restore=True)):
        assert elsewhere["middle"] == saved["middle"]
        assert elsewhere["losses"] == pytest.approx(saved["losses"][2:], rel=1e-4)
        assert elsewhere["ranges"] == pytest.approx(saved["ranges"], rel=1e-4, abs=1e-6)


@pytest.mark.timeout(120)
def test_a_group_agrees_on_what_any_of_its_ranks_saw(gang3: Gang) -> None:
    first, second, alone = gang3.run("ranks.quantizing:uneven_batches")
    # Rank 0 saw 1000 and rank 1 nothing; then rank 1 saw NaN; then both saw nothing.
    assert first == second == tracked([(-2.0, 20.0), (1000, 1000), None, None])
    assert alone == tracked([(-3.0, 30.0), (1000, 1000), (2000, 2000), (-3000, -3000)])


def tracked(batches: list[tuple[float, float] | None]) -> list[Any]:
    """The range after each batch's smallest and largest value; None leaves it."""
    found: list[tuple[float, float]] = []
    for values in batches:
        if found and values is not None:
            values = tuple(0.999 * old + 0.001 * new for old, new in zip(found[-1], values, strict=True))
        found.append(values or found[-1])
    return [pytest.approx(list(pair), rel=1e-3) for pair in found]


@pytest.mark.timeout(120)
def test_a_sharded_model_is_refused(gang2: Gang) -> None:
    assert (
        gang2.run("ranks.quantizing:quantize_what_is_sharded")
        == ["the model is sharded already: quantize it first, then shard the copy"] * 2
    )


def test_without_torchao_the_extra_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.modules['torchao'] = None; import distckpt; distckpt.do_quantize_training")
    done = run_script(script)
    assert done.returncode == 1
    assert "ImportError: do_quantize_training needs torchao: pip install 'distckpt[quantize]'" in done.stderr


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="meta"):
        do_quantize_training(model, 8)


def test_tensorflows_name_does_the_same() -> None:
    x, layer = torch.randn(5, 6), nn.Linear(6, 4)
    found = distckpt.do_quantize_training_on_graphdef(layer, 8)
    assert torch.equal(found(x), do_quantize_training(layer, 8)(x))
    with pytest.raises(ValueError, match="num_bits"):
        distckpt.do_quantize_training_on_graphdef(layer, num_bits=64)
