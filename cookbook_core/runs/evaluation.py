"""The command that evaluates an adapter with lm-evaluation-harness (docs/evaluate.md)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cookbook_core.storage.paths import is_on_service


def lm_eval_command(adapter: str, tokenizer: Any, base_url: str = "") -> str:
    """A shell command; its task is an example.

    Args:
        adapter: a LoRA folder, or a path on the service (tinker://).
        tokenizer: of the model. With a chat template, prompts are rendered as in training.
        base_url: of the service, which has an OpenAI-compatible /v1/completions.
    """
    if is_on_service(adapter):
        url = f"{base_url.rstrip('/')}/v1/completions"
        kind, model = "local-completions", {"model": adapter, "base_url": url}
        model["tokenizer"] = tokenizer.name_or_path
    else:
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        kind, model = "hf", {"pretrained": config["base_model_name_or_path"], "peft": adapter}
    options = ",".join(f"{key}={value}" for key, value in model.items())
    words = ["lm_eval", "--model", kind, "--model_args", options, "--tasks", "arc_easy"]
    if getattr(tokenizer, "chat_template", None):
        words.append("--apply_chat_template")
    return shlex.join(words)
