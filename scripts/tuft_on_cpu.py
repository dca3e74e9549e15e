"""Start TuFT, a self-hosted Tinker-compatible service, on a machine without a GPU.

    python scripts/tuft_on_cpu.py MODEL_FOLDER --folder tuft --port 10610 --rank 16

Run it in TuFT's own environment (docs/remote.md says how to make one). Everything listens on
127.0.0.1. It trains, and does not sample: TuFT samples with vLLM, which is left out.
TuFT counts on CUDA in one place: torch.cuda.reset_peak_memory_stats, which a CPU build of torch
does not have. In Ray's workers it is replaced by a function that does nothing. Ray is told of one
GPU, as TuFT asks for one, and takes the loopback address, as it does on macOS.

TuFT sets alpha to a multiple of the rank. The multiple written here gives alpha 32 at --rank, which
is what this package's local backend trains with; at another rank the two differ in scale.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def without_memory_statistics() -> None:
    """Runs in each of Ray's workers before anything else."""
    import torch

    torch.cuda.reset_peak_memory_stats = lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder of a Qwen or Llama model")
    parser.add_argument("--folder", type=Path, default=Path("tuft"), help="checkpoints and config")
    parser.add_argument("--port", type=int, default=10610)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank that gets alpha 32")
    parser.add_argument("--key", default="tml-local", help="the API key clients must give")
    given = parser.parse_args()
    if 32 % given.rank:
        parser.error("--rank: alpha is a whole multiple of the rank; one of 1, 2, 4, 8, 16, 32")
    model, folder = str(given.model.resolve(strict=True)), given.folder.resolve()
    sizes = json.loads((given.model / "config.json").read_text(encoding="utf-8"))
    config = {
        "checkpoint_dir": str(folder / "checkpoints"),
        "authorized_users": {given.key: "local"},
        "supported_models": [
            {
                "model_name": model,
                "model_path": model,
                "max_model_len": sizes["max_position_embeddings"],
                "capabilities": ["training"],
                "training_backend": "hf",
                "micro_batch_size": 1,
                "max_lora_rank": 64,
                "lora_alpha_ratio": 32 // given.rank,
            }
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.yaml"
    written.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # one node, and 127.0.0.1 only
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TUFT_HOME", str(folder))
    import ray

    ray.init(
        num_cpus=1,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"worker_process_setup_hook": without_memory_statistics},
    )
    from tuft.cli import main as tuft

    where = ["--host", "127.0.0.1", "--port", str(given.port)]
    sys.argv = ["tuft", "launch", *where, "--config", str(written)]
    tuft()


if __name__ == "__main__":
    main()
