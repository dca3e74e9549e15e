"""Files on disk and on the Hub: paths, manifests, downloads."""
