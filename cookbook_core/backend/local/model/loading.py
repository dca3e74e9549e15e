"""Load a base model, frozen, onto a device in a dtype."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.model import (
    cuda,
    fused_cuda,
    fused_layer,
    fused_norm,
    fused_swiglu,
    quantization,
    sharding,
)
from cookbook_core.backend.local.model.vision import missing_support
from cookbook_core.errors import ConfigError, ModelError, VersionError, check_choice
from cookbook_core.images import ImageReader, ModelImages
from cookbook_core.storage.bundled import BUNDLED, bundled_model
from cookbook_core.storage.hub import asking_hub
from cookbook_core.storage.paths import usable_path
from cookbook_core.types import ModelData

import torch

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass
class BaseModel:
    """A frozen Hugging Face causal LM; its tokenizer is loaded on first use.

    Attributes:
        name: as the caller gave it.
        path: the absolute path of its folder, or its hub name.
        vocab_size: rows of the embedding.
        max_context_length: positions it was built for, in tokens; None if its config has none.
        fused: by class of module, whose fused kernel its modules use on CUDA.
        quantized: how its linear layers are: "nf4", a library's name, or "".
        shards: processes over which its layers are sharded; 1: this process holds them all.
    """

    name: str
    path: str
    model: Any
    device: torch.device
    vocab_size: int
    max_context_length: int | None
    fused: dict[str, str] = field(default_factory=dict)
    quantized: str = ""
    shards: int = 1
    _tokenizer: Any = field(default=None, repr=False)
    _identity: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Adapters and Adam state are float32 whatever the base; float64 over a float64 base."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def data(self) -> ModelData:
        """Its description for clients."""
        return ModelData(
            arch=sharding.architecture(self.model),
            model_name=self.name,
            tokenizer_id=self.path,
            max_context_length=self.max_context_length,
            vocab_size=self.vocab_size,
        )

    def identity(self) -> dict[str, Any]:
        """Path, architecture, number of parameters, and a fingerprint of the weights.

        The fingerprint hashes about 64 numbers per parameter, rounded to bfloat16, so that it does
        not depend on the dtype the model is loaded in. Of a quantized model it hashes the
        dequantized numbers, and `quantized` is added. Of a sharded one all processes ask together,
        before its first forward; later calls return the same.
        """
        if self._identity is None:
            digest, count = hashlib.sha256(), 0
            for name, own in sorted(self._own_parameters()):
                p = quantization.whole(own)
                count += p.numel()
                values = p.detach().flatten()[:: max(1, p.numel() // 64)].bfloat16().contiguous()
                digest.update(f"{name}{tuple(p.shape)}".encode())
                digest.update(values.view(torch.uint8).cpu().numpy().tobytes())
            self._identity = {
                "path": self.path,
                "architecture": sharding.architecture(self.model),
                "parameters": count,
                "fingerprint": digest.hexdigest()[:32],
            }
            if self.quantized:
                self._identity["quantized"] = self.quantized
        return self._identity

    def _own_parameters(self) -> Iterator[tuple[str, Any]]:
        """The base model's parameters by the names they had before LoRA was added."""
        for name, p in self.model.named_parameters():
            if ".lora_" not in name:
                yield name.replace(".base_layer", ""), p

    def weight(self, name: str) -> torch.Tensor | None:
        """Return the parameter that had this name before LoRA was added, in its own shape.

        None if there is no such parameter. A tied parameter has two names.

        Raises:
            ModelError: it is sharded.
        """
        for own, p in self.model.named_parameters(remove_duplicate=False):
            if own.replace(".base_layer", "") == name:
                if hasattr(p, "full_tensor"):  # which all processes would have to call
                    what = f"the values of {name} are not at hand: it is sharded"
                    raise ModelError("base_model", what, fix="Leave --shard out.")
                return quantization.whole(p).detach()
        return None

    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, with the model's `images`."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
            self._tokenizer.images = self.images
        return self._tokenizer

    def image_reader(self) -> ImageReader:
        """The reader of the model's images.

        Raises:
            ModelError: the model reads no images, or its processor cannot be loaded.
        """
        return self.images.reader()

    @functools.cached_property
    def images(self) -> ModelImages:
        """The model's images."""
        return ModelImages(
            self.path,
            missing_support(self.model),
            getattr(self.model.config, "image_token_id", None),
        )


def resolve_model(name: str) -> str:
    """Resolve `name` to the absolute path of a local folder, or to a hub name.

    Args:
        name: a folder, a hub name, or a bundled model's name, "tiny" or "tiny-vl".
    Raises:
        ModelError: the path does not exist, or the folder has no config.json.
    """
    if name in BUNDLED:
        return str(bundled_model(name))
    path = usable_path("base_model", name, ModelError)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            lora = (path / "adapter_config.json").is_file()
            raise ModelError(
                "base_model",
                "not a model folder",
                expected="a folder with config.json",
                got=name,
                fix="It holds a LoRA adapter: pass it as init_from instead." if lora else "",
            )
        return str(path.resolve())  # checkpoints name it: a relative path might later be a hub's
    if looks_local or path.exists():
        raise ModelError(
            "base_model",
            "no such folder",
            expected='a folder with a Hugging Face model, a hub name ("Qwen/Qwen3-0.6B") or "tiny"',
            got=name,
            fix=f"Relative paths start at {Path.cwd()}." if not path.is_absolute() else "",
        )
    return name


