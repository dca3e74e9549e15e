"""Tiny random models with a vision tower, one of each family, in folders with their processors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

WIDTH = 32
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": WIDTH,
    "initializer_range": 0.3,
}
PLAIN_TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
SMOL_TOKENS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"),
    *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)),
)
GEMMA_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}

PACKED = ("qwen3_vl", "qwen2_5_vl", "smolvlm", "idefics3", "llava")
PADDED = ("gemma3", "qwen3_5")
FAMILIES = (*PACKED, *PADDED)


def qwen(kind: str, ids: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of the configs that Qwen models share: of the model, of its image processor."""
    tokens = {
        "vision_start_token_id": ids["<|vision_start|>"],
        "image_token_id": ids["<|image_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "video_token_id": ids["<|video_pad|>"],
    }
    vision: dict[str, Any] = dict(QWEN_TOWER)
    text: dict[str, Any] = {**TEXT, "rope_parameters": M_ROPE}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    else:
        vision["num_position_embeddings"] = 64
    if kind == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0, 1]
        text["rope_parameters"] = {**M_ROPE, "mrope_interleaved": True}
    if kind == "qwen3_5":
        text["layer_types"] = ["linear_attention", "full_attention"]
        text["rope_parameters"] = {
            **{**M_ROPE, "mrope_interleaved": True, "mrope_section": [1, 1, 0]},
            "partial_rotary_factor": 0.5,
        }
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.1}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    pixels = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    config = {**tokens, "text_config": text, "vision_config": vision}
    return config, {"image_processor_type": "Qwen2VLImageProcessor", "size": size, **pixels}


def configs(kind: str, ids: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any], dict]:
    """The configs of the model, its image processor and its processor, for these token ids."""
    if kind.startswith("qwen"):
        config, images = qwen(kind, ids)
        name = {"qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(kind, "Qwen3VLProcessor")
        return config, images, {"processor_class": name}
    text = {**TEXT, "model_type": "llama"}
    if kind in ("smolvlm", "idefics3"):
        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
        config = {"image_token_id": ids["<image>"], "scale_factor": 2, "pad_token_id": 0}
        images = {
            "image_processor_type": f"{name}ImageProcessor",
            "size": {"longest_edge": 64},
            "max_image_size": {"longest_edge": 32},
        }
        more = {"processor_class": f"{name}Processor", "image_seq_len": 4}
    elif kind == "llava":
        config = {"image_token_index": ids["<image>"], "image_seq_length": 16}
        config |= {"vision_feature_layer": -1}
        images = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        }
        more = {"patch_size": 8, "num_additional_image_tokens": 1}
        more |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
        vision = {**PLAIN_TOWER, "model_type": "clip_vision_model"}
        return {**config, "text_config": text, "vision_config": vision}, images, more
    else:
        text = {**TEXT, "sliding_window": 12, "query_pre_attn_scalar": 8}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        config = {
            "boi_token_index": ids["<start_of_image>"],
            "eoi_token_index": ids["<end_of_image>"],
            "image_token_index": ids["<image_soft_token>"],
            "mm_tokens_per_image": 4,
        }
        size = {"height": 32, "width": 32}
        images = {"image_processor_type": "Gemma3ImageProcessor", "size": size}
        more = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
        vision = {**PLAIN_TOWER, "vision_use_head": False}
        return {**config, "text_config": text, "vision_config": vision}, images, more
    return {**config, "text_config": text, "vision_config": dict(PLAIN_TOWER)}, images, more


def write(kind: str, folder: Path, tokenizer: Any) -> str:
    """Write a random float32 model of a family to a folder, with what its processor reads."""
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **({"extra_special_tokens": GEMMA_TOKENS} if kind == "gemma3" else {}),
    )
    more = SMOL_TOKENS if not kind.startswith("qwen") else QWEN_TOKENS
    own.add_special_tokens({"additional_special_tokens": list(more)})
    ids = own.get_vocab()
    config, images, processor = configs(kind, ids)
    config["text_config"]["vocab_size"] = len(own)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoConfig.for_model(kind, **config)
        model = AutoModelForImageTextToText.from_config(made)
        for p in model.parameters():
            if p.dim() == 1:  # biases and norms start at 0 or 1: make them matter
                p.data.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    for name, values in (("preprocessor_config", images), ("processor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def picture(seed: int, size: tuple[int, int] = (40, 40), form: str = "PNG") -> bytes:
    """The file of a random image, in blocks of 8 pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, form)
    return file.getvalue()
