"""Attention inside chunks, and the modules of a block, against golden data or a slow, obvious form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon_export.model import MegalodonCache, MegalodonConfig
from megalodon_export.model.attention import attend_prefill, attend_step, write_ring
from megalodon_export.model.cache import LayerCache
from megalodon_export.model.feed_forward import FeedForward
from megalodon_export.model.gated_attention import GatedAttention
from megalodon_export.model.rotary import RotaryTable
from support.golden_data import assert_gradients, halves, leaves, load, plan_of, under

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("blocked", "fft")


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
        plan = plan_of(q.transpose(1, 2), bound=bound, chunk=chunk)
        out = attend_prefill(q, k, v, plan, None, chunk)
        for row in range(3):
            for head in range(2):
                expected = attend_slowly(q[row, head], k[row, head], v[row, head], chunk)
                assert (out[row, head] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 8, 70])
@pytest.mark.parametrize("bound", [0, 50])
def test_attention_in_pieces_of_any_length(chunk: int, bound: int) -> None:
    """Rows with pieces of different lengths, prefilled or token by token, against one slow pass over each row."""
    total = max(40, 4 * chunk)
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
        plan = plan_of(piece[0].transpose(1, 2), lengths, position, bound, chunk, cached=True)
        out = attend_prefill(*piece, plan, cache, chunk)
        write_ring(cache.key, piece[1], plan)
        write_ring(cache.value, piece[2], plan)
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
        return module.step(x[:, 0], position, tuple(t[:, 0] for t in rotary), cache)[:, None]
    plan = plan_of(x, None, position, chunk=config.chunk_size, cached=cache is not None)
    out: Tensor = module(x, plan, rotary, cache)
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
