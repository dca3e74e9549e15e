"""Quantized base models: load in NF4, check what quantized layers compute, and dequantize them.

NF4 with double quantization is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), computed by
bitsandbytes: linear layers take 4.13 bits a weight; embeddings, unembedding and norms stay as they
are. Folders that are quantized already are loaded as they are, if their layers are linear.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.errors import ConfigError, ModelError

import torch

NF4 = "nf4"
"""The dtype of linear layers in 4 bits; everything else has the dtype that "auto" chooses."""
INSTALL = 'pip install "cookbook-core[quantized]"'
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest root mean square of the difference, as a share of that of the values, between a layer and
the matrix it stands for. Rounding gives 1e-6; layers that quantize their input 1e-2 and more."""
BOUND_16 = 6e-3
"""The same in 16 bits, where rounding gives 2e-3."""

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INSTALL = {"bitsandbytes": INSTALL, "torchao": "pip install torchao"}


# ---- loading -------------------------------------------------------------------------------------


def loading_options(
    saved: Any, dtype: str, device: torch.device, compute: torch.dtype
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base model that is quantized, or is to be.

    Args:
        saved: the quantization in the config of its folder, if any.
        dtype: as the user gave it.
        device: to load it onto.
        compute: dtype of its layers' products.
    Raises:
        ConfigError: bitsandbytes or torchao is missing, or the folder is quantized otherwise.
    """
    if saved is None and dtype != NF4:
        return {}
    saved = saved if isinstance(saved, dict) or saved is None else saved.to_dict()
    method = "bitsandbytes" if saved is None else method_of(saved)
    if dtype == NF4 and saved is not None and scheme_of(saved) != NF4:
        fix = "Leave dtype out, or pass the model it was quantized from."
        what = "the folder is quantized already"
        raise ConfigError("dtype", what, expected=scheme_of(saved), got=repr(dtype), fix=fix)
    if method in _INSTALL and importlib.util.find_spec(method) is None:
        where = "dtype" if dtype == NF4 else "base_model"
        raise ConfigError(where, f"needs {method}, not installed", fix=f"Run: {_INSTALL[method]}")
    options: dict[str, Any] = {"device_map": {"": device}}
    if saved is None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return options


def method_of(saved: dict[str, Any]) -> str:
    """The `quant_method` of a saved configuration; transformers leaves it out of old ones."""
    method = saved.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def scheme_of(saved: dict[str, Any]) -> str:
    """How a folder is quantized, in a word: "nf4", or the name of the library that did it."""
    if saved.get("load_in_4bit"):
        return str(saved.get("bnb_4bit_quant_type", "fp4"))
    return method_of(saved)


def prepare(model: Any, name: str, dtype: torch.dtype) -> str:
    """Set up a model that was just loaded, if it is quantized, and check it.

    Embeddings, norms and products are put in `dtype`, whatever the folder says, and bitsandbytes is
    kept from repacking weights for CPUs with AVX512-BF16: it does so in the first forward in eval
    mode, and no gradient passes a layer whose weights are packed.

    Returns:
        How it is quantized (see `scheme_of`), "" if it is not.
    Raises:
        ModelError: a layer is not linear or has another gradient, or the unembedding is quantized.
    """
    saved = getattr(model.config, "quantization_config", None)
    if saved is None:
        return ""
    for p in model.parameters():
        if not is_quantized(p):
            p.data = p.data.to(dtype)
    layers = list(quantized_layers(model))
    for layer in layers:
        if (state := getattr(layer.weight, "quant_state", None)) is not None:
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set, state.dtype = dtype, True, dtype
            # GPT-2's Conv1D layers are stored as linear ones
            layer.weight.is_transposed = layer.source_cls.__name__ == "Conv1D"
    if model.get_output_embeddings() in layers:
        raise ModelError(
            "base_model",
            "its unembedding is quantized, which is not supported",
            expected="lm_head in the dtype of the norms",
            got=name,
            fix=f'Pass the model it was quantized from, with dtype="{NF4}".',
        )
    check_layers(layers, dtype, model.device, name)
    return scheme_of(saved if isinstance(saved, dict) else saved.to_dict())


# ---- weights -------------------------------------------------------------------------------------


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter holds something other than its numbers."""
    plain = type(weight) is torch.nn.Parameter and type(weight.data) is torch.Tensor
    return not plain or weight.dtype not in _PLAIN


def quantized_layers(model: Any) -> Iterator[Any]:
    """The linear layers of a model whose weights are quantized."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and is_quantized(module.weight):
            yield module


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a parameter, in the shape they have in the model's unquantized folder.

    Of a sharded one all processes ask together.
    """
    if (gather := getattr(weight, "full_tensor", None)) is not None:
        return gather()
    if not is_quantized(weight):
        return weight
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.dequantize()
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
    )

    values = dequantize_4bit(weight.data, state)
    return values.t() if getattr(weight, "is_transposed", False) else values


