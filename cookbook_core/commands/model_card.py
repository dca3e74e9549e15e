"""Documents of an exported folder: README.md, and the Modelfile that Ollama reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook_core.chat.rendering import stop_tokens
from cookbook_core.commands import recipes

_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

_USE_PEFT = """\
    model = {auto_class}.from_pretrained({base!r})
    model = PeftModel.from_pretrained(model, "THIS FOLDER")

vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME=THIS_FOLDER`
"""
_USE_MERGED = """\
    model = {auto_class}.from_pretrained("THIS FOLDER")

Weights in {dtype}, merged in float32; peft is not needed.
"""
_IMAGES = """\
It reads images: `AutoProcessor.from_pretrained("THIS FOLDER")` is the base model's, and so is the
vision tower. The language model alone was trained.
"""
_USE_GGUF = """\
With a checkout of llama.cpp, from this folder:

    python LLAMA.CPP/convert_hf_to_gguf.py . --outtype {outtype} --outfile model.gguf
    llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M      # smaller, if you like
    llama-server -m model.gguf

With Ollama, after that conversion (change FROM in Modelfile for the quantized file):

    ollama create NAME -f Modelfile
    ollama run NAME

"The BPE pre-tokenizer was not recognized" means that llama.cpp does not know the base model's
tokenizer; `convert_hf_to_gguf.py --print-supported-models` lists the architectures it knows.
"""
_MODELFILE = """\
# Write model.gguf with convert_hf_to_gguf.py (README.md), then: ollama create NAME -f Modelfile
FROM ./model.gguf
{stops}
# No TEMPLATE: Ollama templates are Go templates, so the one in tokenizer_config.json cannot be used
# here; Ollama chooses one of its own by the chat template in the GGUF. Compare the two with `ollama
# show --modelfile NAME`; if they differ, write TEMPLATE by hand or send raw prompts.
"""


@dataclass
class Card:
    """The origin of an export.

    Attributes:
        form: "peft", "merged" or "gguf-ready".
        base_model: hub name, or absolute path.
        checkpoint: "final", or the name of another checkpoint's folder.
        rank: of the adapter.
        run_config: the run's config.json; None if the adapter is not from a run.
        dtype: of merged weights.
        untied: whether merging untied the embeddings.
        auto_class: the class of transformers that loads the model.
    """

    form: str
    base_model: str
    checkpoint: str
    rank: int
    run_config: Path | None
    dtype: str = ""
    untied: bool = False
    auto_class: str = "AutoModelForCausalLM"

    @property
    def reads_images(self) -> bool:
        """Whether the model has a vision tower."""
        return self.auto_class == "AutoModelForImageTextToText"

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write README.md; for gguf-ready also a Modelfile."""
        known = {
            "base": self.base_model, "rank": self.rank, "dtype": self.dtype,
            "auto_class": self.auto_class,
        }  # fmt: skip
        use = _USE_PEFT if self.form == "peft" else _USE_MERGED
        parts = [self._head(), use.format(**known)]
        if self.reads_images:
            parts.append(_IMAGES)
        if self.untied:
            parts.append("The unembedding was trained, so it is no longer tied to the embedding.\n")
        if self.form == "gguf-ready":
            parts.append(_USE_GGUF.format(outtype=_OUTTYPES.get(self.dtype, "auto")))
            ends = [tokenizer.decode([token]) for token in stop_tokens(tokenizer)]
            stops = "".join(f"PARAMETER stop {json.dumps(e, ensure_ascii=False)}\n" for e in ends)
            (folder / "Modelfile").write_text(_MODELFILE.format(stops=stops), encoding="utf-8")
        (folder / "README.md").write_text("\n".join([*parts, self._origin()]), encoding="utf-8")

    def _head(self) -> str:
        """Front matter, as model hubs read it, and the title."""
        from huggingface_hub import ModelCardData

        library = "peft" if self.form == "peft" else "transformers"
        local = Path(self.base_model).is_absolute()  # a hub has no use for somebody's path
        base = None if local else self.base_model
        task = "image-text-to-text" if self.reads_images else None
        data = ModelCardData(
            library_name=library, base_model=base, tags=["lora"], pipeline_tag=task
        )
        kind = f"LoRA adapter of rank {self.rank} for" if library == "peft" else "Fine-tuned"
        return f"---\n{data.to_yaml()}\n---\n# {kind} {Path(self.base_model).name}\n"

    def _origin(self) -> str:
        """Base model, recipe, config and versions."""
        run = {"recipe": "unknown", "config": None}
        if self.run_config and self.run_config.is_file():
            run = json.loads(self.run_config.read_text(encoding="utf-8"))
        lines = [
            f"- base model: {self.base_model}",
            f"- recipe: {run['recipe']}, checkpoint {self.checkpoint}",
            f"- exported by cookbook-core {recipes.version()}",
        ]
        if run["config"]:
            text = json.dumps(run["config"], indent=2, ensure_ascii=False)
            lines += ["- config:", "", "```json", text, "```"]
        return "\n".join(lines) + "\n"
