"""The backend over a Tinker-compatible service, driven through the `tinker` SDK (an extra)."""
