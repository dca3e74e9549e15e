"""Where the work is done: `interface.py` says what a backend must do, `local/` does it here."""
