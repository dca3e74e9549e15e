"""Checkpoints: plain folders that peft opens, written whole or not at all, nothing unpickled.

adapter_config.json, adapter_model.safetensors     what peft reads
optimizer.safetensors                              Adam moments (not in sampler weights)
state.json                                         format, step, base model, user metadata
manifest.json                                      versions, base model, sizes and hashes
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.model.adapters import AdapterBank, plain_config
from cookbook_core.backend.local.model.flat_adapter import Adapter
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.errors import CheckpointError
from cookbook_core.storage import manifest
from cookbook_core.storage.folders import beside, put_in_place, sync

import torch

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_UNSUPPORTED = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
}
_MERGE = "Merge it with peft's merge_and_unload() and train on the merged model."
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the base model, which all clients share. PiSSA,
OLoRA, LoftQ and CorDA change it."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a folder.

    Attributes:
        config: a peft.LoraConfig.
        tensors: those of LoRA, by the key under which peft saves them.
        base_tensors: the others, by the same keys: base weights that peft saves beside LoRA on an
            embedding or unembedding. `check_base` compares them with the base model.
        moments: Adam's, by "exp_avg.KEY" and "exp_avg_sq.KEY"; None if not read.
        step: optimizer steps taken; 0 if the moments were not read.
        base: the manifest's description of the base model; empty without a manifest.
    """

    path: Path
    config: Any
    tensors: dict[str, torch.Tensor] = field(repr=False)
    base_tensors: dict[str, torch.Tensor] = field(repr=False)
    moments: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    step: int = 0
    base: Mapping[str, Any] = field(default_factory=dict)


def check_name(name: str) -> str:
    """Check, and return, a checkpoint's name: one path component that cannot leave its folder.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            "name",
            "not usable as a checkpoint name",
            expected="1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit",
            got=repr(name)[:80],
            fix='Use a name such as "step-100".',
        )
    return name


def write(
    folder: Path,
    adapter: Adapter,
    *,
    base: BaseModel,
    with_optimizer: bool,
    overwrite: bool,
    user_metadata: Mapping[str, str] | None = None,
) -> Path:
    """Save an adapter as `folder`, whole or not at all.

    A folder that already holds the same bytes is accepted: a run that was interrupted after its
    last save writes that checkpoint again when it is resumed.

    Raises:
        CheckpointError: the folder exists with other contents and overwrite is False; the user
            metadata is not JSON; or the disk refuses. An existing folder is then unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = {**plain_config(adapter.slot.config), "inference_mode": True}
    config["base_model_name_or_path"] = base.path
    state = {
        "format": FORMAT,
        "step": adapter.step,
        "base_model": base.path,
        "user_metadata": dict(user_metadata or {}),
    }
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "user_metadata",
            "cannot be written as JSON",
            expected="a dict of str",
            got=error,
            fix="Convert values with str().",
        ) from error
    try:
        with beside(folder) as temporary:
            tensors = _named(adapter, adapter.flat.detach())
            save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            if with_optimizer:
                save_file(_moments(adapter), temporary / "optimizer.safetensors")
            _write_json(temporary / "adapter_config.json", config)
            _write_json(temporary / "state.json", state)
            manifest.write(temporary, {"base_model": base.identity(), "step": adapter.step})
            if folder.exists() and not overwrite:
                if _same_files(temporary, folder):
                    return folder
                fix = "Choose another name, or pass overwrite=True."
                raise CheckpointError(str(folder), "already exists", fix=fix)
            sync(temporary)
            put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:  # SafetensorError: where the disk is full
        raise CheckpointError(
            str(folder),
            "cannot be written",
            expected="a writable folder",
            got=error,
            fix="Free disk space, or choose another folder.",
        ) from error
    return folder


def read(path: str | Path, *, with_optimizer: bool = False) -> Checkpoint:
    """Read a checkpoint of this package, or a LoRA folder that peft wrote.

    Raises:
        CheckpointError: the folder or a file in it is missing or damaged; its weights are pickled;
            it is not a LoRA, or one of a kind that is not supported; or (with_optimizer) it has no
            optimizer state.
    """
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise _not_a_checkpoint(path, _listing(folder))
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            str(path),
            "has no safetensors weights; pickled ones are never opened",
            expected="adapter_model.safetensors",
            got=_listing(folder),
            fix="Open it with peft and save it again: save_pretrained() writes safetensors.",
        )
    about = manifest.check(folder) or {}
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        tensors = load_file(weights)
        moments, step = _read_optimizer(folder) if with_optimizer else (None, 0)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            str(path),
            "cannot be read",
            expected="an intact LoRA folder",
            got=error,
            fix="Copy the folder again, or use another checkpoint.",
        ) from error
    _check_kind(path, config)
    config.init_lora_weights = True  # `restore` overwrites every value: no costly start is needed
    config.inference_mode = False
    config.lora_dropout = 0.0  # see load_base_model: no dropout anywhere
    lora = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    others = {key: tensor for key, tensor in tensors.items() if key not in lora}
    return Checkpoint(folder, config, lora, others, moments, step, about.get("base_model", {}))


