"""Programs of three versions of the `tinker` SDK, unmodified: the in-process client's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cookbook_core import tinker
from tests.conftest import make_random_data
from tests.oracles.logprobs import assert_close, take_gradient
from tests.serve.running import NAME

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.16.1", "0.25.0", "0.38.0")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the SDK needs Python 3.11"),
]


def policy_data() -> list[tinker.Datum]:
    rng = np.random.default_rng(5)
    data = []
    for datum in make_random_data(3, seed=5):
        n = datum.model_input.length
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "logprobs": rng.normal(-5, 1, n),
                  "advantages": rng.normal(0, 1, n)}  # fmt: skip
        data.append(tinker.Datum(datum.model_input, inputs))
    return data


def sparse_data() -> list[tinker.Datum]:
    """A few candidates of many; unlisted ones are token 0 with weight 0."""
    rng = np.random.default_rng(6)
    data = []
    for datum in make_random_data(2, seed=6, lengths=(5, 9)):
        n = datum.model_input.length
        targets, weights = np.zeros((n, 12), int), np.zeros((n, 12))
        for row in range(n):
            columns = rng.choice(12, 2, replace=False)
            targets[row, columns] = rng.integers(1, 100, 2)
            weights[row, columns] = rng.uniform(0.2, 1.0, 2)
        data.append(tinker.Datum(datum.model_input, {"target_tokens": targets, "weights": weights}))
    return data


CASES = {
    "first": make_random_data(2, seed=9),
    "plain": make_random_data(3),
    "candidates": make_random_data(3, k=3),
    "sparse": sparse_data(),
    "policy": policy_data(),
}


@pytest.fixture(scope="module", params=VERSIONS)
def printed(request, running, tmp_path_factory) -> dict[str, Any]:
    """What the program printed, with the models that it left on the server."""
    folder = Path(sys.prefix) / "sdk" / request.param
    if not folder.is_dir():
        pytest.skip(f"no {folder}; make test installs it")
    given: dict[str, Any] = {
        name: [
            {
                "tokens": d.model_input.to_ints(),
                "inputs": {key: t.tolist() for key, t in d.loss_fn_inputs.items()},
            }
            for d in data
        ]
        for name, data in CASES.items()
    }
    given["bad"] = [{"tokens": [5, 10**6], "inputs": {"target_tokens": [1, 2], "weights": [1, 1]}}]
    given["model"] = NAME
    file = tmp_path_factory.mktemp("program") / "data.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    drop, running.service.drop = running.service.drop, lambda model: None
    env = {
        **os.environ, "PYTHONPATH": str(folder), "NO_PROXY": "127.0.0.1",
        "TINKER_BASE_URL": running.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
    }  # fmt: skip
    program = ROOT / "tests" / "serve" / "sdk_program.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(file)],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    running.service.drop = drop
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["version"] == request.param
    return out


@pytest.fixture
def here(local) -> tinker.TrainingClient:
    client = local()
    client.forward_backward(CASES["first"], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    return client


@pytest.mark.parametrize("name", ["plain", "candidates", "sparse", "policy"])
def test_built_in_losses(running, printed, here, name):
    found = printed[name]
    options = {"clip_high_threshold": 1.1} if name == "policy" else None
    loss = "ppo" if name == "policy" else "cross_entropy"
    expected = here.forward_backward(CASES[name], loss, options).result()
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    scores = here.forward(CASES[name], loss, options).result().loss_fn_outputs
    for out, own in zip(found["logprobs"], scores, strict=True):
        own = own["logprobs"].to_numpy()
        assert np.allclose(np.asarray(out).reshape(own.shape), own, atol=1e-5)
    assert_close(running.gradient(found["id"]), take_gradient(here), 1e-5)


def squared(data, logprobs):
    return sum((lp**2).sum() for lp in logprobs), {}


def test_a_custom_loss_on_the_client_takes_one_pass_once_the_pattern_is_known(
    running, printed, here
):
    found = printed["custom"]
    for name in ("plain", "candidates", "plain"):
        expected = here.forward_backward_custom(CASES[name], squared).result()
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert (found["passes"], found["mine"]) == ([2.0, 1.0, 1.0], 3.0)
    assert_close(running.gradient(found["id"]), take_gradient(here), 1e-5)


def traced(data, logprobs):
    """The loss that the program uploads, over the whole batch."""
    total = torch.zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        w = datum.loss_fn_inputs["weights"].to_torch()
        terms = torch.where(w > 0, -(lp.clamp(min=-20.0) * w), torch.zeros_like(lp))
        total = total + terms.sum() + 0.1 * (lp.exp() ** 2).mean()
    return total, {"m": torch.stack([(lp**2).mean() for lp in logprobs]).mean()}


def test_an_uploaded_loss(running, printed, here):
    if "uploaded" not in printed:
        pytest.skip("create_custom_loss came with SDK 0.38")
    found, expected = printed["uploaded"], here.forward_backward_custom(CASES["plain"], traced)
    assert found["loss"] == pytest.approx(expected.result().loss, rel=1e-5)
    assert found["metric"] == pytest.approx(expected.result().metrics["m"], rel=1e-5)
    assert found["passes"] == 1.0
    assert_close(running.gradient(found["id"]), take_gradient(here), 1e-5)


def test_errors_saving_and_sampling(printed, here):
    assert "data[0].model_input[1]: token id outside the vocabulary" in printed["bad"]
    saved = printed["saved"]
    assert saved["name"] == NAME
    one, other = saved["forward"]
    assert one == other
    own = here.forward(CASES["plain"], "cross_entropy").result().loss_fn_outputs
    assert np.allclose(one[0], own[0]["logprobs"].to_numpy(), atol=1e-5)
    sampler = here.save_weights_and_get_sampling_client().result()
    prompt = CASES["plain"][0].model_input
    params = tinker.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    answer = sampler.sample(prompt, 1, params).result().sequences[0]
    assert saved["tokens"] == [answer.tokens] * 2
    assert np.allclose(saved["logprobs"], answer.logprobs, atol=1e-5)
    assert saved["again"] == answer.tokens
    logprobs = sampler.compute_logprobs(prompt).result()
    for found in (saved["prompt"], saved["prompt_too"]):
        assert np.allclose(found[1:], logprobs[1:], atol=1e-5)
    top = sampler.sample(prompt, 1, params, topk_prompt_logprobs=3).result().topk_prompt_logprobs
    assert saved["top"] == [row[0][0] for row in top[1:]]
    assert [path.split("/", 3)[3] for path in saved["listed"]] == ["sampler_weights/b", "weights/a"]
    assert saved["base"] == NAME
    assert saved["left"] == 1


def test_the_version_is_the_one_that_is_installed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"SERVED_SDK := {VERSIONS[0]}\n" in makefile
