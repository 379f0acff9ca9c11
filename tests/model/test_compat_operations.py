"""The original's seven operations as functions: its own numbers, forward and backward, and gradcheck."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon_export.model.compat import ops
from support.golden_data import load, relative_error, under

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DOUBLE = torch.float64
Case = dict[str, Any]


def cases(name: str) -> Any:
    """Every case of a golden file, on every device."""
    return lambda test: pytest.mark.parametrize("device", DEVICES)(
        pytest.mark.parametrize("case", load(name)[0]["cases"], ids=lambda case: case["prefix"])(test)
    )


class Golden:
    """One case of a golden file on a device: complex tensors as such, inputs as leaves."""

    def __init__(self, name: str, case: Case, device: str, *complex_names: str) -> None:
        self.complex_names = complex_names
        self.tensors = {n: t.to(device) for n, t in under(load(name)[1], case["prefix"]).items()}
        inputs = under(self.tensors, "in.")
        self.inputs = {name: self._typed(name, t).clone() for name, t in inputs.items()}
        for tensor in self.inputs.values():
            tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
        self.tolerance, self.grad_tolerance = (1e-10, 1e-9) if case["dtype"] == "f64" else (1e-5, 3e-5)

    def __getitem__(self, name: str) -> Tensor:
        """An output or cotangent."""
        return self._typed(name.split(".")[-1], self.tensors[name])

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        return torch.view_as_complex(tensor) if name in self.complex_names else tensor

    def close(self, actual: Tensor, name: str) -> None:
        """An output is the golden one."""
        assert actual.shape == self[name].shape
        assert relative_error(actual, self[name]) < self.tolerance, name

    def gradients(self, loss: Tensor, *prefixes: str) -> None:
        """The gradients of a loss at the inputs are the golden ones, those that the file has."""
        expected = {n: t for prefix in prefixes for n, t in under(self.tensors, prefix).items()}
        assert expected
        found = torch.autograd.grad(loss, [self.inputs[name] for name in expected])
        for name, gradient in zip(expected, found, strict=True):
            golden = self._typed(name, expected[name])
            error = (gradient - golden).abs().max() / golden.abs().max().clamp(min=1.0)
            assert error < self.grad_tolerance, name


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The loss whose cotangent at a is b, complex or not."""
    return (a * b.conj()).real.sum() if a.is_complex() else (a * b).sum()


# ---- against the original --------------------------------------------------------------------------------------------


@cases("op_ema")
def test_ema_parameters(case: Case, device: str) -> None:
    golden = Golden("op_ema", case, device, "q", "gamma", "hx", "h")
    p, q, gamma, hx = (golden.inputs.get(name) for name in ("p", "q", "gamma", "hx"))
    weight, bias = ops.ema_parameters(p, q, gamma, hx, case["L"])
    golden.close(weight, "params.out.weight")
    loss = dot(weight, golden["params.gin.weight"])
    assert (bias is None) == (not case["hx"])
    if bias is not None:
        golden.close(bias, "params.out.bias")
        loss = loss + dot(bias, golden["params.gin.bias"])
    golden.gradients(loss, "params.gout.")


@cases("op_ema")
def test_ema_hidden(case: Case, device: str) -> None:
    golden = Golden("op_ema", case, device, "q", "gamma", "hx", "h")
    h = ops.ema_hidden(golden.inputs["x"], golden.inputs["p"], golden.inputs["q"], golden.inputs.get("hx"))
    golden.close(h, "hidden.out.h")
    golden.gradients(dot(h, golden["hidden.gin.h"]), "hidden.gout.")


@cases("op_fftconv")
def test_fftconv(case: Case, device: str) -> None:
    golden = Golden("op_fftconv", case, device)
    y = ops.fftconv(golden.inputs["x"], golden.inputs["k"])
    golden.close(y, "out.y")
    golden.gradients(dot(y, golden["gin.y"]), "gout.")


@cases("op_sequence_norm")
def test_sequence_norm(case: Case, device: str) -> None:
    golden = Golden("op_sequence_norm", case, device)
    mask = golden.inputs.get("padding_mask")
    x, gamma, beta = (golden.inputs[name] for name in ("x", "gamma", "beta"))
    y, count, mean, rstd = ops.sequence_norm(x, gamma, beta, mask, case["num_groups"], case["eps"], case["length_last"])
    for actual, name in ((y, "out.y"), (mean, "out.mean"), (rstd, "out.rstd")):
        golden.close(actual, name)
    assert torch.equal(count, golden["out.count"])
    assert mask is None or not (y.mT if case["length_last"] else y)[mask].any()
    golden.gradients(dot(y, golden["gin.y"]), "gout.")


@cases("op_timestep_norm")
def test_timestep_norm(case: Case, device: str) -> None:
    golden = Golden("op_timestep_norm", case, device)
    groups = None if case["op"] == "timestep_norm" else case["num_groups"]
    x, *state = (golden.inputs[name] for name in ("x", "prev_count", "prev_mean", "prev_var"))
    gamma, beta, mask = (golden.inputs.get(name) for name in ("gamma", "beta", "padding_mask"))
    y, count, mean, var = ops.timestep_norm(x, *state, gamma, beta, mask, groups, case["eps"])
    for actual, name in ((y, "out.y"), (mean, "out.mean"), (var, "out.var")):
        golden.close(actual, name)
    assert torch.equal(count, golden["out.count"])
    assert mask is None or not y[mask].any()
    loss = dot(y, golden["gin.y"]) + dot(mean, golden["gin.mean"]) + dot(var, golden["gin.var"])
    golden.gradients(loss, "gout.", "gref.")


