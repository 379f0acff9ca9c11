"""The operations and modules of the model, each against golden data or a slow, obvious form of itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from golden_data import halves, load, relative_error, under
from torch import Tensor
from torch.func import functional_call

from megalodon_export.model import MegalodonCache, MegalodonConfig
from megalodon_export.model.attention import (
    GatedAttention,
    RotaryTable,
    attend_fresh,
    attend_prefill,
    attend_step,
    rotate,
    write_ring,
)
from megalodon_export.model.blocks import FeedForward
from megalodon_export.model.cache import LayerCache, copy_in_place
from megalodon_export.model.ema import ComplexEMA, powers_of_q
from megalodon_export.model.norm import NormState, TimestepNorm, prefix_sum

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("blocked", "fft")


def full(x: Tensor) -> Tensor:
    """The lengths of x (B, L, ...) without padding."""
    return torch.full((x.shape[0],), x.shape[1])


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def assert_gradients(inputs: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(inputs) == set(expected)
    for name, tensor in inputs.items():
        actual = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        error = (actual - expected[name].view_as(actual)).abs().max()
        assert error <= tolerance * max(expected[name].abs().max().item(), 1.0), name


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
    y, last = functional_call(module, parameters, (x, full(x), state, x.shape[1]))
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
    y, last = module(x, full(x), inputs.get("hx"), x.shape[1])
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
            y, state = module(x[:, start:end], full(x[:, start:end]), state, end - start)
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
        y, last = module(x, lengths, state, bound)
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


@pytest.mark.parametrize("case", load("op_timestep_norm")[0]["cases"], ids=lambda case: case["prefix"])
def test_timestep_norm(case: dict[str, Any]) -> None:
    golden = under(load("op_timestep_norm")[1], case["prefix"])
    tolerance, grad_tolerance = (1e-11, 1e-10) if case["dtype"] == "f64" else (5e-6, 3e-5)
    norm = make_norm(golden, case)
    names = ("x", "prev_mean", "prev_var")
    inputs = leaves({name: golden[f"in.{name}"] for name in names})
    x = inputs["x"]
    lengths = (~golden["in.padding_mask"]).sum(1) if "in.padding_mask" in golden else full(x)
    state = NormState(inputs["prev_mean"], inputs["prev_var"])
    y, new = norm(x, lengths, golden["in.prev_count"], state, x.shape[1])
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
    whole, last = norm(x, full(x), torch.zeros(2, dtype=torch.int64), state, 150)
    for t in range(150):
        y, state = norm.step(x[:, t], torch.full((2,), t), state)
        assert (y - whole[:, t]).abs().max() < 1e-10
    assert (state.mean - last.mean).abs().max() < 1e-12
    assert (state.var - last.var).abs().max() < 1e-12


def test_timestep_norm_keeps_its_accuracy_far_from_zero() -> None:
    torch.manual_seed(0)
    x = 100 + torch.randn(1, 4096, 8)
    single, double = (TimestepNorm(8, 2, 1e-5, "megalodon").to(d) for d in (torch.float32, torch.float64))
    arguments = full(x), torch.zeros(1, dtype=torch.int64)
    y = single(x, *arguments, single.initial_state(1, x.device), 4096)[0]
    expected = double(x.double(), *arguments, double.initial_state(1, x.device), 4096)[0]
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


# ---- attention -------------------------------------------------------------------------------------------------------


def attend_slowly(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """One row and head from position 0, query by query: q, k (L, dz), v (L, dv) -> (L, dv)."""
    out = []
    for t in range(q.shape[0]):
        start = t // chunk * chunk
        out.append(torch.softmax(k[start : t + 1] @ q[t], dim=0) @ v[start : t + 1])
    return torch.stack(out)


def random_heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    return tuple(torch.randn(3, 2, length, d, dtype=torch.float64) for d in (4, 4, 6))  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("bound", [0, 50])
def test_fresh_attention(chunk: int, bound: int) -> None:
    for length in (1, chunk, chunk + 1, 4 * chunk - 1, 4 * chunk):
        q, k, v = random_heads(length)
        out = attend_fresh(q, k, v, chunk, max(length, bound), 0.0)
        for row in range(3):
            for head in range(2):
                expected = attend_slowly(q[row, head], k[row, head], v[row, head], chunk)
                assert (out[row, head] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("bound", [0, 50])
def test_attention_in_pieces_of_any_length(chunk: int, bound: int) -> None:
    """Rows with pieces of different lengths, prefilled or token by token, against one slow pass over each row."""
    total = 40
    q, k, v = random_heads(total)
    config = MegalodonConfig(
        num_layers=1, model_dim=4, num_heads=2, z_dim=8, value_dim=12, chunk_size=chunk, norm_num_groups=1
    )
    cache = MegalodonCache.allocate(config, 3, torch.float64).layers[0]
    expected = torch.stack(
        [torch.stack([attend_slowly(q[b, h], k[b, h], v[b, h], chunk) for h in range(2)]) for b in range(3)]
    )
    position = torch.zeros(3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(chunk)
    while position.max() < total - 2 * chunk - 3:
        lengths = torch.randint(0, 2 * chunk + 3, (3,), generator=generator)
        length = max(int(lengths.max()), 1)
        index = (position[:, None] + torch.arange(length)).clamp(max=total - 1)[:, None, :, None].expand(-1, 2, -1, -1)
        piece = [t.gather(2, index.expand(-1, -1, -1, t.shape[3])) for t in (q, k, v)]
        limit = max(length, bound)
        out = attend_prefill(*piece, cache, position, limit, 0.0)
        write_ring(cache.key, piece[1], position, lengths, limit)
        write_ring(cache.value, piece[2], position, lengths, limit)
        for row, valid in enumerate(lengths.tolist()):
            start = int(position[row])
            assert torch.allclose(out[row, :, :valid], expected[row, :, start : start + valid], atol=1e-12)
        position = position + lengths
    rows = torch.arange(3)
    for _ in range(2):
        out = attend_step(q[rows, :, position], k[rows, :, position], v[rows, :, position], cache, position)
        assert torch.allclose(out, expected[rows, :, position], atol=1e-12)
        position = position + 1


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def golden_attention() -> tuple[GatedAttention, MegalodonConfig, Tensor]:
    info, tensors = load("module_mega_attn_a")
    sizes = info["config"]
    config = MegalodonConfig(
        num_layers=1,
        model_dim=sizes["mdim"],
        z_dim=sizes["zdim"],
        value_dim=sizes["hdim"],
        cema_ndim=sizes["ndim"],
        **{key: sizes[key] for key in ("num_heads", "chunk_size", "norm_num_groups", "norm_eps", "rope_base")},
    )
    heads, dz = config.num_heads, config.z_head_dim
    order = (torch.arange(heads)[:, None] * dz + halves(dz)).flatten()
    state = {name: t for name, t in under(tensors, "state_dict.").items() if "prior" not in name}
    for name, t in state.items():
        state[name] = t[order] if name.startswith("wz.") else t[:, order] if name in ("gamma", "beta") else t
    module = GatedAttention(config)
    module.load_state_dict(state)
    return module, config, order


def run_attention(
    module: GatedAttention, config: MegalodonConfig, x: Tensor, cache: LayerCache | None = None, start: int = 0
) -> Tensor:
    position = torch.full((x.shape[0],), start)
    table = RotaryTable(config.z_head_dim, config.chunk_size, config.rope_base)
    rotary = table(position[:, None] + torch.arange(x.shape[1]))
    if cache is not None and x.shape[1] == 1:
        out, norm, ema = module.step(x[:, 0], position, tuple(t[:, 0] for t in rotary), cache)
        out = out[:, None]
    else:
        out, norm, ema = module(x, full(x), position, rotary, cache, x.shape[1])
    if cache is not None:
        copy_in_place((cache.norm_mean, cache.norm_var, cache.ema_state), (*norm, ema))
    return out


@pytest.mark.parametrize("cached", [False, True])
def test_attention_block(golden_attention: Any, cached: bool) -> None:
    module, config, _ = golden_attention
    tensors = load("module_mega_attn_a")[1]
    for case in ("short", "onechunk", "threechunks"):
        expected = tensors[f"{case}.out"]
        x = tensors["in.x"][:, : expected.shape[1]]
        cache = MegalodonCache.allocate(config, 2, torch.float32).layers[0] if cached else None
        with torch.no_grad():
            out = run_attention(module, config, x, cache)
        assert (out - expected).abs().max() < 2e-5, case


def test_attention_block_inside(golden_attention: Any) -> None:
    module, config, order = golden_attention
    tensors = load("module_mega_attn_a")[1]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    for name in ("timenorm", "cema", "rmsnorm", "wz", "znorm", "wr", "wh1", "wh2"):
        getattr(module, name).register_forward_hook(keep(name))
    with torch.no_grad():
        run_attention(module, config, tensors["in.x"][:, :13])
    golden = under(tensors, "short.mid.")
    expected = {
        "timenorm": golden["timenorm.y"],
        "cema": golden["cema.y"].mT,
        "rmsnorm": golden["mx"],
        "wz": golden["wz"][..., order],
        "znorm": golden["znorm"][..., halves(config.z_head_dim)],
        **{name: golden[name] for name in ("wr", "wh1", "wh2")},
    }
    assert seen.keys() == expected.keys()
    for name, tensor in seen.items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name


def test_attention_block_stream(golden_attention: Any) -> None:
    module, config, _ = golden_attention
    info, tensors = load("module_mega_attn_a")
    cache = MegalodonCache.allocate(config, 2, torch.float32).layers[0]
    start, outputs = 0, []
    for length in info["cases"][0]["segments"]:
        with torch.no_grad():
            outputs.append(run_attention(module, config, tensors["in.x"][:, start : start + length], cache, start))
        start += length
        golden = under(tensors, f"stream.cache_after_{start}.")
        if not golden:
            continue
        valid = start % config.chunk_size
        key = golden["attn_k"].transpose(1, 2)[..., halves(config.z_head_dim)]
        assert valid == golden["attn_count"]
        torch.testing.assert_close(cache.key[:, :, :valid], key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.value[:, :, :valid], golden["attn_v"].transpose(1, 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.norm_mean, golden["norm_mean"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.norm_var, golden["norm_var"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.ema_state, golden["hx"], rtol=1e-4, atol=1e-5)
    assert (torch.cat(outputs, dim=1) - tensors["stream.out"]).abs().max() < 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_attention_block_gradients(golden_attention: Any, form: str) -> None:
    module, config, order = golden_attention
    module.cema.form = form
    tensors = load("module_mega_attn_a")[1]
    x = tensors["in.x"][:, : 2 * config.chunk_size].clone().requires_grad_()
    (run_attention(module, config, x) * tensors["bwd.gin"]).sum().backward()
    expected = under(tensors, "bwd.gout.")
    for name, t in expected.items():
        expected[name] = t[order] if name.startswith("wz.") else t[:, order] if name in ("gamma", "beta") else t
    assert_gradients({"x": x, **dict(module.named_parameters())}, expected, 2e-5)


@pytest.mark.parametrize("case", load("module_nffn")[0]["cases"], ids=lambda case: case["prefix"])
def test_feed_forward(case: dict[str, Any]) -> None:
    info, tensors = load("module_nffn")
    golden = under(tensors, case["prefix"])
    config = MegalodonConfig(
        **info["config"],
        norm_num_groups=1,
        swiglu=case["swiglu"],
        norm_affine=case["norm_affine"],
        rescale_nffn=case["rescale"] is not None,
    )
    module = FeedForward(config, 1)
    if case["rescale"] is not None:
        assert module.alpha is not None
        assert (module.alpha == 0.05).all()
    module.load_state_dict(under(golden, "state_dict."))
    inputs = leaves(under(golden, "in."))
    y = module(inputs["x"], inputs["residual"])
    assert (y - golden["out.y"]).abs().max() < 1e-5
    (y * golden["gin.y"]).sum().backward()
    assert_gradients({**inputs, **dict(module.named_parameters())}, under(golden, "gout."), 1e-5)
