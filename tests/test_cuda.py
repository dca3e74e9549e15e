"""Kernels that CUDA alone has. `tests/test_accelerator.py` checks everything else on a GPU."""

from __future__ import annotations

import pytest
import torch

from cookbook_core.backend.local.scoring import attention
from cookbook_core.backend.local.scoring.packing import lay_out
from tests.test_packing import family_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 8])
def test_compiled_flex_attention_and_its_gradient(
    window: int | None, softcap: float | None
) -> None:
    layout = lay_out([d.model_input.to_ints() for d in family_data()])
    torch.manual_seed(0)
    heads = [torch.randn(n, len(layout.tokens), 16, device="cuda") for n in (4, 2, 2)]
    results = []
    for run in (attention._by_segment, lambda *a: attention._flex(attention._compiled(), *a)):
        inputs = [x.clone().requires_grad_() for x in heads]
        out = run(*inputs, 0.3, layout, window, softcap)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for want, found in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
