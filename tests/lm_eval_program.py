"""Run tasks of docs/tasks in one process of lm-evaluation-harness: argv[1] is a JSON list of
[model, model_args, task]; prints for each the answers' logprobs, or the texts."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path="docs/tasks", include_defaults=False)
    found = []
    for model, args, task in json.loads(sys.argv[1]):
        result = lm_eval.simple_evaluate(
            model,
            args,
            [task],
            device="cpu",
            limit=12,
            task_manager=tasks,
            apply_chat_template=True,
        )
        samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
        found.append([sample["filtered_resps"] for sample in samples])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
