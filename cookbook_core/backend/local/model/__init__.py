"""The base model: loading, adapters, fused layers, memory."""
