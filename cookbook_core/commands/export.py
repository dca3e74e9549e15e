"""Export a trained adapter: as a PEFT folder, a merged model, or one ready for llama.cpp.

    cookbook export runs/dpo-1 --to peft          adapter, tokenizer, card
    cookbook export runs/dpo-1 --to merged        one model, which transformers loads without peft
    cookbook export runs/dpo-1 --to gguf-ready    merged, with the commands for llama.cpp and Ollama

Files that training does not change (tokenizer, image processor, config.json) are copied as the base
model's publisher wrote them, so that every program that reads the base model reads the export too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cookbook_core.commands import model_card
from cookbook_core.errors import CheckpointError, ConfigError, ModelError, check_choice
from cookbook_core.runs.run_folder import find_checkpoint
from cookbook_core.storage import folders
from cookbook_core.storage.paths import usable_path

FORMS = ("peft", "merged", "gguf-ready")
DTYPES = ("float32", "bfloat16", "float16")
_PROCESSOR_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt tokenizer.model spiece.model chat_template.jinja chat_template.json "
    "processor_config.json preprocessor_config.json video_preprocessor_config.json"
).split()
_NO_UNEMBEDDING_IN_GGUF = ("GemmaForCausalLM", "Gemma2ForCausalLM")
"""Architectures whose lm_head.weight llama.cpp's converter omits, taking the embedding instead."""


def export(
    run: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    checkpoint: str = "final",
    dtype: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a checkpoint in another form, as a new folder; on any error no folder is left.

    Args:
        run: a run folder, one of its checkpoints, or a LoRA folder that peft wrote.
        to: "peft", "merged" or "gguf-ready".
        out: the folder to write; None is RUN/export/FORM.
        checkpoint: of a run: "final", "best" or a step.
        dtype: of merged weights: "float32", "bfloat16" or "float16"; None is the base model's.
        base_model: folder or hub name of the base model; None is the one the checkpoint names.
    Returns:
        The new folder.
    Raises:
        ConfigError: an unknown form or dtype, no such run or checkpoint, or `out` exists.
        CheckpointError: the checkpoint is damaged, on a service, or of another base model; or the
            new folder cannot be written.
        ModelError: the base model cannot be loaded, not be merged into, or not be converted.
    """
    check_choice(ConfigError, "--to", "unknown form", to, FORMS)
    if dtype is not None:
        check_choice(ConfigError, "--dtype", "unknown dtype", dtype, DTYPES)
        if to == "peft":
            fix = "Leave it out: an adapter keeps the dtype it was trained in."
            raise ConfigError("--dtype", "not for --to peft", got=dtype, fix=fix)
    folder, home = find_checkpoint(run, checkpoint)
    target = home / "export" if home else folder.parent
    target /= to if folder.name == "final" else f"{to}-{folder.name}"
    if out is not None:
        target = usable_path("--out", out, ConfigError)
    if target.exists():
        fix = "Choose another folder with --out; export never overwrites."
        raise ConfigError(str(target), "exists", fix=fix)

    from cookbook_core.backend.local import checkpoints, merging

    adapter = checkpoints.read(folder)
    source, name, tokenizer = _base_model(base_model or checkpoints.base_model_of(folder))
    card = model_card.Card(to, name, folder.name, adapter.config.r, home and home / "config.json")
    card.auto_class = _auto_class(source)
    _check_form(card)
    if to == "peft":
        with _new_folder(target, (folder / "adapter_model.safetensors").stat().st_size) as new:
            shutil.copyfile(folder / "adapter_model.safetensors", new / "adapter_model.safetensors")
            config = _read_json(folder / "adapter_config.json")
            config |= {"base_model_name_or_path": name, "inference_mode": True}
            _write_json(new / "adapter_config.json", config)
            _copy_processor(source, new)
            card.write(new, tokenizer)
        return target

    model, card.untied = merging.merge(adapter, name, dtype)
    card.dtype = str(model.dtype).removeprefix("torch.")
    architecture = type(model).__name__
    if to == "gguf-ready" and card.untied and architecture in _NO_UNEMBEDDING_IN_GGUF:
        what = f"llama.cpp computes {architecture} without an unembedding of its own"
        fix = "Train with train_unembed=False, or export with --to merged."
        raise ModelError(str(folder), what, expected="no LoRA on lm_head", fix=fix)
    with _new_folder(target, sum(p.nbytes for p in model.parameters())) as new:
        model.generation_config = _generation_config(model, tokenizer)
        model.save_pretrained(new)
        _keep_config(source, new, card.dtype, card.untied)
        _copy_processor(source, new)
        if to == "gguf-ready":
            _inline_template(new, tokenizer)
        card.write(new, tokenizer)
    return target


def _auto_class(source: Path | str) -> str:
    """The name of the class of transformers that loads the base model."""
    from cookbook_core.backend.local.model.loading import auto_class

    from transformers import AutoConfig

    try:
        return auto_class(AutoConfig.from_pretrained(source)).__name__
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        fix = "Export with a version of transformers that knows it."
        raise ModelError(
            str(source), "not a model that can be loaded", got=first, fix=fix
        ) from error


def _check_form(card: model_card.Card) -> None:
    """Raise ModelError for a form that this base model cannot have."""
    if card.form == "gguf-ready" and card.reads_images:
        what = "llama.cpp takes a model with a vision tower as two files, which this does not write"
        fix = "Export with --to merged, and convert that with llama.cpp's own --mmproj."
        raise ModelError(card.base_model, what, expected="a model of text alone", fix=fix)


def _base_model(given: str) -> tuple[Path, str, Any]:
    """Find the base model.

    Returns:
        the folder with its config and tokenizer files; its hub name, or the absolute path of a
        local folder; its tokenizer.
    Raises:
        ModelError: it does not exist or has no tokenizer.
    """
    from cookbook_core.backend.local.model.loading import load_tokenizer, resolve_model

    from huggingface_hub import snapshot_download

    try:
        name = resolve_model(given)
        tokenizer = load_tokenizer(name)
    except ModelError as error:
        fix = "Pass the base model's hub name or present folder as --base_model."
        raise error.replace(fix=fix) from error
    if Path(name).is_dir():
        return Path(name), name, tokenizer
    wanted = ["config.json", *_PROCESSOR_FILES]
    return Path(snapshot_download(name, allow_patterns=wanted)), name, tokenizer


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `target` unless the block raises.

    Args:
        target: must not exist.
        size: bytes to be written, small files not counted.
    Raises:
        CheckpointError: the disk has too little space, or refuses.
    """
    try:
        with folders.beside(target) as temporary:
            needed, free = size + 2**24, shutil.disk_usage(target.parent).free
            if free < needed:
                expected, got = f"{needed / 1e6:,.0f} MB", f"{free / 1e6:,.0f} MB free"
                where, fix = str(target), "Free some space, or write to another disk with --out."
                raise CheckpointError(where, "not enough disk", expected=expected, got=got, fix=fix)
            yield temporary
            folders.sync(temporary)
            folders.put_in_place(temporary, target)
    except OSError as error:
        where, rule = str(target), "a writable folder"
        raise CheckpointError(where, "cannot be written", expected=rule, got=error) from error


def _copy_processor(source: Path, new: Path) -> None:
    for name in _PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, new / name)


