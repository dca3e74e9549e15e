"""A sharded base model against a whole one: what differs, and what a process holds.

    torchrun --nproc_per_node=2 -m benchmarks.sharding

Differences in float64, on the bundled model, between the processes of this run over a sharded model
and one process with the whole model; each of three steps makes two backwards. Bytes in float32, of
a random model of eight layers: of all tensors that rank 0 has after a step, less those it had
before the model was loaded and those of the adapter in training; the copy of the adapter that was
sent last is in them.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cookbook_core.backend.local.model import memory
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.runs import join_processes
from cookbook_core.tinker import AdamParams, Datum, ServiceClient, TrainingClient
from tests.follower import float64_norm
from tests.oracles.logprobs import adapter_of, engine_of, randomize, take_gradient
from tests.test_processes import BATCHES, grouped, squared

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def client(model: str, dtype: str, *, shard: bool, together: bool = True) -> TrainingClient:
    """A client with random A and B; of this process alone unless together."""
    joined = group._group
    group._group = joined if together else None
    try:
        folder = tempfile.mkdtemp()
        service = ServiceClient(device="cpu", dtype=dtype, checkpoint_dir=folder, shard=shard)
        made = service.create_lora_training_client(model, rank=8, seed=0).result()
    finally:
        group._group = joined
    randomize(made)
    return made


def differences(clients: Sequence[TrainingClient], loss: object, data: list[Datum]) -> list[float]:
    """The largest of logprobs, nats, and of the gradient, as a share of its norm."""
    worst = [0.0, 0.0]
    for _ in range(3):
        results = [c.forward_backward_custom(data, loss).result() for c in clients]
        for c in clients:
            c.forward_backward(data[:1], "cross_entropy").result()
        logprobs = [[o["logprobs"].to_torch() for o in r.loss_fn_outputs] for r in results]
        for ours, theirs in zip(*logprobs, strict=True):
            worst[0] = max(worst[0], float((ours - theirs).abs().max()))
        ours, theirs = (adapter_of(c).grad for c in clients)
        worst[1] = max(worst[1], float((ours - theirs).norm() / theirs.norm()))
        for c in clients:
            c.optim_step(AdamParams(1e-3)).result()
    return worst


def live_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    parts = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum({s._cdata: s.nbytes() for s in (x.untyped_storage() for x in parts)}.values())


def build_model(folder: str) -> str:
    """A random model of 31 M parameters, of which 27 M are in layers, untied."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    config = AutoConfig.for_model("qwen3", vocab_size=4096, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def held(model: str, *, shard: bool) -> tuple[int, int]:
    """Bytes of a base model after a step, and those that memory limits reckon with."""
    before = live_bytes()
    made = client(model, "float32", shard=shard)
    made.forward_backward_custom(grouped(2, 2, 18), squared).result()
    take_gradient(made)
    own = live_bytes() - before - adapter_of(made).flat.nbytes
    return own, memory.weight_bytes(engine_of(made).base.model)


def main() -> None:
    Qwen3RMSNorm.forward = float64_norm  # transformers' is in float32 whatever the model is in
    join_processes()
    print("| batch | logprobs, nats | gradient |\n|---|---|---|")
    clients = (
        client("tiny", "float64", shard=True),
        client("tiny", "float64", shard=False, together=False),
    )
    for name, (loss, data) in BATCHES.items():
        logprobs, gradient = differences(clients, loss, data)
        print(f"| {name} | {logprobs:.1e} | {gradient:.1e} |", flush=True)
    folder = build_model(tempfile.mkdtemp())
    for shard in (False, True):
        own, counted = held(folder, shard=shard)
        print(f"sharded {shard}: {own / 2**20:.1f} MiB held, {counted / 2**20:.1f} counted")


if __name__ == "__main__":
    main()
