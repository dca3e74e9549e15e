"""One run over the processes that torchrun starts."""
