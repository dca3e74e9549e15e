"""Start TuFT, a self-hosted Tinker-compatible service, on a machine without a GPU.

    python scripts/tuft_on_cpu.py MODEL_FOLDER --folder tuft --port 10610 --rank 16

Run it in TuFT's own environment (docs/remote.md shows how to make one). Everything listens on
127.0.0.1. It trains but does not sample: TuFT samples with vLLM, which is left out.
TuFT needs CUDA in one place: torch.cuda.reset_peak_memory_stats, which a CPU build of torch does
not have. In Ray's workers a function that does nothing replaces it. Ray is given one virtual GPU,
which TuFT requests, and uses the loopback address, as on macOS.

TuFT sets alpha to a multiple of the rank. The multiple written here gives alpha 32 at --rank, as in
this package's local backend; at another rank the two differ in scale.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def without_memory_statistics() -> None:
    """Run first in each of Ray's workers."""
    import torch

    torch.cuda.reset_peak_memory_stats = lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder of a Qwen or Llama model")
    parser.add_argument("--folder", type=Path, default=Path("tuft"), help="checkpoints and config")
    parser.add_argument("--port", type=int, default=10610)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank that gets alpha 32")
    parser.add_argument("--key", default="tml-local", help="the API key that clients must pass")
    arguments = parser.parse_args()
    if 32 % arguments.rank:
        parser.error("--rank: TuFT's alpha is a multiple of it; pass one of 1, 2, 4, 8, 16, 32")
    model, folder = str(arguments.model.resolve(strict=True)), arguments.folder.resolve()
    sizes = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    config = {
        "checkpoint_dir": str(folder / "checkpoints"),
        "authorized_users": {arguments.key: "local"},
        "supported_models": [
            {
                "model_name": model,
                "model_path": model,
                "max_model_len": sizes["max_position_embeddings"],
                "capabilities": ["training"],
                "training_backend": "hf",
                "micro_batch_size": 1,
                "max_lora_rank": 64,
                "lora_alpha_ratio": 32 // arguments.rank,
            }
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yaml"
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML

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

    address = ["--host", "127.0.0.1", "--port", str(arguments.port)]
    sys.argv = ["tuft", "launch", *address, "--config", str(config_file)]
    tuft()


if __name__ == "__main__":
    main()
