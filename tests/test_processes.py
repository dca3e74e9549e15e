"""Two processes give what one gives, fail as one does, and end together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cookbook_core import datum_from_prompt_completion, weighted_sums, with_inputs
from cookbook_core.backend.local import memory_table
from cookbook_core.backend.local.model import memory
from cookbook_core.backend.local.multiprocess import engine, group
from cookbook_core.backend.local.multiprocess.shares import distinct_tokens, share_out
from cookbook_core.errors import DatumError, LossError, ModelError, RequestError
from cookbook_core.tinker import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ModelInput,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from tests import follower
from tests.conftest import make_random_data
from tests.follower import Two
from tests.oracles.logprobs import adapter_of, assert_close, engine_of, randomize, take_gradient
from tests.tiny_vision import picture, write

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SECONDS = 60
EXACT = 1e-9
PLAIN = 94  # tokens below this do not make the follower fail


# ---- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    found = Two(tmp_path_factory.mktemp("two"))
    with pytest.MonkeyPatch.context() as patch:
        for norm in follower.NORMS:
            patch.setattr(norm, "forward", follower.float64_norm)
        yield found
    assert found.end() == 0, found.said.read_text(encoding="utf-8")


@dataclass
class Sides:
    """The same client twice: shared by two processes, and in this one alone."""

    shared: TrainingClient
    alone: TrainingClient

    def each(self) -> tuple[TrainingClient, TrainingClient]:
        return self.shared, self.alone

    def agree(self, run: Callable[[TrainingClient], Any]) -> Any:
        """Metrics, logprobs and gradient of `run` are equal; what the shared one gave."""
        found, want = (run(client).result(SECONDS) for client in self.each())
        assert found.metrics == pytest.approx(want.metrics, rel=EXACT)
        for a, b in zip(found.loss_fn_outputs, want.loss_fn_outputs, strict=True):
            assert a["logprobs"].shape == b["logprobs"].shape
            np.testing.assert_allclose(
                a["logprobs"].to_numpy(), b["logprobs"].to_numpy(), rtol=EXACT, atol=EXACT
            )
        return found


Connect = Callable[..., Sides]


@pytest.fixture(scope="module")
def make_sides(
    two: Two, tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., str]
) -> Iterator[Callable[..., Sides]]:
    services: dict[str, ServiceClient] = {}

    def client(kind: str, folder: str, seed: int, train_unembed: bool) -> TrainingClient:
        if kind not in services:
            saved = tmp_path_factory.mktemp("checkpoints")
            options = {"dtype": "float64", "checkpoint_dir": saved, "shard": kind == "sharded"}
            services[kind] = ServiceClient(device="cpu", **options)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "alone":
                patch.setattr(group, "_group", None)
            created = services[kind].create_lora_training_client(
                folder, rank=4, seed=seed, train_unembed=train_unembed
            )
            made = created.result(SECONDS)
        randomize(made, seed)
        return made

    def make(
        kind: str,
        arch: str = "qwen3",
        *,
        seed: int = 0,
        train_unembed: bool = False,
        folder: str = "",
    ) -> Sides:
        assert two.other.poll() is None
        shared, alone = (
            client(k, folder or model_folder(arch), seed, train_unembed) for k in (kind, "alone")
        )
        engines = engine_of(shared), engine_of(alone)
        assert [type(e) is engine.SharedEngine for e in engines] == [True, False]
        assert [e.base.shards for e in engines] == [2 if kind == "sharded" else 1, 1]
        return Sides(shared, alone)

    yield make
    for service in services.values():
        service.close()


@pytest.fixture
def whole(make_sides: Connect) -> Connect:
    """Each process has the whole model."""
    return partial(make_sides, "whole")


@pytest.fixture(params=["whole", "sharded"])
def sides(make_sides: Connect, request: pytest.FixtureRequest) -> Connect:
    """Each process has the whole model, or a part of every layer."""
    return partial(make_sides, request.param)


# ---- data and losses -----------------------------------------------------------------------------


def grouped(groups: int, members: int, prompt: int, k: int | None = None) -> list[Datum]:
    """Datums of `groups` prompts, `members` completions of each, with all that losses ask for."""
    rng = np.random.default_rng(groups)
    data = []
    for _ in range(groups):
        stem = rng.integers(3, PLAIN, prompt)
        for _ in range(members):
            ids = [*stem, *rng.integers(3, PLAIN, rng.integers(4, 12))]
            shape = len(ids) if k is None else (len(ids), k)
            weights = np.broadcast_to((np.arange(len(ids)) >= prompt - 1), (k or 1, len(ids))).T
            data.append(
                Datum(
                    ModelInput.from_ints(ids),
                    {
                        "target_tokens": rng.integers(0, 100, shape),
                        "weights": weights.reshape(shape),
                        "ref_logprobs": rng.uniform(-6, -3, shape),
                        "advantages": np.full(shape, rng.normal()),
                    },
                )
            )
    return data


def dpo(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    ratios = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs").to(logprobs[0])
    margin = ratios[0::2] - ratios[1::2]
    return -torch.nn.functional.logsigmoid(0.1 * margin).mean(), {"margin": margin.mean()}


def policy(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """The whole batch's reduction: a token's part depends on how many there are in all."""
    total, count = logprobs[0].new_zeros(()), 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        x = {name: value.to_torch() for name, value in datum.loss_fn_inputs.items()}
        ratio = (lp - x["ref_logprobs"]).exp()
        total = total - (x["weights"] * x["advantages"] * ratio).sum()
        count += float(x["weights"].sum())
    return total / count, {"tokens_scored": count}


def squared(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    del data
    return sum((lp**2).sum() for lp in logprobs), {"first": logprobs[0].mean()}


def entropy(data: list[Datum], vocab: list[Any]) -> Any:
    rows = [lp[np.arange(0, len(lp), 2)] for lp in vocab]
    del data
    return sum((row.exp() * row).sum() for row in rows), {"rows": sum(map(len, rows))}


def at_temperatures(data: list[Datum]) -> list[Datum]:
    return [with_inputs(d, temperature=0.5 + i / 4) for i, d in enumerate(data)]


BATCHES: dict[str, tuple[Any, list[Datum]]] = {
    "pairs": (dpo, grouped(3, 2, 20)),
    "groups": (policy, grouped(2, 4, 18)),
    "one group": (policy, grouped(1, 6, 40)),
    "many targets": (squared, grouped(2, 2, 17, k=3)),
    "one datum": (squared, grouped(1, 1, 5)),
    "nothing in common": (squared, make_random_data(7, vocab=PLAIN)),
    "temperatures": (policy, at_temperatures(grouped(2, 4, 18))),
}


# ---- the same result -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHES)
def test_steps_are_those_of_one_process(sides: Connect, name: str) -> None:
    """Logprobs, metrics and gradients, accumulated over two calls, then the weights after steps."""
    loss, data = BATCHES[name]
    both = sides()
    for _ in range(3):
        both.agree(lambda c: c.forward(data, "cross_entropy"))
        both.agree(lambda c: c.forward_backward_custom(data, loss))
        both.agree(lambda c: c.forward_backward(data[:1], "cross_entropy"))
        for client in both.each():
            client.optim_step(AdamParams(1e-2)).result(SECONDS)
        assert_close(*(adapter_of(client).named() for client in both.each()), EXACT)
    both.agree(lambda c: c.forward_backward_custom(data, loss))
    assert_close(*map(take_gradient, both.each()), EXACT)


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_other_architectures(whole: Connect, arch: str) -> None:
    """Without packing, and without a plain unembedding."""
    both, data = whole(arch), grouped(2, 3, 18)
    both.agree(lambda c: c.forward_backward_custom(data, policy))
    assert_close(*map(take_gradient, both.each()), EXACT)


@pytest.mark.parametrize(
    ("arch", "train_unembed"),
    [("qwen3", False), ("qwen3", True), ("llama", False), ("llama", True)],
)
def test_the_whole_vocabulary(sides: Connect, arch: str, train_unembed: bool) -> None:
    """With an unembedding of its own, and one that is the embedding."""
    both, data = sides(arch, train_unembed=train_unembed), at_temperatures(grouped(2, 2, 18))
    form = "vocab_logprobs"
    both.agree(lambda c: c.forward_backward_custom(data, entropy, loss_type_input=form))
    both.agree(lambda c: c.forward(data, entropy, loss_type_input=form))
    both.agree(lambda c: c.forward_backward_custom(data, squared))
    assert_close(*map(take_gradient, both.each()), EXACT)


def test_other_limits_in_one_process(sides: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph, more micro-batches, some graphs, or recomputed layers, in this process alone."""
    both, data = sides(), grouped(2, 3, 18)
    ours = engine_of(both.shared)
    for changes, passes in (
        ({"graph_tokens": 0}, 2.0),
        ({"micro_batch_tokens": 30}, 1.0),
        ({"micro_batch_tokens": 30, "graph_tokens": 30, "mode": "off"}, 2.0),
        ({"mode": "on"}, 1.0),
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                owner = ours.scorer if name == "micro_batch_tokens" else ours.limits
                patch.setattr(owner, name, value)
            found, want = (
                c.forward_backward_custom(data, policy).result(SECONDS) for c in both.each()
            )
        assert (found.metrics["passes"], want.metrics["passes"]) == (passes, 1.0), changes
        assert_close(*map(take_gradient, both.each()), EXACT)


def test_clients_do_not_mix(sides: Connect) -> None:
    """More adapters than the other process keeps copies of, in turns, one of them frozen."""
    data = grouped(2, 2, 18)
    clients = [sides(seed=seed) for seed in range(engine.COPIES + 2)]
    for _ in range(2):
        for both in clients:
            both.agree(lambda c: c.forward_backward_custom(data, dpo))
        for both in clients[1:]:
            for client in both.each():
                client.optim_step(AdamParams(1e-2)).result(SECONDS)
    for both in clients[1:]:
        assert_close(*(adapter_of(client).named() for client in both.each()), EXACT)


@pytest.mark.parametrize("saved_by", [0, 1], ids=["shared", "alone"])
def test_restored_and_loaded_weights(sides: Connect, saved_by: int) -> None:
    """A checkpoint of either opens in both."""
    both, data = sides(), grouped(2, 2, 18)
    other = sides(seed=1)
    for client in other.each():
        client.forward_backward(data, "cross_entropy")
        client.optim_step(AdamParams(1e-2))
    path = other.each()[saved_by].save_state("there", overwrite=True).result(SECONDS).path
    for client in both.each():
        client.load_state_with_optimizer(path).result(SECONDS)
    for _ in range(2):
        both.agree(lambda c: c.forward_backward_custom(data, dpo))
        for client in both.each():
            client.optim_step(AdamParams(1e-2)).result(SECONDS)
    assert_close(*(adapter_of(client).named() for client in both.each()), EXACT)


@pytest.mark.parametrize("seed", [7, None])
def test_samples(sides: Connect, seed: int | None) -> None:
    """Also without a seed: the numbers are drawn as one process draws them."""
    both = sides()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    params = SamplingParams(max_tokens=20, seed=seed, stop=["no such text"])
    found: list[list[Any]] = []
    for client in both.each():
        sampler = client.save_weights_and_get_sampling_client()
        torch.manual_seed(3)
        futures: list[Any] = [
            sampler.sample(ModelInput.from_ints(prompt), 3, params, True, 2) for prompt in prompts
        ]
        found.append([future.result(SECONDS) for future in futures])
        scored = sampler.compute_logprobs(ModelInput.from_ints(prompts[2])).result(SECONDS)
        assert scored[1:] == pytest.approx(found[-1][2].prompt_logprobs[1:], rel=1e-6)
    for ours, theirs in zip(*found, strict=True):
        assert [s.tokens for s in ours.sequences] == [s.tokens for s in theirs.sequences]
        assert [s.stop_reason for s in ours.sequences] == ["length"] * 3
        for a, b in zip(ours.sequences, theirs.sequences, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, rel=1e-6)
        for a, b in zip(
            ours.topk_prompt_logprobs[1:], theirs.topk_prompt_logprobs[1:], strict=True
        ):
            assert [i for i, _ in a] == [i for i, _ in b]
            assert isinstance(a[0], tuple)


# ---- images --------------------------------------------------------------------------------------


def test_images_are_read_where_they_are_needed(
    two: Two, whole: Connect, small_tokenizer: Any, tmp_path: Path
) -> None:
    """Steps and samples are those of one process; each encodes the images of its share, once."""
    both = whole(folder=write("qwen3_vl", tmp_path, small_tokenizer))
    shared = engine_of(both.shared)
    images = [shared.base.image_reader().chunk(picture(n)) for n in range(4)]
    stem, end = EncodedTextChunk(list(range(10, 28))), EncodedTextChunk([30])
    prompts = [ModelInput([stem, image, end]) for image in images]
    data = [datum_from_prompt_completion(p, [50 + n, 51]) for p in prompts[:3] for n in range(2)]
    shares = shared._shares(data)
    needed = [{x.key for i in share for x in data[i].model_input.images} for share in shares]
    assert not needed[0] & needed[1]

    def encoded() -> list[set[int]]:
        lines = two.said.read_text(encoding="utf-8").splitlines()
        there = [int(x.split()[-1]) for x in lines if x.startswith(follower.ENCODED)]
        assert len(there) == len(set(there))
        known = {image.key for image in images}
        return [set(shared.scorer.tower()._kept) & known, set(there) & known]

    for _ in range(2):
        both.agree(lambda c: c.forward(data, "cross_entropy"))
        both.agree(lambda c: c.forward_backward_custom(data, squared))
        for client in both.each():
            client.optim_step(AdamParams(1e-2)).result(SECONDS)
    both.agree(lambda c: c.forward_backward_custom(data, squared))
    assert_close(*map(take_gradient, both.each()), EXACT)
    assert encoded() == needed

    found = []
    for client in both.each():
        sampler = client.save_weights_and_get_sampling_client()
        params = [SamplingParams(max_tokens=8, seed=7, stop=[])] * 2
        drawn = sampler.sample_batch(prompts[2:], 3, params)
        found.append([s for future in drawn for s in future.result(SECONDS).sequences])
    for ours, theirs in zip(*found, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logprobs == pytest.approx(theirs.logprobs, rel=1e-6)
    assert encoded() == [needed[0] | {images[2].key}, needed[1] | {images[3].key}]
    assert shared.scorer.tower().runs == len(shared.scorer.tower()._kept)


# ---- errors --------------------------------------------------------------------------------------


def raising(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    raise KeyError("mine")


def endless(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    return logprobs[-1].sum() * float("inf"), {}


FAILURES: dict[str, tuple[Any, int | None, type[Exception], str]] = {
    "the loss raises": (raising, None, LossError, "mine"),
    "the loss is infinite": (endless, None, LossError, "not finite"),
    "a forward there": (squared, follower.FAILS, RequestError, "in process 1 of 2: .*forward"),
    "a backward there": (squared, follower.FAILS_BACKWARD, RequestError, "in process 1.*backward"),
    "no room there": (squared, follower.TOO_LONG, DatumError, r"in process 1 of 2: data\[2\]"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_everything_as_it_was(whole: Connect, name: str) -> None:
    loss, token, kind, said = FAILURES[name]
    both, good = whole(), grouped(1, 3, 3)
    good[0] = grouped(1, 1, 30)[0]  # the longest, so that [1] and [2] are the other process's
    assert share_out([d.model_input.to_ints() for d in good], 2, reuse_prefixes=True)[1] == [1, 2]
    bad = good if token is None else [*good[:2], follower.beginning_with(token, good[2])]
    both.agree(lambda c: c.forward_backward_custom(good, squared))
    before = [g.clone() for g in adapter_of(both.shared).grads]
    with pytest.raises(kind, match=said):
        both.shared.forward_backward_custom(bad, loss).result(SECONDS)
    assert all(map(torch.equal, adapter_of(both.shared).grads, before))
    both.agree(lambda c: c.forward_backward_custom(good, squared))
    assert_close(*map(take_gradient, both.each()), EXACT)


def test_a_failure_here_ends_the_request_there(
    whole: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process's forward, and in its backward, while the other one has done its part."""
    both, data = whole(), grouped(3, 2, 20)
    engine = engine_of(both.shared)
    score_batch = engine.scorer.score_batch

    def broken(batch: Any) -> Any:
        raise RuntimeError("the forward broke")

    def broken_later(batch: Any) -> Any:
        found = score_batch(batch)
        found.register_hook(follower.failing)
        return found

    for kind in (broken, broken_later):
        with monkeypatch.context() as patch:
            patch.setattr(engine.scorer, "score_batch", kind)
            with pytest.raises(RuntimeError, match="broke"):
                both.shared.forward_backward_custom(data, squared).result(SECONDS)
        assert adapter_of(both.shared).grads is None
    both.agree(lambda c: c.forward_backward_custom(data, squared))
    assert_close(*map(take_gradient, both.each()), EXACT)


def test_a_model_that_is_not_there(two: Two, whole: Connect, tmp_path: Path) -> None:
    assert two.other.poll() is None
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="base_model"):
        service.create_lora_training_client(str(tmp_path)).result(SECONDS)
    service.close()
    whole().agree(lambda c: c.forward_backward_custom(grouped(2, 1, 5), squared))


# ---- sharded models ------------------------------------------------------------------------------


def test_an_architecture_that_is_not_sharded(make_sides: Connect) -> None:
    """It is refused by name, in all processes, which stay together."""
    with pytest.raises(ModelError, match=r"shard: .*architecture.* GPT2LMHeadModel"):
        make_sides("sharded", "gpt2")
    make_sides("sharded").agree(lambda c: c.forward_backward_custom(grouped(2, 1, 5), squared))


def test_bytes_held_by_a_process(make_sides: Connect, model_folder: Callable[..., str]) -> None:
    """Half of the layers, and the ends whole. What memory limits reckon with has FSDP's part of the
    ends and two gathered layers as well."""
    both = make_sides("sharded", "llama")
    both.agree(lambda c: c.forward_backward(grouped(2, 2, 18), "cross_entropy"))
    model = engine_of(both.shared).base.model
    held = {"layers": 0, "ends": 0}
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            local = p.to_local() if hasattr(p, "to_local") else p
            held["layers" if ".layers." in name else "ends"] += local.untyped_storage().nbytes()
    skeleton = memory_table.skeleton(model_folder("llama"), torch.float64)
    layers = memory.weight_bytes(skeleton.model.layers)
    ends = memory.weight_bytes(skeleton) - layers
    assert held == {"layers": layers // 2, "ends": ends}
    whole_layers = 2 * layers // len(skeleton.model.layers)
    assert memory.weight_bytes(model) == layers // 2 + ends + ends // 2 + whole_layers
    assert memory.sharded_weight_bytes(skeleton, 2) == memory.weight_bytes(model)


def test_graphs_are_counted_without_gathered_weights(make_sides: Connect) -> None:
    both, data = make_sides("sharded"), grouped(2, 2, 100)
    both.agree(lambda c: c.forward_backward_custom(data, squared))
    counted = []
    for client in both.each():
        params = list(adapter_of(client).slot.params.values())
        counted.append(engine_of(client).limits.graph_bytes(params).whole)
    assert counted[0] < 1.2 * counted[1]


# ---- shares --------------------------------------------------------------------------------------


def lists_of(data: list[Datum]) -> list[list[int]]:
    return [d.model_input.to_ints() for d in data]


@pytest.mark.parametrize(("groups", "members"), [(8, 2), (4, 8), (5, 3)])
def test_groups_with_a_prompt_of_their_own_stay_whole(groups: int, members: int) -> None:
    shares = share_out(lists_of(grouped(groups, members, 60)), 2, reuse_prefixes=True)
    assert sorted(i for share in shares for i in share) == list(range(groups * members))
    for share in shares:
        assert all(i - i % members + j in share for i in share for j in range(members))
    assert abs(len(shares[0]) - len(shares[1])) <= members


def test_one_prompt_for_all_is_split() -> None:
    shares = share_out(lists_of(grouped(1, 16, 60)), 2, reuse_prefixes=True)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_a_system_prompt_does_not_hold_pairs_together() -> None:
    """All share 20 tokens, pairs 60: pairs stay whole, the system prompt is computed twice."""
    lists = [[*range(20), *ids] for ids in lists_of(grouped(6, 2, 40))]
    shares = share_out(lists, 2, reuse_prefixes=True)
    assert sorted(map(len, shares)) == [6, 6]
    assert all(i ^ 1 in share for share in shares for i in share)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_are_balanced(size: int) -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 100, n).tolist() for n in rng.integers(60, 512, 8 * size)]
    shares = share_out(lists, size, reuse_prefixes=True)
    loads = [sum(len(lists[i]) for i in share) for share in shares]
    assert max(loads) <= 1.05 * sum(loads) / size


def test_fewer_than_processes() -> None:
    assert share_out([[1, 2], [3]], 4, reuse_prefixes=True) == [[0], [1], [], []]
    assert share_out([], 2, reuse_prefixes=True) == [[], []]


@pytest.mark.parametrize("form", ["logprobs", "vocab_logprobs"])
def test_a_process_without_data(connect: Callable[..., TrainingClient], form: Any) -> None:
    """A batch with fewer datums than processes: the gradient of nothing is zero."""
    client = connect()
    ours, adapter = engine_of(client), adapter_of(client)
    assert ours.score(adapter, [], []) == ours.hidden(adapter, [], []) == []
    with ours.score_with_graph(adapter, [], form, []) as scored:
        assert scored.logprobs == []
        grads = scored.pull_back([])
    assert [g.shape for g in grads] == [p.shape for p in adapter.params]
    assert not any(g.any() for g in grads)


def test_distinct_tokens_are_those_laid_out() -> None:
    from cookbook_core.backend.local.scoring.packing import lay_out

    lists = sorted(lists_of(grouped(3, 3, 25)))
    common = [
        next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in itertools.pairwise(lists)
    ]
    for members in ([0, 1, 2], [0, 4, 5, 8], [3]):
        layout = lay_out([lists[i] for i in members])
        assert distinct_tokens(members, list(map(len, lists)), common) == len(layout.tokens)
