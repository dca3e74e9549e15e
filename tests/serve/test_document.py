"""The program of docs/serve.md, with the real SDK."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cookbook_core import chat, datum_from_prompt_completion, tinker, weighted_sums
from cookbook_core.storage.paths import asset_path
from tests.serve.running import Running

import pytest

ROOT = Path(__file__).parents[2]
SDK = Path(sys.prefix) / "sdk" / "0.38.0"


@pytest.mark.timeout(300)
@pytest.mark.skipif(not (SDK / "tinker").is_dir(), reason="make test installs the SDK")
def test_the_program_prints_the_losses_of_the_local_client(tmp_path, make_service):
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import tinker\n.*?)```", text, flags=re.DOTALL)
    with Running(str(asset_path("tiny_model")), tmp_path, name="tiny") as server:
        env = {
            **os.environ, "PYTHONPATH": str(SDK), "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [row[2] for row in rows] == [2, 1, 1, 1, 1]

    client = make_service().create_lora_training_client("tiny", rank=8, seed=0).result()
    question = [{"role": "user", "content": "What is 17 + 5?"}]
    answer = [{"role": "assistant", "content": "22"}]
    parts = chat.render_completion(client.get_tokenizer(), question, answer)
    data = [datum_from_prompt_completion(*parts)]

    def squared_loss(data, logprobs):
        return weighted_sums(data, [lp**2 for lp in logprobs]).mean(), {}

    for row in rows:
        result = client.forward_backward_custom(data, squared_loss)
        client.optim_step(tinker.AdamParams(learning_rate=2e-3)).result()
        assert row[0] == pytest.approx(result.result().loss, rel=1e-4, abs=1e-5)
    assert rows[-1][0] < 0.01 < rows[0][0]
