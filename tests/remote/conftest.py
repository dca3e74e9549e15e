"""Collect the tests that need the SDK only where it can be imported: see test_sdks.py."""

from importlib import util

collect_ignore = [] if util.find_spec("tinker") else ["against_sdk.py", "fake.py"]
