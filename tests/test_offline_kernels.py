"""The offline compile command: its answer without a CUDA build of torch, and its table's cells.

The compilation itself takes minutes and a CUDA build: `python -m benchmarks.offline_kernels`.
"""

from __future__ import annotations

from benchmarks import offline_kernels

import pytest
import torch


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can compile for CUDA")
def test_without_a_cuda_build_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert offline_kernels.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert torch.__version__ in line
    assert "pip install" in line


def test_what_a_card_does_not_have_is_bold() -> None:
    fits = {"forward": 66_048, "backward": 57_344}
    assert offline_kernels.cell("sm_120", fits) == "66,048 / 57,344"
    found = {"forward": 87_000, "backward": 114_688}
    assert offline_kernels.cell("sm_120", found) == "87,000 / **114,688**"
    assert offline_kernels.cell("sm_90", found) == "87,000 / 114,688"
    failed = {"forward": "InductorError: embedding dimension must be at least 16"}
    assert "must be at least 16" in offline_kernels.cell("sm_90", failed)
