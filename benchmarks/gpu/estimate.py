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
    "H100": (2.5e12, (400e12, 500e12, 620e12)),
    "RTX 4090": (0.85e12, (125e12, 135e12, 145e12)),
}
VERSIONS = {  # LoRA's bytes by in and out; share left of elementwise bytes
    "LoRA in float32 (before)": (30, 56, 1.0),
    "LoRA in bfloat16": (12, 8, 1.0),
    "and norms fused by torch": (12, 8, 0.75),
    "and norms and SwiGLU fused by Liger": (12, 8, 0.45),
    "and rotary embedding fused too": (12, 8, 0.25),
}

if __name__ == "__main__":
    for card, (bandwidth, rates) in CARDS.items():
        for version, (by_in, by_out, left) in VERSIONS.items():
            cells = []
            for (size, shape), rate in zip(SHAPES.items(), rates, strict=True):
                h, inner, layers, heads, kv_heads, width, vocab, _ = shape
                q, k = heads * width, kv_heads * width
                lora = by_in * (5 * h + q + inner) + by_out * (q + 2 * k + 2 * h + 2 * inner)
                moved = layers * (lora + left * (314 * h + 143 * (q + k))) + 38 * vocab
                flops = training_flops(qwen3(shape), [list(range(1024))]) / 1024
                taken = flops / rate + moved / bandwidth
                cells.append(
                    f"{size} {1e-3 / taken:.1f}k tokens/s ({flops / taken / 1e12:.0f} TFLOP/s)"
                )
            print(f"{card}, {version}: {', '.join(cells)}")