def shape_of(weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of `whole(weight)`, rows and columns perhaps exchanged."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def dequantize(model: Any) -> None:
    """Replace a model's quantized layers by plain ones of the same values, in the model's dtype."""
    from transformers.pytorch_utils import Conv1D

    names = {module: name for name, module in model.named_modules()}
    for layer in list(quantized_layers(model)):
        values = whole(layer.weight).to(model.dtype).contiguous()
        if getattr(layer.weight, "is_transposed", False):
            plain: Any = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(values, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(names[layer], plain.eval())
    model.is_loaded_in_4bit = model.is_quantized = False
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model._weight_conversions = None  # transformers' own, of the quantized folder: not for saving


# ---- checking ------------------------------------------------------------------------------------


def check_layers(layers: list[Any], dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Check one layer of each kind, the smallest: linear, and its backward its transpose.

    A layer that quantizes its input too (LLM.int8, FP8 with dynamic scales) is not linear, and some
    kernels have no backward: training would continue, in silence, with a wrong gradient.

    Raises:
        ModelError: the first kind that is not.
    """
    kinds: dict[tuple[type, type], Any] = {}
    for layer in sorted(layers, key=lambda layer: layer.in_features * layer.out_features):
        kinds.setdefault((type(layer), type(layer.weight)), layer)
    bound = BOUNDS.get(dtype, BOUND_16)
    for (kind, _), layer in kinds.items():
        if problem := layer_problem(layer, dtype, device, bound):
            raise ModelError(
                "base_model",
                f"its quantized layers ({kind.__name__}) cannot be trained through",
                expected=f"outputs and gradients of a matrix, within {bound:.2%}",
                got=f"{name}, {problem}",
                fix=f'Pass the model it was quantized from, with dtype="{NF4}".',
            )


def layer_problem(layer: Any, dtype: torch.dtype, device: torch.device, bound: float) -> str:
    """What distinguishes a layer, without its bias, from its matrix and that from its transpose.

    The matrix is what the layer makes of the unit vectors, as scoring does: without a graph.

    Returns:
        The figure, or the exception's message; "" if there is no problem.
    """
    generator = torch.Generator().manual_seed(0)
    # heavy tails, below the 6.0 from which LLM.int8 makes exceptions: they show coarse inputs
    x = 0.2 * torch.randn(32, layer.in_features, generator=generator) ** 3
    x = x.clamp(-5.9, 5.9).to(device, dtype)
    v = torch.randn(32, layer.out_features, generator=generator).to(device, dtype)
    bias, layer.bias = layer.bias, None
    try:
        with torch.no_grad():
            matrix = _exact(layer(torch.eye(layer.in_features, dtype=dtype, device=device)))
        with torch.enable_grad():
            y = layer(x.requires_grad_())
        if not y.requires_grad:
            return "no gradient passes them"
        (gradient,) = torch.autograd.grad(y, x, v)
    except Exception as error:  # a kernel that does not compile raises what its compiler likes
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    finally:
        layer.bias = bias
    pairs = {"outputs": (y, _exact(x) @ matrix), "gradients": (gradient, _exact(v) @ matrix.t())}
    for what, (found, want) in pairs.items():
        ratio = float((_exact(found) - want).norm() / want.norm())
        if not ratio <= bound:
            return f"{what} {ratio:.1%} off"
    return ""


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().double()
