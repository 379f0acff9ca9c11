"""The operations of the model, each against golden data or a slow, obvious form of itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from megalodon_export.model.ema import ComplexEMA, powers_of_q
from megalodon_export.model.norm import NormState, TimestepNorm, prefix_sum
from megalodon_export.model.rotary import RotaryTable, rotate
from support.golden_data import assert_gradients, full, halves, leaves, load, plan_of, relative_error, under

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("blocked", "fft")


# ---- complex EMA -----------------------------------------------------------------------------------------------------


def run_given(module: ComplexEMA, given: dict[str, Tensor], x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and last state (B, D, N, 2) of the EMA with any p and q: every mode is a channel of its own.

    The module can only express |q| >= 1 - p, so it runs with p = 0.9; y and the state are linear in p.
    """
    p, q, gamma = given["p"][..., 0], given["q"][:, :, 0], given["gamma"]
    dim, ndim = p.shape
    share = p / 0.9
    parameters = {
        "alpha": torch.full_like(p, 0.9),
        "delta": (1 - q.square().sum(-1).sqrt()) / 0.9,
        "theta": torch.atan2(q[..., 1], q[..., 0]) / (2 * math.pi) % 1,
    }
    parameters = {name: torch.logit(t).view(-1, 1, 1) for name, t in parameters.items()}
    parameters["gamma"] = (gamma * share[..., None]).view(-1, 1, 2)
    if state is not None:
        state = (state / share[..., None]).flatten(1, 2)[:, :, None]
    x = x.repeat_interleave(ndim, dim=2)
    y, last = functional_call(module, parameters, (x, plan_of(x), state))
    return y.unflatten(-1, (dim, ndim)).sum(-1), last.view(-1, dim, ndim, 2) * share[..., None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", load("op_ema")[0]["cases"], ids=lambda case: case["prefix"])
def test_ema_kernel_bias_and_state(case: dict[str, Any], form: str) -> None:
    tensors = under(load("op_ema")[1], case["prefix"])
    double = case["dtype"] == "f64"
    tolerance, grad_tolerance = (1e-10, 1e-9) if double else (1e-5, 2e-5)
    module = ComplexEMA(case["D"] * case["N"], 1, form)  # type: ignore[arg-type]
    module = module.double() if double else module
    given = leaves({name: t for name, t in under(tensors, "in.").items() if name != "x"})
    dtype = given["p"].dtype
    impulse = torch.zeros(1, case["L"], case["D"], dtype=dtype)
    impulse[:, 0] = 1.0

    weight = run_given(module, given, impulse, None)[0][0].mT
    assert relative_error(weight, tensors["params.out.weight"]) < tolerance
    loss = (weight * tensors["params.gin.weight"]).sum()
    if case["hx"]:
        nothing = torch.zeros(case["B"], case["L"], case["D"], dtype=dtype)
        bias = run_given(module, given, nothing, given["hx"])[0].mT
        assert relative_error(bias, tensors["params.out.bias"]) < tolerance
        loss = loss + (bias * tensors["params.gin.bias"]).sum()
    loss.backward()
    assert_gradients(given, under(tensors, "params.gout."), grad_tolerance)

    given = leaves(under(tensors, "in."))
    _, last = run_given(module, given, given["x"].mT, given.get("hx"))
    assert relative_error(last, tensors["hidden.out.h"]) < tolerance
    (last * tensors["hidden.gin.h"]).sum().backward()
    del given["gamma"]  # the state does not depend on it
    assert_gradients(given, under(tensors, "hidden.gout."), grad_tolerance)


def make_cema(tensors: dict[str, Tensor], form: str) -> ComplexEMA:
    state = under(tensors, "state_dict.")
    module = ComplexEMA(*state["alpha"].shape[:2], form)  # type: ignore[arg-type]
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", ["nohx", "hx"])
@pytest.mark.parametrize("name", ["module_cema_a", "module_cema_b"])
def test_ema_module_and_gradients(name: str, start: str, form: str) -> None:
    tensors = load(name)[1]
    module = make_cema(tensors, form)
    inputs = leaves({"x": tensors["in.x"], **({"hx": tensors["in.hx"]} if start == "hx" else {})})
    x = inputs["x"].mT
    y, last = module(x, plan_of(x), inputs.get("hx"))
    golden = under(tensors, f"{start}.")
    assert relative_error(y.mT, golden["out.y"]) < 1e-5
    assert relative_error(last, golden["out.h"]) < 1e-5
    ((y.mT * golden["gin.y"]).sum() + (last * golden["gin.h"]).sum()).backward()
    assert_gradients({**inputs, **dict(module.named_parameters())}, under(golden, "gout."), 2e-5)


@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("name", ["module_cema_a", "module_cema_b"])
def test_ema_stream(name: str, form: str) -> None:
    info, tensors = load(name)
    module = make_cema(tensors, "blocked" if form == "step" else form)
    x = tensors["in.x"].mT
    state = torch.zeros(x.shape[0], *tensors["in.hx"].shape[1:])
    outputs = []
    length = info["config"]["L"]
    cuts = range(length + 1) if form == "step" else (0, length // 2, length // 2 + 1, length)
    for start, end in itertools.pairwise(cuts):
        if form == "step":
            y, state = module.step(x[:, start], state)
            y = y[:, None]
        else:
            y, state = module(x[:, start:end], plan_of(x[:, start:end]), state)
        outputs.append(y.detach())
    assert relative_error(torch.cat(outputs, dim=1).mT, tensors["stream.out.y"]) < 1e-5
    assert relative_error(state, tensors["stream.out.h"]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "bound"), [(1, 1), (31, 31), (32, 32), (33, 64), (70, 200), (300, 300)])
def test_ema_prefill_is_its_recurrence(length: int, bound: int, form: str) -> None:
    torch.manual_seed(length)
    module = ComplexEMA(5, 4, form).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x, state = torch.randn(3, length, 5).double(), torch.randn(3, 5, 4, 2).double()
    lengths = torch.tensor([length, length // 2, 0])
    x = torch.where((torch.arange(length) < lengths[:, None])[:, :, None], x, 0.0)
    with torch.no_grad():
        y, last = module(x, plan_of(x, lengths, bound=bound), state)
        for row, valid in enumerate(lengths.tolist()):
            h = state[row : row + 1]
            for t in range(valid):
                expected, h = module.step(x[row : row + 1, t], h)
                assert (y[row, t] - expected[0]).abs().max() < 1e-11
            assert (last[row] - h[0]).abs().max() < 1e-11


def test_powers_of_q_stay_exact_for_large_exponents() -> None:
    exponent, turns = torch.tensor(16_000_000), torch.tensor(0.123456789, dtype=torch.float64)
    real, imaginary = powers_of_q(torch.tensor(-1e-8), turns, exponent)
    angle = 2 * math.pi * math.fmod(16_000_000 * 0.123456789, 1.0)
    assert abs(real.item() - math.exp(-0.16) * math.cos(angle)) < 1e-6
    assert abs(imaginary.item() - math.exp(-0.16) * math.sin(angle)) < 1e-6


# ---- TimestepNorm ----------------------------------------------------------------------------------------------------


def make_norm(golden: dict[str, Tensor], case: dict[str, Any]) -> TimestepNorm:
    norm = TimestepNorm(golden["in.gamma"].shape[0], case["num_groups"], case["eps"], "megalodon")
    norm = norm.to(golden["in.gamma"].dtype)
    norm.load_state_dict({"weight": golden["in.gamma"] - 1, "bias": golden["in.beta"]})
    return norm


# A prefill is padded on the right alone; tests/model/test_compat_operations.py has padding anywhere.
NORM_CASES = [case for case in load("op_timestep_norm")[0]["cases"] if case["mask"] != "mixedmask"]


@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case["prefix"])
def test_timestep_norm(case: dict[str, Any]) -> None:
    golden = under(load("op_timestep_norm")[1], case["prefix"])
    tolerance, grad_tolerance = (1e-11, 1e-10) if case["dtype"] == "f64" else (5e-6, 3e-5)
    norm = make_norm(golden, case)
    names = ("x", "prev_mean", "prev_var")
    inputs = leaves({name: golden[f"in.{name}"] for name in names})
    x = inputs["x"]
    lengths = (~golden["in.padding_mask"]).sum(1) if "in.padding_mask" in golden else full(x)
    state = NormState(inputs["prev_mean"], inputs["prev_var"])
    y, new = norm(x, plan_of(x, lengths, golden["in.prev_count"]), state)
    assert (y - golden["out.y"]).abs().max() < tolerance * golden["out.y"].abs().max()
    assert (y[golden["out.y"] == 0] == 0).all()
    assert relative_error(new.mean, golden["out.mean"]) < tolerance
    assert relative_error(new.var, golden["out.var"]) < tolerance
    assert torch.equal(golden["in.prev_count"] + lengths, golden["out.count"])

    loss = (y * golden["gin.y"]).sum() + (new.mean * golden["gin.mean"]).sum() + (new.var * golden["gin.var"]).sum()
    loss.backward()
    expected = under(golden, "gout.")
    parameters = {"gamma": norm.weight, "beta": norm.bias}
    assert_gradients({**inputs, **parameters}, expected, grad_tolerance)


@pytest.mark.parametrize("statistics", ["megalodon", "megalodon-hf"])
def test_timestep_norm_step_is_its_prefill(statistics: str) -> None:
    torch.manual_seed(0)
    norm = TimestepNorm(12, 3, 1e-5, statistics).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(norm.weight)
    x = 3 + torch.randn(2, 150, 12).double()
    state = norm.initial_state(2, x.device)
    whole, last = norm(x, plan_of(x), state)
    for t in range(150):
        y, state = norm.step(x[:, t], torch.full((2,), t), state)
        assert (y - whole[:, t]).abs().max() < 1e-10
    assert (state.mean - last.mean).abs().max() < 1e-12
    assert (state.var - last.var).abs().max() < 1e-12


def test_timestep_norm_keeps_its_accuracy_far_from_zero() -> None:
    torch.manual_seed(0)
    x = 100 + torch.randn(1, 4096, 8)
    single, double = (TimestepNorm(8, 2, 1e-5, "megalodon").to(d) for d in (torch.float32, torch.float64))
    plan = plan_of(x)
    y = single(x, plan, single.initial_state(1, x.device))[0]
    expected = double(x.double(), plan, double.initial_state(1, x.device))[0]
    assert (y - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("length", "bound"), [(1, 1), (64, 64), (65, 65), (3, 5000), (4097, 5000), (4096, 4096)])
def test_prefix_sum(length: int, bound: int) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64)
    assert (prefix_sum(x, bound) - x.cumsum(1)).abs().max() < 1e-10


# ---- rotary positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load("op_rope")[0]["cases"], ids=lambda case: case["prefix"])
def test_rope(case: dict[str, Any]) -> None:
    golden = under(load("op_rope")[1], case["prefix"])
    order = halves(case["dim"])
    table = RotaryTable(case["dim"], case["max_positions"], case["base"])
    for chunk in (0, 1, 10**9):  # positions count inside the chunk
        positions = torch.arange(case["start"], case["max_positions"]) + chunk * case["max_positions"]
        cos, sin = (t[:, None] for t in table(positions))
        assert (torch.stack([cos, sin], dim=-1)[:, 0] - golden["freqs_cis"]).abs().max() < 1e-5
        for name in ("q", "k"):
            x = golden[f"in.{name}"][..., order]
            assert (rotate(x, cos, sin) - golden[f"out.{name}"][..., order]).abs().max() < 1e-5
            assert (rotate(x, cos, -sin) - golden[f"bwd.{name}"][..., order]).abs().max() < 1e-5