def base_model_of(path: str | Path) -> str:
    """Read which base model a LoRA folder names.

    Raises:
        CheckpointError: not a LoRA folder, or it names none.
    """
    file = Path(path) / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise _not_a_checkpoint(path, error) from error
    if not name:
        fix = "Pass base_model."
        raise CheckpointError(str(file), "has no base_model_name_or_path", fix=fix)
    return name


def _not_a_checkpoint(path: str | Path, got: object) -> CheckpointError:
    expected = "a folder with adapter_config.json"
    fix = 'Give the folder that a recipe prints as "adapter:", or one that peft saved.'
    return CheckpointError(str(path), "not a checkpoint", expected=expected, got=got, fix=fix)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())) or "an empty folder"


def _check_kind(path: str | Path, config: Any) -> None:
    """Raise CheckpointError unless `config` is a plain LoRA beside an unchanged base model."""
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise CheckpointError(
            f"{path}: peft_type",
            "not a LoRA",
            expected="LORA",
            got=config.peft_type,
            fix="Merge it into the base model with peft and pass the result.",
        )
    for key, plain in _UNSUPPORTED.items():
        if getattr(config, key, plain) not in (plain, False, None):
            raise CheckpointError(
                f"{path}: {key}",
                "not supported",
                expected=plain,
                got=getattr(config, key),
                fix=_MERGE,
            )
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights",
            "the adapter belongs to a changed base model",
            expected="an adapter for the published base model",
            got=repr(start),
            fix="Save it with save_pretrained(path_initial_model_for_weight_conversion=...).",
        )


def new_adapter(bank: AdapterBank, checkpoint: Checkpoint) -> Adapter:
    """Make an adapter with the configuration and weights (and moments, if read) of a checkpoint.

    Raises:
        CheckpointError: it was trained on another base model than the bank's, or its LoRA on the
            embedding is tied to that on the unembedding.
        ModelError: peft cannot add its layers to the bank's base model.
    """
    check_base(checkpoint, bank.base)
    on_embedding = any(".lora_embedding_" in key for key in checkpoint.tensors)
    if on_embedding and getattr(checkpoint.config, "ensure_weight_tying", False):
        where = f"{checkpoint.path}: ensure_weight_tying"
        raise CheckpointError(where, "not supported with LoRA on an embedding", fix=_MERGE)
    adapter = bank.empty(checkpoint.config)
    restore(adapter, checkpoint)
    return adapter