def test_a_prior_counts_as_steps_seen() -> None:
    """With prior_count n the original starts every stream as if it had seen n steps of the prior's statistics."""
    torch.manual_seed(0)
    seen, x, one = torch.randn(2, 5, 6, dtype=DOUBLE), torch.randn(2, 7, 6, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    mean, var = seen.mean(1), seen.var(1, correction=0)
    y, count, *_ = ops.timestep_norm(x, torch.full((2,), 5), mean, var, one, 0 * one)
    whole = ops.timestep_norm(torch.cat([seen, x], 1), torch.zeros(2).long(), mean, var, one, 0 * one)
    assert torch.allclose(y, whole[0][:, 5:], atol=1e-12)
    assert torch.equal(count, whole[1])


# ---- attention, which the original has as CUDA kernels alone ---------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = DOUBLE, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def obvious_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Query by query, over the keys up to its own, counted from the end."""
    rows = []
    for i in range(q.shape[1]):
        n = k.shape[1] - q.shape[1] + i + 1 if causal else k.shape[1]
        scores = torch.einsum("bhd,bshd->bhs", q[:, i], k[:, :n]) * scale
        rows.append(torch.einsum("bhs,bshd->bhd", scores.exp() / scores.exp().sum(-1, keepdim=True), v[:, :n]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (3, 8)])
def test_attention(queries: int, keys: int, causal: bool, dtype: torch.dtype, device: str) -> None:
    shapes = ((2, queries, 3, 4), (2, keys, 3, 4), (2, keys, 3, 6))
    inputs = [random(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    outputs = [
        ops.attention(*inputs, 0.7, use_causal_mask=causal),
        obvious_attention(*inputs, 0.7, causal),
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(*outputs, atol=tolerance)
    ours, obvious = (torch.autograd.grad(out.square().sum(), inputs) for out in outputs)
    assert all(torch.allclose(a, b, atol=20 * tolerance) for a, b in zip(ours, obvious, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_drop_key(device: str) -> None:
    """Keys are dropped before the softmax: what is left sums to 1, or to 0 where nothing is left, in a fair share."""
    torch.manual_seed(0)
    x = random(64, 16, 24, device=device).requires_grad_()
    y = ops.attention_softmax(x, dropout=0.3)
    visible = torch.ones(16, 24, dtype=torch.bool, device=device).tril(8)
    kept = (y > 0) & visible
    assert not y[~visible.expand_as(y)].any()
    assert abs((kept.sum() / visible.expand_as(y).sum()).item() - 0.7) < 0.01
    expected = torch.softmax(torch.where(kept, x, -math.inf), -1)
    assert torch.allclose(y, expected, atol=1e-12)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert not gradient[~kept].any()
    assert not ops.attention_softmax(x, dropout=0.999999)[:, 0].any()
    assert torch.equal(ops.attention_softmax(x, 0.5, training=False), ops.attention_softmax(x))


def test_queries_before_every_key_get_nothing() -> None:
    y = ops.attention_softmax(random(4, 2))
    assert not y[:2].any()
    assert torch.allclose(y[2:].sum(-1), torch.ones(2, dtype=DOUBLE))


# ---- gradcheck -------------------------------------------------------------------------------------------------------


def floating(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs without the counts."""
    return tuple(t for t in outputs if t.is_floating_point())


def complex_random(*shape: int) -> Tensor:
    return torch.view_as_complex(random(*shape, 2)) * 0.5


MASK = torch.tensor([[True, False, False, True, False], [False] * 5])
P, Q = torch.sigmoid(random(2, 3, 1)), complex_random(2, 3, 1)
NORM = (random(2, 5, 4), random(4), random(4))
STATE = (random(2, 2), random(2, 2).square() + 0.5)
GRADCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention": (ops.attention, (random(1, 3, 2, 2), random(1, 4, 2, 2), random(1, 4, 2, 3), 0.8)),
    "attention without mask": (
        lambda *t: ops.attention(*t, use_causal_mask=False),
        (random(1, 3, 1, 2), random(1, 2, 1, 2), random(1, 2, 1, 3)),
    ),
    "attention softmax": (ops.attention_softmax, (random(2, 3, 4),)),
    "ema parameters": (ops.ema_parameters, (P, Q, complex_random(2, 3), complex_random(2, 2, 3), 35)),
    "ema hidden": (ops.ema_hidden, (random(2, 2, 35), P, Q, complex_random(2, 2, 3))),
    "fftconv": (ops.fftconv, (random(2, 3, 7), random(3, 7))),
    "sequence norm": (lambda *t: floating(ops.sequence_norm(*t, MASK)), NORM),
    "sequence norm, groups": (lambda *t: floating(ops.sequence_norm(*t, MASK, 2)), NORM),
    "sequence norm, length last": (lambda x, *t: floating(ops.sequence_norm(x.mT, *t, length_last=True)), NORM),
    "timestep norm": (
        lambda x, g, b, m, v: floating(ops.timestep_norm(x, torch.tensor([0, 3]), m, v, g, b, MASK, 2)),
        (*NORM, *STATE),
    ),
    "timestep norm, ungrouped": (
        lambda x, g, b, m, v: floating(ops.timestep_norm(x, torch.tensor([2, 3]), m, v, g, b, MASK)),
        (*NORM, random(2, 4), random(2, 4).square() + 0.5),
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name: str) -> None:
    function, arguments = GRADCHECKS[name]
    inputs = tuple(a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, k = random(1, 2, 600).to(dtype), random(2, 600).float()
    y = ops.fftconv(x, k)
    assert y.dtype == dtype
    assert torch.equal(y, ops.fftconv(x.float(), k).to(dtype))
    one = torch.ones(2, dtype=dtype)
    state = (torch.zeros(1).long(), torch.zeros(1, 2), torch.ones(1, 2))
    y, _, mean, var = ops.timestep_norm(x.mT, *state, one, 0 * one)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
