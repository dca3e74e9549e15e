"""Asks a server for everything that a `sample` can return: with the SDK, and with our client.

Run with a server's URL and the SDK on the path; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPT, TARGETS = [5, 6, 7, 8, 9], [[6, 3], [-1, 4], [-1, -1], [9, 1]]
PLAIN, SETS = [[5, 6, 7, 8], [9, 5, 6]], [[[6, 1], [7, 2], [8, 3]]]


def answered(client: Any, types: Any, targets: Any) -> dict[str, Any]:
    """Both clients have the SDK's names."""
    response = client.sample(
        types.ModelInput.from_ints(PROMPT), 2, types.SamplingParams(max_tokens=3, seed=1, stop=[]),
        include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3,
        target_prompt_logprobs=targets, prompt_alt_tokens_k=4, prompt_logprobs_last_n=2,
    ).result()  # fmt: skip
    scored, drawn = response.target_prompt_logprobs, response.prompt_alt_tokens
    return {
        "tokens": [list(s.tokens) for s in response.sequences],
        "logprobs": [list(s.logprobs) for s in response.sequences],
        "top": [s.topk_logprobs for s in response.sequences],
        "prompt": list(response.prompt_logprobs),
        "prompt top": response.topk_prompt_logprobs,
        "targets": [scored.dtype, list(scored.shape), scored.to_numpy().tolist()],
        "drawn": [drawn.tokens.to_numpy().tolist(), drawn.logprobs.to_numpy().tolist()],
        "last": list(client.compute_logprobs(types.ModelInput.from_ints(PROMPT), 2).result()),
    }


def scores(client: Any) -> list[Any]:
    """Of batches, by `clients.score`."""
    from cookbook_core import clients, tinker

    plain = [(tokens[:-1], tokens[1:]) for tokens in PLAIN]
    batches = [plain, [(PLAIN[0][:-1], targets) for targets in SETS]]
    return [
        [
            logprobs.tolist()
            for logprobs in clients.score(
                client,
                [
                    tinker.Datum(tinker.ModelInput.from_ints(tokens), {"target_tokens": targets})
                    for tokens, targets in batch
                ],
            )
        ]
        for batch in batches
    ]


def ours(client: Any) -> dict[str, Any]:
    """What our client gives, here or over a service."""
    from cookbook_core import tinker

    targets = tinker.TensorData(TARGETS, "int64")
    return {**answered(client, tinker, targets), "scores": scores(client)}


def main() -> None:
    url, model = sys.argv[1:]
    from cookbook_core import tinker

    import tinker as sdk

    mine = tinker.ServiceClient(base_url=url).create_sampling_client(base_model=model).result()
    out = {"ours": ours(mine)}
    theirs = sdk.ServiceClient(base_url=url).create_sampling_client(base_model=model)
    flat = [token for row in TARGETS for token in row]
    targets = sdk.TensorData(data=flat, dtype="int64", shape=[4, 2])
    print(json.dumps({**out, "sdk": answered(theirs, sdk, targets)}))


if __name__ == "__main__":
    main()
