"""Expected training speed by arithmetic: operations and bytes of a token. No measurement.

    python -m benchmarks.gpu.estimate

A token takes (operations / rate) + (bytes / bandwidth), nothing overlapping and nothing waiting:
sequences of 1,024 tokens, every position scored, LoRA of rank 32 on all linear layers, whole graphs
kept. Bytes, with `in` and `out` the widths of a linear layer, h the hidden size, q and k those of
queries and keys, V the vocabulary:

    LoRA          30 in + 56 out a layer in float32, 12 in + 8 out in bfloat16
    norms, rotary embedding, SwiGLU, residuals    314 h + 143 (q + k) a layer as in transformers
    unembedding   38 V (ten passes over float32 logits)

Rates and bandwidths are assumed, and so are the shares of the third line that are left where torch
fuses the norms (0.75), Liger the norms and SwiGLU (0.45), or something all of it (0.25).
"""

from __future__ import annotations

from benchmarks.gpu.models import SHAPES, qwen3, training_flops

CARDS = {  # bytes/s; operations/s in products of the widths of 0.6B, 1.7B, 8B
    "H100": (2.5e12, dict(zip(SHAPES, (400e12, 500e12, 620e12), strict=True))),
    "RTX 4090": (0.85e12, dict(zip(SHAPES, (125e12, 135e12, 145e12), strict=True))),
}
VERSIONS = {  # LoRA's bytes by in and out; share left of elementwise bytes
    "LoRA in float32 (before)": (30, 56, 1.0),
    "LoRA in bfloat16": (12, 8, 1.0),
    "and norms fused by torch": (12, 8, 0.75),
    "and norms and SwiGLU fused by Liger": (12, 8, 0.45),
    "and rotary embedding fused too": (12, 8, 0.25),
}


def microseconds(size: str, card: str, version: str) -> tuple[float, float]:
    """Microseconds of a token, and operations a second."""
    config, (bandwidth, rates) = qwen3(SHAPES[size]), CARDS[card]
    by_in, by_out, left = VERSIONS[version]
    h, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, k = config.num_attention_heads * 128, config.num_key_value_heads * 128
    lora = by_in * (5 * h + q + inner) + by_out * (q + 2 * k + 2 * h + 2 * inner)
    elementwise = left * (314 * h + 143 * (q + k))
    moved = layers * (lora + elementwise) + 38 * config.vocab_size
    flops = training_flops(config, [list(range(1024))]) / 1024
    seconds = flops / rates[size] + moved / bandwidth
    return seconds * 1e6, flops / seconds


def main() -> None:
    for card in CARDS:
        for version in VERSIONS:
            cells = []
            for size in SHAPES:
                taken, rate = microseconds(size, card, version)
                cells.append(f"{size} {1e3 / taken:.1f}k tokens/s ({rate / 1e12:.0f} TFLOP/s)")
            print(f"{card}, {version}: {', '.join(cells)}")


if __name__ == "__main__":
    main()