def choose_device(device: str) -> torch.device:
    """Choose the device: "auto" is cuda, else mps, else cpu; any other value is torch's own name.

    Raises:
        ConfigError: torch cannot allocate on the device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        fix = str(error).splitlines()[0]
        if device.startswith("cuda") and not (torch.version.cuda or torch.version.hip):
            fix = 'This torch is built without CUDA: install another (pytorch.org), or pass "cpu".'
        raise ConfigError(
            "device",
            "not usable here",
            expected='"auto", "cuda", "mps" or "cpu"',
            got=device,
            fix=fix,
        ) from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose the dtype: "auto" is bfloat16 on cuda and float32 elsewhere.

    A GPU older than Ampere takes float32 too, with a warning: there bfloat16 is emulated.

    Raises:
        ConfigError: not "auto", "nf4" or a key of DTYPES.
    """
    if dtype == quantization.NF4:
        dtype = "auto"
    if dtype == "auto" and device.type == "cuda" and not cuda.has_bfloat16(device):
        log.warning(
            "%s has no bfloat16 of its own: the model is loaded in float32, which takes twice the "
            'memory. dtype="bfloat16" has torch emulate it, which is slower still.',
            torch.cuda.get_device_name(device),
        )
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    check_choice(ConfigError, "dtype", "unknown dtype", dtype, ("auto", quantization.NF4, *DTYPES))
    return DTYPES[dtype]


def load_base_model(
    name: str, device: str = "auto", dtype: str = "auto", shards: int = 1
) -> BaseModel:
    """Load a causal LM from a folder, the Hub, or the package ("tiny"), frozen, in eval mode.

    A model with a vision tower is loaded with it.

    On CUDA each tensor goes to the device as it is read, so host memory never holds the model; see
    `cuda.prepare` for what is set there. dtype="nf4" quantizes the linear layers as they are read;
    a folder that is quantized already is loaded as it is.

    Args:
        name: of the model.
        device: see `choose_device`.
        dtype: see `choose_dtype`.
        shards: processes of the run, all of which call this, to shard the layers over them; 1 loads
            them whole.
    Raises:
        ModelError: no such model, not a causal LM, or quantized in a way that cannot be trained, or
            of an architecture that is not sharded.
        ConfigError: the device or dtype is unknown or not usable here, or shards not supported.
        VersionError: a package is too old to shard a model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    path = resolve_model(name)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    cuda.prepare(chosen_device)
    straight = {"device_map": {"": chosen_device}} if chosen_device.type == "cuda" else {}
    try:
        with _quiet_loading(), _hub_access(path, "folder"):
            config = AutoConfig.from_pretrained(path)
            saved = getattr(config, "quantization_config", None)
            if shards > 1:
                straight = sharding.loading_options(config, dtype, chosen_device, shards)
            else:
                straight |= quantization.loading_options(saved, dtype, chosen_device, chosen_dtype)
            kind = auto_class(config)
            model: Any = kind.from_pretrained(path, dtype=chosen_dtype, **straight)
    except (ConfigError, VersionError):
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            "base_model",
            "cannot be loaded as a causal language model",
            expected='a folder with a Hugging Face model, a hub name ("Qwen/Qwen3-0.6B") or "tiny"',
            got=f"{name} ({first})",
            fix="Check the spelling, and that the Hub is reachable or the model is cached.",
        ) from error
    # eval for good: no dropout, in training either, so that policy and reference are the same
    # function and a ratio of 1 is exactly 1.
    model.eval().requires_grad_(False)
    quantized, fused = "", {}
    if shards > 1:  # (fused layers are compared with the model's own, which would gather weights)
        sharding.prepare(model, shards, name)
    else:
        model.to(chosen_device)
        quantized = quantization.prepare(model, name, chosen_dtype)
        fused = _fuse(model, chosen_device)
    text_config = model.config.get_text_config()
    if getattr(text_config, "attn_logit_softcapping", None):  # Gemma 2
        # before transformers 5.21 the default is sdpa attention, which leaves out the cap
        model.set_attn_implementation("eager")
    return BaseModel(
        name=name,
        path=path,
        model=model,
        device=chosen_device,
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        max_context_length=getattr(text_config, "max_position_embeddings", None),
        fused=fused,
        quantized=quantized,
        shards=shards,
    )


def _fuse(model: Any, device: torch.device) -> dict[str, str]:
    """Compute layers in fewer passes; by class of module, whose kernel is used on CUDA."""
    fused_norm.fuse(model)
    if device.type == "cpu":
        fused_swiglu.fuse(model)
        fused_layer.fuse(model)
    return fused_cuda.fuse(model) if device.type == "cuda" else {}


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with all the parts that its folder has."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = getattr(config, "vision_config", None) is not None
    if sees and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the progress bar of loading weights; downloads keep theirs."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _hub_access(path: str, kind: str = "") -> AbstractContextManager[object]:
    """`asking_hub` for a hub name; nothing for a local folder."""
    return nullcontext() if Path(path).is_dir() else asking_hub(path, kind)


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model folder or hub name.

    Raises:
        ModelError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        with _hub_access(path):
            tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("config.json alone gives a tokenizer of special tokens only:")
        tokenizer.images = ModelImages(path)
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        if first.rstrip().endswith(":"):  # transformers lists what it tried on the lines after
            first = "Copy tokenizer.json and tokenizer_config.json there from the original model."
        raise ModelError(
            "base_model",
            "has no tokenizer",
            expected="tokenizer files beside its weights",
            got=path,
            fix=first,
        ) from error
