"""Files on disk and on the Hub: checked paths, manifests of checkpoints, the offline cache."""
