"""Rows of datasets: names, splits, files, batches."""

from cookbook_core.data.rows import batch_indices, load_rows, train_test
from cookbook_core.storage.paths import asset_path

__all__ = ["asset_path", "batch_indices", "load_rows", "train_test"]
