"""The backend on this machine: torch, transformers, peft."""
