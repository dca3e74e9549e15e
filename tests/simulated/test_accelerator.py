"""What holds on CUDA holds on the simulated device: every check of tests/test_accelerator.py."""

from tests.test_accelerator import *  # noqa: F403  each of them is a test
