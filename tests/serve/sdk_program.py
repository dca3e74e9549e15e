"""A program written for the `tinker` SDK, as anyone would write it: `python FILE DATA.json`.

It prints one JSON object: losses, logprobs and samples by the name of the case. tests/serve runs it
with several versions of the SDK, each in a process of its own.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

GIVEN = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
LOSSES: list[float] = []
NEWEST = version("tinker") == "0.38.0"


def tensor(values: Any, dtype: str, sparse: bool = False) -> Any:
    array = np.asarray(values, dtype)
    if sparse and hasattr(types.TensorData, "from_torch_sparse"):
        return types.TensorData.from_torch_sparse(torch.from_numpy(array))
    return types.TensorData(data=array.reshape(-1).tolist(), dtype=dtype, shape=list(array.shape))


def datums(name: str, sparse: bool = False) -> list[Any]:
    made = []
    for datum in GIVEN[name]:
        inputs = {
            key: tensor(v, "int64" if key == "target_tokens" else "float32", sparse)
            for key, v in datum["inputs"].items()
        }
        tokens = types.ModelInput.from_ints(datum["tokens"])
        made.append(types.Datum(model_input=tokens, loss_fn_inputs=inputs))
    return made


def squared(data: Any, logprobs: Any) -> Any:
    loss = sum((lp**2).sum() for lp in logprobs)
    LOSSES.append(float(loss))  # older versions report the surrogate's as loss:sum
    return loss, {"mine": 3.0}


def client_after_a_step(service: Any) -> Any:
    """B is 0 at the start, and A then has no gradient."""
    client = service.create_lora_training_client(
        GIVEN["model"], rank=4, seed=0, train_unembed=False
    )
    client.forward_backward(datums("first"), "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return client


def logprobs_of(output: Any) -> list[Any]:
    return [o["logprobs"].tolist() for o in output.loss_fn_outputs]


def main() -> None:
    out: dict[str, Any] = {"version": version("tinker")}
    service = tinker.ServiceClient()
    for name, loss, sparse in (
        ("plain", "cross_entropy", False),
        ("candidates", "cross_entropy", False),
        ("sparse", "cross_entropy", True),
        ("policy", "ppo", False),
    ):
        client = client_after_a_step(service)
        more = [{"clip_high_threshold": 1.1}] if name == "policy" else []
        output = client.forward_backward(datums(name, sparse), loss, *more).result()
        out[name] = {"id": client.model_id, "loss": output.metrics["loss:sum"],
                     "logprobs": logprobs_of(output)}  # fmt: skip
    client = client_after_a_step(service)
    passes = []
    for name in ("plain", "candidates", "plain"):
        output = client.forward_backward_custom(datums(name), squared).result()
        passes.append(output.metrics["passes:max"])
    out["custom"] = {"id": client.model_id, "loss": LOSSES[-1], "passes": passes,
                     "mine": output.metrics["mine"]}  # fmt: skip
    client = client_after_a_step(service)
    if NEWEST:
        uploaded = service.create_custom_loss(traced, {"logprobs": 1, "weights": 1}).result()
        output = client.forward_backward_custom(datums("plain"), uploaded).result()
        out["uploaded"] = {"id": client.model_id, "loss": output.metrics["loss:sum"],
                           "passes": output.metrics["passes:max"],
                           "metric": output.metrics["custom/square:mean"]}  # fmt: skip
        client = client_after_a_step(service)
    try:
        client.forward_backward(datums("bad"), "cross_entropy").result()
    except Exception as error:
        out["bad"] = str(error)
    save_and_sample(service, client, out)
    print(json.dumps(out))


def traced(logprobs: Any, weights: Any) -> Any:
    clipped = torch.clamp(logprobs, min=-20.0)
    terms = torch.where(weights > 0, -(clipped * weights), torch.zeros_like(clipped))
    loss = terms.sum() + 0.1 * (logprobs.exp() ** 2).mean()
    return loss, {"custom/square:mean": (logprobs**2).mean()}


def save_and_sample(service: Any, client: Any, out: dict[str, Any]) -> None:
    saved = client.save_state("a").result().path
    info = client.get_info()
    resumed = service.create_training_client_from_state_with_optimizer(saved)
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(GIVEN["plain"][0]["tokens"])
    greedy = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    answer = sampler.sample(prompt=prompt, num_samples=2, sampling_params=greedy).result()
    weights = client.save_weights_for_sampler("b").result().path
    again = service.create_sampling_client(model_path=weights)
    repeated = again.sample(prompt=prompt, num_samples=1, sampling_params=greedy).result()
    top = again.sample(
        prompt=prompt, num_samples=1, sampling_params=greedy, include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()  # fmt: skip
    rest = service.create_rest_client()
    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    run = rest.get_training_run(client.model_id).result()
    out["saved"] = {
        "path": saved, "name": info.model_name or info.model_data.model_name,
        "forward": [
            logprobs_of(c.forward(datums("plain"), "cross_entropy").result())
            for c in (client, resumed)
        ],
        "tokens": [list(s.tokens) for s in answer.sequences], "logprobs": list(
            answer.sequences[0].logprobs),
        "again": list(repeated.sequences[0].tokens),
        "prompt": list(again.compute_logprobs(prompt).result()),
        "top": [row[0][0] for row in top.topk_prompt_logprobs[1:]],
        "prompt_too": list(top.prompt_logprobs),
        "listed": sorted(c.tinker_path for c in listed), "base": run.base_model,
    }  # fmt: skip
    rest.delete_checkpoint_from_tinker_path(weights).result()
    out["saved"]["left"] = len(rest.list_checkpoints(client.model_id).result().checkpoints)


if __name__ == "__main__":
    main()
