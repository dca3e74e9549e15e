"""A run: its flags, its folder, its progress, its plots."""

from cookbook_core.runs.config import (
    RunFlags,
    check,
    check_positive,
    check_types,
    main,
    parse_config,
)
from cookbook_core.runs.launch import join_processes
from cookbook_core.runs.plots import Panel
from cookbook_core.runs.run import Run
from cookbook_core.runs.run_folder import read_metrics

__all__ = [
    "Panel",
    "Run",
    "RunFlags",
    "check",
    "check_positive",
    "check_types",
    "join_processes",
    "main",
    "parse_config",
    "read_metrics",
]
