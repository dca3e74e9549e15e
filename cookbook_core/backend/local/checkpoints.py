"""Checkpoints: plain folders that peft opens, written whole or not at all, nothing unpickled.

adapter_config.json, adapter_model.safetensors     what peft reads
optimizer.safetensors                              Adam moments (not in sampler weights)
state.json                                         format, step, base model, user metadata
manifest.json                                      versions, base model, sizes and hashes
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cookbook_core.backend.local.model.adapters import Adapter, AdapterBank, plain_config
from cookbook_core.backend.local.model.loading import BaseModel
from cookbook_core.errors import CheckpointError
from cookbook_core.storage import manifest

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
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to start an adapter that leave the base model, which all clients share, as it is. PiSSA,
OLoRA, LoftQ and CorDA change it."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a folder: peft's configuration, tensors by peft's keys, the rest."""

    path: Path
    config: Any
    tensors: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    step: int = 0
    base: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the base model; empty without one."""


def check_name(name: str) -> str:
    """A name that is one path component and cannot leave its folder.

    Raises:
        CheckpointError: anything else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            "name",
            "not usable as a checkpoint name",
            expected="1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit",
            got=repr(name)[:80],
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
    """Save an adapter as `folder`: into a temporary neighbour, synced, then renamed.

    The same weights under the same name once more are no mistake: a run that was interrupted after
    its last save ends so.

    Raises:
        CheckpointError: the folder exists, holds something else and overwrite is False, or it
            cannot be written; in either case what was there stays.
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
            "user_metadata", "cannot be written as JSON", expected="text by name", got=error
        ) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            tensors = {k: t.cpu().contiguous() for k, t in adapter.named().items()}
            save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            if with_optimizer:
                save_file(_moments(adapter), temporary / "optimizer.safetensors")
            _write_json(temporary / "adapter_config.json", config)
            _write_json(temporary / "state.json", state)
            manifest.write(temporary, {"base_model": base.identity(), "step": adapter.step})
            if folder.exists() and not overwrite:
                if _same_files(temporary, folder):
                    return folder
                got, mend = folder.name, "Or pass overwrite=True."
                raise CheckpointError(
                    str(folder), "already exists", expected="a new name", got=got, fix=mend
                )
            sync(temporary)
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the second where the disk is full
        raise CheckpointError(
            str(folder), "cannot be written", expected="a writable folder", got=error
        ) from error
    return folder


def read(path: str | Path, *, with_optimizer: bool = False) -> Checkpoint:
    """Read a checkpoint of ours, or any folder peft wrote for a LoRA.

    Raises:
        CheckpointError: no such folder, files missing, pickled weights, not a LoRA, a kind of
            LoRA this backend does not have, or (with_optimizer) no optimizer state in it.
    """
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            str(path), "not a checkpoint", expected="a folder with adapter_config.json", got="none"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise CheckpointError(
            str(path),
            "has no safetensors weights; pickled ones are never opened",
            expected="adapter_model.safetensors",
            got=found,
        )
    held = manifest.check(folder) or {}
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise CheckpointError(
                f"{path}: peft_type", "not a LoRA", expected="LORA", got=config.peft_type
            )
        tensors = load_file(weights)
        moments, step = _read_optimizer(folder) if with_optimizer else (None, 0)
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            str(path), "cannot be read", expected="an intact LoRA folder", got=error
        ) from error
    for key, plain in _UNSUPPORTED.items():
        if getattr(config, key, plain) not in (plain, False, None):
            raise CheckpointError(
                f"{path}: {key}", "not supported", expected=plain, got=getattr(config, key)
            )
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights",
            "belongs to a changed base model",
            expected="an adapter for the base model as it is",
            got=repr(start),
            fix="Convert it with peft's path_initial_model_for_weight_conversion.",
        )
    config.init_lora_weights = True  # every value is overwritten; nothing is to be computed
    config.inference_mode = False
    config.lora_dropout = 0.0  # see load_base_model: no dropout anywhere
    return Checkpoint(folder, config, tensors, moments, step, held.get("base_model", {}))


def new_adapter(bank: AdapterBank, checkpoint: Checkpoint) -> Adapter:
    """A new adapter with the configuration and weights (and moments, if read) of a checkpoint."""
    check_base(checkpoint, bank.base)
    adapter = bank.empty(checkpoint.config)
    restore(adapter, checkpoint)
    return adapter


def check_base(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuse a checkpoint that was trained on another base model than this.

    Raises:
        CheckpointError: its manifest names other weights.
    """
    here, there = base.identity(), checkpoint.base
    if there and there.get("fingerprint") != here["fingerprint"]:

        def say(held: Mapping[str, Any]) -> str:
            kind, size = held.get("architecture"), held.get("parameters")
            weights = str(held.get("fingerprint"))[:12]
            return f"{kind} of {size} parameters, weights {weights}, at {held.get('path')}"

        where = f"{checkpoint.path}: base model"
        raise CheckpointError(
            where, "not the one it was trained on", expected=say(there), got=say(here)
        )


