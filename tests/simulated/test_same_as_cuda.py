"""What holds on CUDA holds on the simulated device: every check of tests/test_cuda.py."""

from tests.test_cuda import *  # noqa: F403  each of them is a test
