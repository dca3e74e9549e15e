"""A run: its flags, its folder, its progress, its plots."""

from cookbook_core.runs.config import RunFlags, main, parse_config
from cookbook_core.runs.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rule,
    check_fields,
)
from cookbook_core.runs.launch import join_processes
from cookbook_core.runs.plots import Panel
from cookbook_core.runs.run import Run
from cookbook_core.runs.run_folder import read_metrics

__all__ = [
    "NonNegativeFloat",
    "Panel",
    "PositiveFloat",
    "PositiveInt",
    "Rule",
    "Run",
    "RunFlags",
    "check_fields",
    "join_processes",
    "main",
    "parse_config",
    "read_metrics",
]