def restore(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into an adapter of the same layout, all or nothing.

    Accumulated gradients are dropped; the optimizer becomes the checkpoint's, or fresh when the
    checkpoint was read without it.

    Raises:
        CheckpointError: other keys, shapes, rank or alpha; the adapter is untouched.
    """
    ours, theirs = adapter.slot.config, checkpoint.config
    for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"):
        if (getattr(ours, key) or None) != (getattr(theirs, key) or None):
            raise CheckpointError(
                f"{checkpoint.path}: {key}",
                "differs from this client's adapter",
                expected=getattr(ours, key),
                got=getattr(theirs, key),
                fix="Make a client for it: service.create_training_client_from_state(path).",
            )
    wanted = {k: tuple(p.shape) for k, p in adapter.named().items()}
    found = {k: tuple(t.shape) for k, t in checkpoint.tensors.items()}
    if wanted != found:
        odd = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise CheckpointError(
            f"{checkpoint.path}: {odd[0]}",
            f"does not fit this model and adapter ({len(odd)} of {len(wanted)} tensors differ)",
            expected=wanted.get(odd[0], "no such tensor"),
            got=found.get(odd[0], "no such tensor"),
            fix="Was it made for another base model, or with other train_attn/mlp/unembed?",
        )
    if checkpoint.moments:
        kinds = ("exp_avg", "exp_avg_sq")
        wanted = {f"{kind}.{key}": shape for key, shape in wanted.items() for kind in kinds}
        found = {k: tuple(t.shape) for k, t in checkpoint.moments.items()}
        if wanted != found:
            odd = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            raise CheckpointError(
                f"{checkpoint.path}/optimizer.safetensors: {odd[0]}",
                "does not fit the weights beside it",
                expected=wanted.get(odd[0], "no such tensor"),
                got=found.get(odd[0], "no such tensor"),
            )
    for key, p in zip(adapter.slot.params, adapter.params, strict=True):
        p.data.copy_(checkpoint.tensors[key])
    adapter.grads, adapter.optimizer, adapter.step = None, None, checkpoint.step
    if checkpoint.moments:
        _restore_moments(adapter, checkpoint.moments)


def _moments(adapter: Adapter) -> dict[str, torch.Tensor]:
    if adapter.optimizer is None:
        return {}
    state = adapter.optimizer.state
    return {
        f"{name}.{key}": state[p][name].cpu().contiguous()
        for key, p in zip(adapter.slot.params, adapter.params, strict=True)
        for name in ("exp_avg", "exp_avg_sq")
        if p in state
    }


def _restore_moments(adapter: Adapter, moments: Mapping[str, torch.Tensor]) -> None:
    optimizer = adapter.ready_optimizer()
    for key, p in zip(adapter.slot.params, adapter.params, strict=True):
        optimizer.state[p] = {
            "step": torch.tensor(float(adapter.step), device=p.device),
            **{name: moments[f"{name}.{key}"].to(p) for name in ("exp_avg", "exp_avg_sq")},
        }


def _read_optimizer(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    from safetensors.torch import load_file

    if not (folder / "optimizer.safetensors").is_file():
        raise CheckpointError(
            str(folder),
            "holds no optimizer state",
            expected="optimizer.safetensors (as save_state writes)",
            got="none",
            fix="Load the weights alone: load_state / create_training_client_from_state.",
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "optimizer.safetensors"), int(state["step"])


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def _same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bytes."""
    try:
        held = manifest.check(other)
    except CheckpointError:
        return False
    return held is not None and held["files"] == (manifest.read(one) or {})["files"]


def sync(folder: Path) -> None:
    """Have the files' bytes on disk before the folder gets its name."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Have a folder's list of names on disk; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Give `temporary` its final name; a folder of that name goes only after the new one is in."""
    if not folder.exists():
        temporary.rename(folder)
        _sync_folder(folder.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def metadata_of(path: str | Path) -> dict[str, str]:
    """The user_metadata that a checkpoint was saved with; empty in a folder that peft wrote.

    Raises:
        CheckpointError: not a LoRA folder, or its state.json is damaged.
    """
    base_model_of(path)
    file = Path(path) / "state.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get("user_metadata") or {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), "damaged", expected="JSON", got=error) from error


def base_model_of(path: str | Path) -> str:
    """The base model a LoRA folder names.

    Raises:
        CheckpointError: not a LoRA folder, or it names none.
    """
    file = Path(path) / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), "not a checkpoint", expected="a folder with adapter_config.json", got=error
        ) from error
    if not name:
        raise CheckpointError(
            str(file), "names no base model", expected="base_model_name_or_path", got=None
        )
    return name
