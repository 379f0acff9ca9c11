"""Matrix-vector products as sums: the same numbers as the library calls that they replace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megalodon_export.model as m
from megalodon_export.exporters.gemv_rewrite import linear, pv_matmul, rewrite_gemv, scores
from megalodon_export.exporters.programs import Limits
from megalodon_export.exporters.stages import export_stages
from support.small_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = st.integers(1, 70)
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.allclose(actual.double(), expected.double(), rtol=DTYPES[actual.dtype], atol=DTYPES[actual.dtype])


@settings(deadline=None)
@given(st.sampled_from(list(DTYPES)), SIZES, SIZES, st.integers(1, 3), st.booleans())
def test_products_are_those_of_the_libraries(dtype: torch.dtype, n: int, k: int, batch: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) / max(n, k)).to(dtype)

    x, weight, bias = draw(batch, k), draw(n, k), draw(n) if biased else None
    assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    query, keys = draw(batch, 1, k), draw(batch, n, k).mT
    assert_close(scores(query, keys), torch.bmm(query, keys))
    weights, values = draw(batch, 1, n), draw(batch, n, k)
    assert_close(pv_matmul(weights, values), torch.bmm(weights, values))


@pytest.mark.parametrize(("program", "left"), [("decode_one", 0), ("decode", 8)])
def test_no_matrix_vector_product_is_left_to_a_library(program: str, left: int) -> None:
    model = make_model(torch.float32, num_layers=1)
    m.freeze_constants(model)
    libraries = {torch.ops.aten.linear.default, torch.ops.aten.bmm.default}
    before, after = [], []
    for stage in export_stages(model, program, Limits.of(model.config)).values():
        graph = stage.graph.graph
        before += [node.target for node in graph.nodes if node.target in libraries]
        rewrite_gemv(graph)
        stage.graph.recompile()
        after += [node.target for node in graph.nodes if node.target in libraries]
    assert len(before) == 10  # wz wv wr wh1 wh2, scores and pv_matmul, fc1 fc2, head
    assert after == [torch.ops.aten.linear.default] * left