def _inline_template(new: Path, tokenizer: Any) -> None:
    """Put the chat template into tokenizer_config.json, for readers that ignore
    chat_template.jinja."""
    if isinstance(tokenizer.chat_template, str):
        file = new / "tokenizer_config.json"
        _write_json(file, {"chat_template": tokenizer.chat_template, **_read_json(file)})


def _generation_config(model: Any, tokenizer: Any) -> Any:
    """Make a generation config with the tokens that end an answer, without sampling settings."""
    from cookbook_core.chat.rendering import stop_tokens

    from transformers import GenerationConfig

    base = model.generation_config
    ends = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    ends = list(dict.fromkeys([*stop_tokens(tokenizer), *(e for e in ends if e is not None)]))
    pads = (tokenizer.pad_token_id, base.pad_token_id, *ends)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=next((p for p in pads if p is not None), None),
    )


def _keep_config(source: Path, new: Path, dtype: str, untied: bool) -> None:
    """Replace the config.json that transformers wrote by the base model's own.

    Versions of transformers name the same value differently (rope_theta, rope_parameters); a reader
    that looks for the other name silently takes a default.
    """
    config = _read_json(source / "config.json")
    if config.get("architectures") != _read_json(new / "config.json")["architectures"]:
        return  # the language model alone was loaded out of a larger model
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config.pop("quantization_config", None)  # the merged weights are dequantized
    config |= dict.fromkeys(names, dtype) | ({"tie_word_embeddings": False} if untied else {})
    _write_json(new / "config.json", config)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
