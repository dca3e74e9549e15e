"""The command line: `cookbook new`, `list`, `compare`, `export`, `check`, `doctor`."""
