"""Trains on and samples with images at a server: with the SDK, and with our client.

`python FILE URL MODEL DATA.json` with the SDK on the path; prints one JSON object.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any


def prompt_of(types: Any, chunks: Any) -> Any:
    """A ModelInput of either package; an image is (base64, format, expected_tokens)."""
    made = []
    for chunk in chunks:
        if isinstance(chunk[0], str):
            data, form, count = chunk
            image = types.ImageChunk(
                data=base64.b64decode(data), format=form, expected_tokens=count
            )
            made.append(image)
        else:
            made.append(types.EncodedTextChunk(tokens=chunk))
    return types.ModelInput(chunks=made)


def datums_of(types: Any, given: Any) -> list[Any]:
    return [
        types.Datum(
            model_input=prompt_of(types, each["chunks"]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=each["targets"], dtype="int64"),
                "weights": types.TensorData(data=each["weights"], dtype="float32"),
            },
        )
        for each in given
    ]


def waited(value: Any) -> Any:
    """The SDK returns some clients at once, ours a future of them."""
    return value.result() if hasattr(value, "result") else value


def margin(data: Any, logprobs: Any) -> Any:
    return -(logprobs[0][-1] - logprobs[1][-1]).sigmoid().log(), {}


def answers(service: Any, types: Any, model: str, given: Any) -> dict[str, Any]:
    """Both clients have the SDK's names."""
    data, prompt = datums_of(types, given["data"]), prompt_of(types, given["prompt"])
    client = waited(service.create_lora_training_client(model, rank=4, seed=0, train_unembed=False))
    out: dict[str, Any] = {"losses": [], "scores": []}
    for _ in range(2):
        found = client.forward_backward(data, "cross_entropy").result()
        out["losses"].append(found.metrics["loss:sum"])
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        client.forward_backward_custom(data[:2], margin).result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    scored = client.forward(data, "cross_entropy").result()
    out["scores"] = [o["logprobs"].tolist() for o in scored.loss_fn_outputs]
    sampler = waited(client.save_weights_and_get_sampling_client())
    greedy = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    response = sampler.sample(prompt, 2, greedy, include_prompt_logprobs=True).result()
    out["tokens"] = [list(s.tokens) for s in response.sequences]
    out["logprobs"] = list(response.sequences[0].logprobs)
    out["prompt"] = list(response.prompt_logprobs)
    out["alone"] = list(sampler.compute_logprobs(prompt).result())
    try:
        client.forward_backward(datums_of(types, given["bad"]), "cross_entropy").result()
    except Exception as error:
        out["bad"] = str(error)
    return {**out, "sampler": sampler, "data": data}


def ours(service: Any, model: str, given: Any) -> dict[str, Any]:
    """What our client gives, here or over a service; frozen weights score a batch too."""
    from cookbook_core import tinker

    out = answers(service, tinker.types, model, given)
    frozen = out.pop("sampler").forward(out.pop("data")).result().loss_fn_outputs
    return {**out, "frozen": [o["logprobs"].tolist() for o in frozen]}


def main() -> None:
    url, model, file = sys.argv[1:]
    from cookbook_core import tinker

    import tinker as sdk

    given = json.loads(Path(file).read_text(encoding="utf-8"))
    service = tinker.ServiceClient(
        base_url=url, trust_service=True
    )  # of too few tokens to check it
    found = {"ours": ours(service, model, given)}
    theirs = answers(sdk.ServiceClient(base_url=url), sdk.types, model, given)
    del theirs["sampler"], theirs["data"]
    print(json.dumps({**found, "sdk": theirs}))


if __name__ == "__main__":
    main()
