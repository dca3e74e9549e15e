"""Check that memory does not grow in a long run with a new sampling client at every step.

    python -m scripts.memory_growth            # 2,000 steps, some minutes on two cores

Trains the bundled model and prints resident memory; exits with 1 if it grows by more than 5% after
step 100.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from cookbook_core import tinker
from cookbook_core.data import batch_indices, load_rows
from recipes.sft import build_data, sft_loss

LIMIT = 1.05


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        service = tinker.ServiceClient(device="cpu", checkpoint_dir=folder)
        client = service.create_lora_training_client("tiny", rank=32, seed=0).result()
        rows = load_rows("tiny/sft", ("prompt", "completion"))
        data, _ = build_data(rows, client.get_tokenizer(), 512, "last")
        prompt = tinker.ModelInput.from_ints(client.get_tokenizer().encode("reverse: a b"))
        params = tinker.SamplingParams(max_tokens=4, seed=0)
        start = highest = 0.0
        for step in range(steps + 1):
            batch = [data[i] for i in batch_indices(len(data), 16, step, 0)]
            backward = client.forward_backward_custom(batch, sft_loss)
            client.optim_step(tinker.AdamParams(1e-4)).result()
            loss = backward.result().loss
            sampler = client.save_weights_and_get_sampling_client().result()
            sampler.sample(prompt, 1, params).result()
            now = resident_mb()
            start = now if step == 100 else start
            highest = max(highest, now) if step >= 100 else 0.0
            if step in (0, 100) or step % 250 == 0:
                print(f"step {step:5d}  loss {loss:6.3f}  resident {now:7.1f} MB", flush=True)
    print(f"highest after step 100: {highest / start - 1:+.1%} of that at step 100")
    raise SystemExit(highest > LIMIT * start)


if __name__ == "__main__":
    main()
