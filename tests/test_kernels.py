"""The choice of an attention kernel: what each is made for, its proof on the device, fallbacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from cookbook_core.backend.local.scoring import attention, by_segment, flash, flex, kernels, pieces
from cookbook_core.backend.local.scoring.kernels import Kind
from cookbook_core.backend.local.scoring.packing import lay_out
from cookbook_core.tinker import ServiceClient, TrainingClient
from tests.oracles.attention import PlainFlash
from tests.oracles.logprobs import (
    adapter_of,
    assert_close,
    engine_of,
    plain_model,
    randomize,
    slow_gradient,
    take_gradient,
)
from tests.test_gradient_parity import squared
from tests.test_packing import SECONDS, family_data

import pytest
import torch

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_choices", {})
    return


def kind(dtype: torch.dtype = torch.bfloat16, width: int = 64, **more: Any) -> Kind:
    values = {"device": CARD, "heads": 4, "kv_heads": 2, "value_dim": width, **more}
    return Kind(dtype=dtype, head_dim=width, **values)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A card of some compute capability, on which every kernel proves itself but those named."""

    def make(capability: tuple[int, int], failing: dict[str, str] | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
        monkeypatch.setattr(kernels, "_has_triton", lambda: True)
        monkeypatch.setattr(kernels, "probe", lambda name, _: (failing or {}).get(name))

    return make


@pytest.mark.parametrize(
    ("chosen", "of"),
    [
        ("flash", kind()),
        ("flash", kind(torch.float16)),
        ("flash", kind(width=256)),
        ("flash", kind(width=8)),
        ("flex", kind(window=True)),
        ("flex", kind(softcap=True)),
        ("flex", kind(width=264)),
        ("flex", kind(value_dim=32)),
        ("flex", kind(torch.float32)),
        ("by_segment", kind(torch.float32, width=8)),
        ("by_segment", kind(torch.float64)),
        ("pieces", kind(torch.float32, device=CPU)),
        ("pieces", kind(torch.float64, device=CPU, window=True)),
        ("by_segment", kind(torch.float32, device=CPU, softcap=True)),
        ("by_segment", kind(torch.float32, device=CPU, value_dim=32)),
        ("by_segment", kind(torch.float32, device=torch.device("mps"))),
    ],
)
def test_the_first_kernel_made_for_a_kind(
    chosen: str, of: Kind, card: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a word, but for a card that is left to plain torch."""
    card((9, 0))
    assert kernels.kernel_for(of) == chosen
    assert kernels.choices() == {of: kernels.Choice(chosen, kernels.choices()[of].refused)}
    assert bool(caplog.records) == (of == kind(torch.float32, width=8))


def test_a_card_before_ampere_says_that_bfloat16_is_not_for_it(
    card: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    card((7, 5))
    assert kernels.kernel_for(kind()) == "by_segment"
    assert kernels.kernel_for(kind(torch.float32)) == "flex"
    assert kernels.kernel_for(kind(torch.float16)) == "flex"
    (record,) = caplog.records
    assert "Some Card (sm_75)" in record.getMessage()
    assert "bfloat16 needs compute capability 8.0, this card has 7.5" in record.getMessage()


def test_a_kernel_that_fails_is_passed_over_with_its_reason(
    card: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Float32 heads of 128 want more shared memory than an L4 has; said once, packing stays."""
    card((8, 9), {"flex": "OutOfResources: shared memory, Required: 148480, limit: 101376"})
    for _ in range(2):
        assert kernels.kernel_for(kind(torch.float32, width=128)) == "by_segment"
    (record,) = caplog.records
    assert "Required: 148480" in record.getMessage()
    assert "segment by segment" in record.getMessage()
    assert "float32, 4/2 heads of 128 on Some Card (sm_89)" in record.getMessage()
    assert kernels.choices()[kind(torch.float32, width=128)].refused == (
        "flash: bfloat16 and float16 only",
        "flex: OutOfResources: shared memory, Required: 148480, limit: 101376",
    )


def test_flash_attention_that_fails_leaves_it_to_flex(
    card: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    card((8, 0), {"flash": "TypeError: unexpected argument"})
    assert kernels.kernel_for(kind()) == "flex"
    (record,) = caplog.records
    assert 'kernel "flex" (flash: TypeError: unexpected argument)' in record.getMessage()


# ---- the proof ----------------------------------------------------------------------------------


def probe(attend: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> str | None:
    monkeypatch.setitem(kernels.KERNELS, "flash", SimpleNamespace(attend=attend))
    return kernels.probe("flash", kind(device=CPU, **more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("more", [{}, {"window": True}, {"softcap": True}, {"value_dim": 32}])
def test_a_right_kernel_is_proved_in_any_mode(
    dtype: torch.dtype, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within no_grad, within inference mode, and where the caller counts its saved tensors."""

    def refuse(_: Any) -> Any:
        raise AssertionError("the caller's hook saw a tensor of the probe")

    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, refuse)
    for mode in (torch.no_grad(), torch.inference_mode(), hooks):
        with mode:
            assert probe(by_segment.attend, monkeypatch, dtype=dtype, **more) is None


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lets siblings meet; a window one block too wide; a gradient that is half."""

    def blind(q: Any, k: Any, v: Any, scale: float, layout: Any, *more: Any) -> Any:
        whole = lay_out([layout.tokens.tolist()], share=False)
        return by_segment.attend(q, k, v, scale, whole, *more)

    def wide(q: Any, k: Any, v: Any, scale: float, layout: Any, window: int, cap: Any) -> Any:
        return by_segment.attend(q, k, v, scale, layout, window + 16, cap)

    def half(q: Any, k: Any, v: Any, *more: Any) -> Any:
        out = by_segment.attend(q, k, v, *more)
        return out.detach() + (out - out.detach()) / 2

    assert "its output is wrong" in str(probe(blind, monkeypatch))
    assert "its output is wrong" in str(probe(wide, monkeypatch, window=True))
    assert "its dq is wrong by 50%" in str(probe(half, monkeypatch))


def test_running_out_of_memory_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card is capable of does not depend on what else is on it."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe(full, monkeypatch)
    assert kernels.choices() == {}


def test_an_error_of_the_kernel_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("no kernel image\nis available")

    assert probe(broken, monkeypatch) == "NotImplementedError: no kernel image"


# ---- in a model ---------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> PlainFlash:
    """The CPU chooses as a card does, from flash attention in plain torch and no flex attention."""
    plain = PlainFlash()
    attend = functools.partial(flash.attend, kernels=plain.kernels)
    monkeypatch.setattr(kernels, "candidates", lambda _: ("flash", "flex", "by_segment"))
    monkeypatch.setattr(kernels, "unmade_for", lambda *_: None)
    monkeypatch.setitem(kernels.BOUND, torch.float64, 1e-5)
    monkeypatch.setitem(kernels.KERNELS, "flash", SimpleNamespace(attend=attend))
    monkeypatch.setitem(kernels.KERNELS, "flex", SimpleNamespace(attend=out_of_resources))
    return plain


@pytest.fixture
def make_client(
    make_service: Callable[..., ServiceClient], model_folder: Callable[..., str]
) -> Callable[[], TrainingClient]:
    """Makes a client of a Qwen3 in float64 with random A and B."""

    def make() -> TrainingClient:
        service = make_service(dtype="float64")
        client = service.create_lora_training_client(
            model_folder("qwen3"), rank=4, train_unembed=False
        ).result(SECONDS)
        randomize(client)
        return client

    return make


def out_of_resources(*_: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_a_model_trains_in_calls_of_flash_attention(
    checkpointing: str,
    as_on_a_card: PlainFlash,
    make_client: Callable[[], TrainingClient],
    model_folder: Callable[..., str],
) -> None:
    """The gradient of separate sequences; 1 + depth calls a layer each way."""
    client, data = make_client(), family_data()
    engine = engine_of(client)
    assert engine.scorer.packs
    assert {choice.name for choice in kernels.choices().values()} == {"flash"}
    engine.limits.mode = checkpointing
    as_on_a_card.calls.update(forward=0, backward=0)
    client.forward_backward_custom(data, squared).result(SECONDS)
    grads = take_gradient(client)
    layers = engine.base.model.config.num_hidden_layers
    again = 2 if checkpointing == "on" else 1
    assert as_on_a_card.calls == {"forward": 3 * layers * again, "backward": 3 * layers}
    model = plain_model(model_folder("qwen3"), adapter_of(client))
    assert_close(grads, slow_gradient(model, data, squared)[1], 1e-6)


def test_kernels_that_fail_cost_speed_and_not_packing(
    as_on_a_card: PlainFlash,
    make_client: Callable[[], TrainingClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del as_on_a_card
    monkeypatch.setitem(kernels.KERNELS, "flash", SimpleNamespace(attend=out_of_resources))
    client = make_client()
    assert engine_of(client).scorer.packs
    client.forward_backward_custom(family_data(), squared).result(SECONDS)
    assert {choice.name for choice in kernels.choices().values()} == {"by_segment"}
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "flash: RuntimeError: out of resource" in record.getMessage()
    assert "flex: RuntimeError: out of resource" in record.getMessage()


def test_flex_attention_that_would_run_unfused_is_left_at_once(
    as_on_a_card: PlainFlash, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After its proof, at the limit of graphs: the row is computed by the next kernel."""
    del as_on_a_card
    layout = lay_out([[1] * 20 + [2] * 5, [1] * 20 + [3] * 7])

    def attend(*arguments: Any) -> torch.Tensor:
        if arguments[4] is layout:
            raise flex.UnfusedError("flex attention", "too many kinds of rows")
        return by_segment.attend(*arguments)

    monkeypatch.setitem(kernels.KERNELS, "flex", SimpleNamespace(attend=attend))
    monkeypatch.setattr(kernels, "candidates", lambda _: ("flex", "by_segment"))
    q, k, v = (torch.randn(1, n, len(layout.tokens), 16) for n in (4, 2, 2))
    for _ in range(2):
        out, _ = attention.packed_attention(None, q, k, v, None, layout=layout)
        assert torch.equal(out[0], by_segment.attend(q[0], k[0], v[0], 0.25, layout))
    (record,) = caplog.records
    assert "flex: too many kinds of rows" in record.getMessage()


# ---- what every kernel shares -------------------------------------------------------------------


def test_a_window_that_cuts_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So models with windows use the kernel without where their sequences are shorter."""
    layout = lay_out([[1] * 20 + [2] * 5, [1] * 20 + [3] * 7])
    windows = []
    monkeypatch.setitem(
        kernels.KERNELS, "pieces", SimpleNamespace(attend=lambda *a: windows.append(a[5]) or a[0])
    )
    q = torch.zeros(1, 2, len(layout.tokens), 8)
    for window in (27, 26):
        attention.packed_attention(None, q, q, q, None, layout=layout, sliding_window=window)
    assert windows == [None, 26]


def test_masks_of_segments_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By_segment copies nothing to the device for a second layer."""
    layout = lay_out([d.model_input.to_ints() for d in family_data()])
    q = torch.randn(2, len(layout.tokens), 8)
    first = by_segment.attend(q, q, q, 0.3, layout, 8, 2.0)
    copies: list[Any] = []
    own = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copies.append(a) or own(x, *a, **k))
    assert torch.equal(by_segment.attend(q, q, q, 0.3, layout, 8, 2.0), first)
    assert [a for a in copies if a[0] == q.device] == []


def test_pieces_and_segments_agree_where_a_window_only_just_cuts() -> None:
    layout = lay_out([[1] * 20 + [2] * 5, [1] * 20 + [3] * 7])
    q = torch.randn(2, len(layout.tokens), 8, dtype=torch.float64)
    for window in (26, 25, 20, 1):
        found = pieces.attend(q, q, q, 0.3, layout, window)
        want = by_segment.attend(q, q, q, 0.3, layout, window)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
