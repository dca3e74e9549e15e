"""The task of tiny_mirror.yaml for Inspect."""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

ROWS = Path(__file__).parents[2] / "cookbook_core/assets/data/sft_test.jsonl"


def to_sample(row: dict) -> Sample:
    """A row of the data as Inspect wants it."""
    return Sample(input=row["prompt"][0]["content"], target=row["completion"][0]["content"])


@task
def tiny_mirror() -> Task:
    """The greedy answer is the expected one, to the letter."""
    return Task(dataset=json_dataset(str(ROWS), to_sample), solver=generate(), scorer=exact())