def check_base(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Check that a checkpoint was trained on this base model.

    Raises:
        CheckpointError: the manifest names other weights, or base weights saved in the folder
            differ from the base model's.
    """
    current, saved = base.identity(), checkpoint.base
    if saved and saved.get("fingerprint") != current["fingerprint"]:
        fix = "Pass the model it was trained on as base_model."
        dtypes = {None: "auto", "nf4": "nf4"}
        trained = saved.get("quantized")
        if trained != current.get("quantized") and trained in dtypes:
            fix += f' It was trained with dtype="{dtypes[trained]}".'
        raise CheckpointError(
            f"{checkpoint.path}: base model",
            "not the one it was trained on",
            expected=_described(saved),
            got=_described(current),
            fix=fix,
        )
    for key, weight in checkpoint.base_tensors.items():
        own = base.weight(key.removeprefix("base_model.model.").replace(".base_layer", ""))
        where = f"{checkpoint.path}: {key}"
        if own is None:
            what = f"neither LoRA nor a weight of {current['architecture']}"
            raise CheckpointError(where, what, fix=_MERGE)
        if got := _difference(weight, own):
            raise CheckpointError(
                where,
                "differs from the base model's weight",
                expected=f"the values of {base.path}",
                got=got,
                fix=f"Pass the model it was trained on as base_model=. If it was trained: {_MERGE}",
            )


def _described(base: Mapping[str, Any]) -> str:
    """A base model as its manifest identifies it, in words."""
    kind, count = base.get("architecture"), base.get("parameters")
    weights = str(base.get("fingerprint"))[:12]
    quantized = f" in {base['quantized']}" if base.get("quantized") else ""
    return f"{kind} of {count} parameters, weights {weights}{quantized}, at {base.get('path')}"


def _difference(saved: torch.Tensor, own: torch.Tensor) -> str:
    """How a saved weight differs from the model's; "" if only by rounding to one of the dtypes."""
    if saved.shape != own.shape:
        return f"shape {tuple(saved.shape)} instead of {tuple(own.shape)}"
    own = own.cpu()
    count = int(((saved != own.to(saved.dtype)) & (saved.to(own.dtype) != own)).sum())
    return f"{count} of {saved.numel()} numbers different" if count else ""


def restore(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into an adapter of the same layout, all or nothing.

    The accumulated gradient is dropped; the optimizer becomes the checkpoint's, or a new one if the
    checkpoint was read without it.

    Raises:
        CheckpointError: other rank, alpha, keys or shapes; the adapter is unchanged.
    """
    ours, theirs = adapter.slot.config, checkpoint.config
    make = "Make a client for it: service.create_training_client_from_state(path)."
    for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"):
        if (getattr(ours, key) or None) != (getattr(theirs, key) or None):
            raise CheckpointError(
                f"{checkpoint.path}: {key}",
                "differs from this client's adapter",
                expected=getattr(ours, key),
                got=getattr(theirs, key),
                fix=make,
            )
    same_layers = plain_config(ours)["target_modules"] == plain_config(theirs)["target_modules"]
    fix = "Pass the model it was trained on as base_model." if same_layers else make
    shapes = {key: p.shape for key, p in adapter.named().items()}
    _check_shapes(checkpoint.path, "this model and adapter", checkpoint.tensors, shapes, fix)
    if checkpoint.moments:
        file, kinds = checkpoint.path / "optimizer.safetensors", ("exp_avg", "exp_avg_sq")
        shapes = {f"{kind}.{key}": shape for key, shape in shapes.items() for kind in kinds}
        fix = "Load the weights alone: load_state() or create_training_client_from_state()."
        _check_shapes(file, "the weights beside it", checkpoint.moments, shapes, fix)
    adapter.flat.data.copy_(_flat(adapter, checkpoint.tensors))
    adapter.grads, adapter.optimizer, adapter.step = None, None, checkpoint.step
    if checkpoint.moments:
        _restore_moments(adapter, checkpoint.moments)


def _check_shapes(
    path: Path,
    target: str,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    fix: str,
) -> None:
    """Raise CheckpointError for the first mismatched key unless `tensors` have exactly `shapes`."""
    saved = {key: tensor.shape for key, tensor in tensors.items()}
    differing = sorted(k for k in shapes.keys() | saved.keys() if shapes.get(k) != saved.get(k))
    if differing:
        key = differing[0]
        expected, got = (str(tuple(of.get(key, ())) or "no tensor") for of in (shapes, saved))
        what = f"does not fit {target} ({len(differing)} of {len(shapes)} tensors differ)"
        raise CheckpointError(f"{path}: {key}", what, expected=expected, got=got, fix=fix)


def _named(adapter: Adapter, flat: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors on the CPU by prefix and peft's key, from a flat one in the adapter's layout."""
    views = adapter.slot.views(flat.cpu())
    return {f"{prefix}{key}": view for key, view in zip(adapter.slot.params, views, strict=True)}


def _flat(adapter: Adapter, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """The reverse of `_named`, in the adapter's dtype on its device; other keys are ignored."""
    flat = torch.zeros_like(adapter.flat, device="cpu")
    for key, view in _named(adapter, flat, prefix).items():
        view.copy_(tensors[key])
    return flat.to(adapter.flat.device)


def _moments(adapter: Adapter) -> dict[str, torch.Tensor]:
    state = adapter.optimizer.state.get(adapter.flat) if adapter.optimizer else None
    if not state:
        return {}
    return {
        key: tensor
        for name in ("exp_avg", "exp_avg_sq")
        for key, tensor in _named(adapter, state[name], f"{name}.").items()
    }


def _restore_moments(adapter: Adapter, moments: Mapping[str, torch.Tensor]) -> None:
    optimizer = adapter.ready_optimizer()
    fused = optimizer.defaults["fused"]  # reads its step on the device; the others on the CPU
    optimizer.state[adapter.flat] = {
        "step": torch.tensor(float(adapter.step), device=adapter.flat.device if fused else "cpu"),
        **{name: _flat(adapter, moments, f"{name}.") for name in ("exp_avg", "exp_avg_sq")},
    }


def _read_optimizer(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    from safetensors.torch import load_file

    if not (folder / "optimizer.safetensors").is_file():
        raise CheckpointError(
            str(folder),
            "holds no optimizer state",
            expected="optimizer.safetensors, which save_state() writes",
            fix="Load the weights alone: load_state() or create_training_client_from_state().",
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "optimizer.safetensors"), int(state["step"])


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")  # same bytes on every system


def _same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bytes."""
    try:
        about = manifest.check(other)
    except CheckpointError:
        return False
    return about is not None and about["files"] == (manifest.read(one) or {})["files"]


def metadata_of(folder: Path) -> dict[str, str]:
    """The user_metadata of a checkpoint; empty for a LoRA folder that peft wrote.

    Raises:
        CheckpointError: state.json is damaged.
    """
    file = folder / "state.json"
    if not file.is_file():
        return {}
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))["user_metadata"]
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "The file is damaged: use another checkpoint."
        raise CheckpointError(str(file), "cannot be read", got=repr(error), fix=fix) from error
