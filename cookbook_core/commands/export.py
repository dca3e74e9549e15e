"""Take a trained adapter elsewhere: a PEFT folder, a merged model, or one ready for llama.cpp.

    cookbook export runs/dpo-1 --to peft          adapter, tokenizer, card
    cookbook export runs/dpo-1 --to merged        one model, which transformers loads without peft
    cookbook export runs/dpo-1 --to gguf-ready    that, with the commands for llama.cpp and Ollama

What training leaves alone (tokenizer, config.json) is copied as the base model's publisher wrote
it, not written anew: whatever reads the base model then reads the export, also in older versions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cookbook_core.commands import model_card
from cookbook_core.errors import CheckpointError, ConfigError, ModelError, check_choice
from cookbook_core.runs.run_folder import find_checkpoint
from cookbook_core.storage.paths import usable_path

FORMS = ("peft", "merged", "gguf-ready")
DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt tokenizer.model spiece.model chat_template.jinja chat_template.json"
).split()
_NO_UNEMBEDDING_IN_GGUF = ("GemmaForCausalLM", "Gemma2ForCausalLM")
"""llama.cpp's converter leaves out their lm_head.weight and uses the embedding in its place."""


def export(
    run: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    checkpoint: str = "final",
    dtype: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a checkpoint in another form: a whole new folder, or nothing.

    Args:
        run: a run folder, one of its checkpoints, or any folder peft wrote for a LoRA.
        to: "peft", "merged" or "gguf-ready".
        out: the folder to write; None takes RUN/export/FORM.
        checkpoint: of a run: "final", "best" or a step.
        dtype: of merged weights: "float32", "bfloat16" or "float16"; None takes the base model's.
        base_model: where the base model is now; None takes what the checkpoint names.
    Returns:
        The folder.
    Raises:
        ConfigError: no such run or checkpoint, or a target that exists.
        CheckpointError: damaged, on a service, of another base model; or a target not writable.
        ModelError: the base model cannot be loaded, or merged into.
    """
    check_choice(ConfigError, "--to", "unknown form", to, FORMS)
    if dtype is not None:
        check_choice(ConfigError, "--dtype", "unknown dtype", dtype, DTYPES)
        if to == "peft":
            mend = "An adapter keeps the dtype it was trained in."
            raise ConfigError("--dtype", "not for --to peft", expected="none", got=dtype, fix=mend)
    folder, home = find_checkpoint(run, checkpoint)
    target = home / "export" if home else folder.parent
    target /= to if folder.name == "final" else f"{to}-{folder.name}"
    if out is not None:
        target = usable_path("--out", out, ConfigError)
    if target.exists():
        mend = "Give another with --out: nothing is overwritten."
        raise ConfigError(
            str(target), "exists", expected="a new folder's name", got="that of one", fix=mend
        )

    from cookbook_core.backend.local import checkpoints, merging

    held = checkpoints.read(folder)
    source, name, tokenizer = _base_model(base_model or checkpoints.base_model_of(folder))
    card = model_card.Card(to, name, folder.name, held.config.r, home and home / "config.json")
    if to == "peft":
        with _new_folder(target, (folder / "adapter_model.safetensors").stat().st_size) as new:
            shutil.copyfile(folder / "adapter_model.safetensors", new / "adapter_model.safetensors")
            config = _read_json(folder / "adapter_config.json")
            config |= {"base_model_name_or_path": name, "inference_mode": True}
            _write_json(new / "adapter_config.json", config)
            _copy_tokenizer(source, new)
            card.write(new, tokenizer)
        return target

    model, untied = merging.merge(held, name, dtype)
    card.describe(model, untied)
    if to == "gguf-ready" and untied and card.architecture in _NO_UNEMBEDDING_IN_GGUF:
        what = f"llama.cpp computes {card.architecture} without an unembedding of its own"
        mend = "Train with train_unembed=False, or take --to merged."
        raise ModelError(str(folder), what, expected="no LoRA on lm_head", got="one", fix=mend)
    with _new_folder(target, sum(p.nbytes for p in model.parameters())) as new:
        model.generation_config = _generation_config(model, tokenizer)
        model.save_pretrained(new)
        _keep_config(source, new, card.dtype, untied)
        _copy_tokenizer(source, new)
        if to == "gguf-ready":
            _inline_template(new, tokenizer)
        card.write(new, tokenizer)
    return target


def _base_model(given: str) -> tuple[Path, str, Any]:
    """The folder with the base model's files, the name to give it, its tokenizer.

    A hub name stays; of a local folder it is the absolute path.
    """
    from huggingface_hub import snapshot_download

    from cookbook_core.backend.local.model.loading import load_tokenizer, resolve_model

    try:
        name = resolve_model(given)
        tokenizer = load_tokenizer(name)
    except ModelError as error:
        fix = "Give the base model's present folder as --base_model."
        raise error.replace(fix=fix) from error
    if Path(name).is_dir():
        return Path(name).resolve(), str(Path(name).resolve()), tokenizer
    wanted = ["config.json", *_TOKENIZER_FILES]
    return Path(snapshot_download(name, allow_patterns=wanted)), name, tokenizer


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `target`, which becomes it when the block ends well."""
    from cookbook_core.backend.local.checkpoints import put_in_place, sync

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size + 2**24:  # what is small beside the weights
            rule, got = f"{(size + 2**24) / 1e6:,.0f} MB", f"{free / 1e6:,.0f} MB free"
            raise CheckpointError(str(target), "not enough disk", expected=rule, got=got)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield temporary
            sync(temporary)
            put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        what, rule = "cannot be written", "a writable folder"
        raise CheckpointError(str(target), what, expected=rule, got=error) from error


def _copy_tokenizer(source: Path, new: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, new / name)


def _inline_template(new: Path, tokenizer: Any) -> None:
    """Put the chat template where readers look that do not know chat_template.jinja."""
    if isinstance(tokenizer.chat_template, str):
        config = _read_json(new / "tokenizer_config.json")
        _write_json(
            new / "tokenizer_config.json", {"chat_template": tokenizer.chat_template} | config
        )


def _generation_config(model: Any, tokenizer: Any) -> Any:
    """The tokens that end an answer, and nothing of how the base model liked to be sampled."""
    from transformers import GenerationConfig

    from cookbook_core.chat.rendering import stop_tokens

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
    """Put the base model's own config.json in place of the one transformers wrote.

    Versions of transformers name things differently (rope_theta, rope_parameters), and a reader
    that looks for the other name takes a default without a word.
    """
    config = _read_json(source / "config.json")
    if config.get("architectures") != _read_json(new / "config.json")["architectures"]:
        return  # the language model out of a larger one
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(names, dtype) | ({"tie_word_embeddings": False} if untied else {})
    _write_json(new / "config.json", config)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
