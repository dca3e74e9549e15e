"""Thinking Machines' `tinker-cookbook`, its own helpers and training loops, on this backend.

Skipped where it or the `tinker` SDK is not installed. Its loops make their own client with
`tinker.ServiceClient(...)`; only that name is replaced, by this package's.
"""

# ruff: noqa: E402 (what is imported late may not be installed)
from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

sdk = pytest.importorskip("tinker")
pytest.importorskip("tinker_cookbook", minversion="0.6")

from cookbook_core import chat, datum_from_tokens_weights, tinker
from cookbook_core.clients import add_ref_logprobs
from cookbook_core.tinker.sdk_objects import own_data
from cookbook_core.types.model_input import own_input
from recipes.dpo import dpo_loss
from tests.tiny_vision import picture

import chz
import datasets
import torch
from tinker_cookbook import renderers
from tinker_cookbook.completers import TinkerMessageCompleter, TinkerTokenCompleter
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.common import compute_mean_nll, datum_from_model_input_weights
from tinker_cookbook.supervised.data import FromConversationFileBuilder, conversation_to_datum
from tinker_cookbook.supervised.nll_evaluator import NLLEvaluator, SamplerNLLEvaluator
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

ASSETS = Path(tinker.__file__).parents[1] / "assets"
MODEL = str(ASSETS / "tiny_model")
RENDERER = "qwen3_instruct"  # the cookbook's name for the tiny model's chat template
ROWS = 24


def rows_of(name: str, count: int = ROWS) -> list[dict]:
    lines = (ASSETS / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


class SeededServiceClient(tinker.ServiceClient):
    """Their loops give adapters no seed; with one, a run can be repeated and compared."""

    def create_lora_training_client(self, *args: Any, **options: Any) -> Any:
        return super().create_lora_training_client(*args, **{"seed": 0, **options})


@pytest.fixture
def on_this_machine(monkeypatch, tmp_path):
    """Their loops with our client, whose checkpoints go to a new folder each time, as a service
    keeps runs apart; the loggers they set up are put back afterwards."""
    count = itertools.count()

    def connect(**options: Any) -> tinker.ServiceClient:
        folder = tmp_path / f"checkpoints-{next(count)}"
        return SeededServiceClient(device="cpu", checkpoint_dir=folder, **options)

    monkeypatch.setattr(sdk, "ServiceClient", connect)
    monkeypatch.setattr(train, "fetch_model_pricing", lambda name: None)  # asks a web page
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield connect
    root.level, root.handlers[:] = before


@pytest.fixture
def client(service):
    made = service.create_lora_training_client("tiny", rank=8, seed=0)
    return made.result(60)


@pytest.fixture
def renderer(client):
    return renderers.get_renderer(RENDERER, client.get_tokenizer())


def common(batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=128,
        batch_size=batch_size,
    )


def config_of(kind: Any, log_path: Path, builder: Any, **options: Any) -> Any:
    """A configuration of one of their loops."""
    return kind(
        log_path=str(log_path),
        model_name=MODEL,
        recipe_name="test",
        renderer_name=RENDERER,
        dataset_builder=builder,
        lora_rank=8,
        **options,
    )


def logged(log_path: Path) -> list[dict[str, Any]]:
    lines = (log_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- supervised ---------------------------------------------------------------------------------


def test_their_datums_are_ours(client, renderer):
    """A conversation becomes the same tokens, targets and weights through either library."""
    for row in rows_of("sft_train.jsonl"):
        messages = [*row["prompt"], *row["completion"]]
        theirs = conversation_to_datum(messages, renderer, max_length=128, reduction="none")
        mine = datum_from_tokens_weights(*chat.render_messages(client.get_tokenizer(), messages))
        assert len(theirs.model_input.chunks) > 1
        assert theirs.model_input.to_ints() == mine.model_input.to_ints()
        for key in ("target_tokens", "weights"):
            assert theirs.loss_fn_inputs[key].tolist() == mine.loss_fn_inputs[key].tolist()


@pytest.mark.parametrize("max_length", [None, 13, 11, 9, 6])
def test_their_datums_with_images_are_ours(max_length):
    """An image is kept whole or left out, and never the last chunk."""
    image = sdk.types.ImageChunk(data=picture(0), format="png", expected_tokens=4)
    text = [sdk.EncodedTextChunk(tokens=tokens) for tokens in ([5, 6, 7], [8], [9, 10])]
    theirs = sdk.ModelInput(chunks=[text[0], image, text[1], image, text[2]])
    weights = [0, 1, 1, *[0] * 4, 1, *[0] * 4, 0.5, 1]
    given = datum_from_model_input_weights(theirs, torch.tensor(weights), max_length)
    (own,) = own_data([given])
    ours = datum_from_tokens_weights(own_input(theirs), weights, max_length)
    assert own.model_input.keys() == ours.model_input.keys()
    for key, values in ours.loss_fn_inputs.items():
        assert own.loss_fn_inputs[key].tolist() == values.tolist()


def test_their_nll_is_ours(client, renderer):
    """From the results of a forward_backward, a forward and a sampling client."""
    rows = [[*row["prompt"], *row["completion"]] for row in rows_of("sft_train.jsonl", 8)]
    theirs = [conversation_to_datum(row, renderer, None, reduction="none") for row in rows]
    weights = [datum.loss_fn_inputs["weights"] for datum in theirs]
    output = client.forward_backward(theirs, "cross_entropy").result()
    mean_nll = compute_mean_nll([out["logprobs"] for out in output.loss_fn_outputs], weights)
    tokens = sum(float(w.to_torch().sum()) for w in weights)
    assert mean_nll == pytest.approx(output.loss / tokens, rel=1e-5)

    sampler = client.save_weights_and_get_sampling_client().result()
    tokenizer = client.get_tokenizer()
    sampled = asyncio.run(SamplerNLLEvaluator(theirs, tokenizer=tokenizer)(sampler))
    with pytest.warns(DeprecationWarning, match="NLLEvaluator"):
        trained = asyncio.run(NLLEvaluator(theirs, tokenizer=tokenizer)(client))
    assert sampled == pytest.approx(trained, rel=1e-5)
    assert sampled["test/nll"] == pytest.approx(mean_nll, rel=1e-5)


def test_their_supervised_loop_learns_and_resumes(on_this_machine, tmp_path):
    """`supervised.train.main` as it is: held-out NLL falls, checkpoints are written, and a second
    call resumes from the last of them. Its first NLL is that of this package's forward."""
    file = tmp_path / "rows.jsonl"
    rows = [[*row["prompt"], *row["completion"]] for row in rows_of("sft_train.jsonl", 40)]
    lines = [json.dumps({"messages": messages}) for messages in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    builder = FromConversationFileBuilder(
        common_config=common(8), file_path=str(file), test_size=8, shuffle_seed=0
    )
    options = {"learning_rate": 1e-2, "lr_schedule": "constant", "eval_every": 2, "save_every": 3}
    log = tmp_path / "log"
    asyncio.run(train.main(config_of(train.Config, log, builder, num_epochs=1, **options)))
    first = logged(log)
    assert len(first) == 4
    assert first[2]["test/nll"] < 0.8 * first[0]["test/nll"]
    assert first[3]["train_mean_nll"] < 0.5 * first[0]["train_mean_nll"]
    assert all(row["grad_norm"] > 0 and math.isfinite(row["train_mean_bpb"]) for row in first)

    train_set, _ = builder()
    train_set.set_epoch(seed=0)
    batch = train_set.get_batch(0)
    with on_this_machine() as service:
        fresh = service.create_lora_training_client(MODEL, rank=8).result(60)
        loss = fresh.forward(batch, "cross_entropy").result().loss  # their weights: a mean per row
    assert first[0]["train_mean_nll"] == pytest.approx(loss / len(batch), rel=1e-5)

    asyncio.run(train.main(config_of(train.Config, log, builder, num_epochs=2, **options)))
    rows_after = logged(log)
    assert [row["step"] for row in rows_after] == list(range(8))
    assert rows_after[6]["test/nll"] < first[2]["test/nll"]
    saved = [json.loads(line) for line in (log / "checkpoints.jsonl").open(encoding="utf-8")]
    assert all((Path(row["state_path"]) / "adapter_config.json").is_file() for row in saved)


def test_their_completers(client, renderer):
    sampler = client.save_weights_and_get_sampling_client().result()
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = renderer.build_generation_prompt(messages)
    complete = TinkerTokenCompleter(sampler, max_tokens=8, context_window=512)
    completion = asyncio.run(complete(prompt, stop=renderer.get_stop_sequences()))
    assert len(completion.tokens) == len(completion.maybe_logprobs) > 0
    assert completion.stop_reason in ("stop", "length")
    say = TinkerMessageCompleter(sampler, renderer, max_tokens=8)
    assert asyncio.run(say(messages))["role"] == "assistant"


# ---- preferences --------------------------------------------------------------------------------


@chz.chz
class BundledPairs(ComparisonDatasetBuilder):
    def get_train_and_test_datasets(self) -> Any:
        return datasets.Dataset.from_list(rows_of("dpo_train.jsonl")), None

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison:
        pair = Comparison(example["prompt"], example["rejected"], example["chosen"])
        return LabeledComparison(pair, "B")


def test_their_dpo_loop_is_our_dpo(on_this_machine, tmp_path):
    """`preference.train_dpo.main` as it is: ln 2 at step 0, with a margin of 0, and then, step
    by step, the losses of our own recipe's loss on the same batches."""
    builder = DPODatasetBuilderFromComparisons(
        common_config=common(8), comparison_builder=BundledPairs()
    )
    config = config_of(
        train_dpo.Config,
        tmp_path / "log",
        builder,
        learning_rate=2e-3,
        dpo_beta=0.5,
        eval_every=0,
        infrequent_eval_every=0,
        save_every=0,
    )
    train_dpo.main(config)
    theirs = logged(tmp_path / "log")
    assert len(theirs) == 3
    assert theirs[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-7)
    # not to the bit: it asks for reference logprobs one by one, each of which is scored alone
    assert theirs[0]["margin"] == pytest.approx(0.0, abs=1e-6)
    assert all(b["dpo_loss"] < a["dpo_loss"] - 1e-3 for a, b in itertools.pairwise(theirs))
    assert (tmp_path / "checkpoints-0" / "model-0" / "weights" / "final").is_dir()

    train_set, _ = builder()
    train_set.set_epoch(seed=0)
    with on_this_machine() as service:
        client = service.create_lora_training_client(MODEL, rank=8).result(60)
        reference = service.create_lora_training_client(MODEL, rank=8).result(60)
        for i, row in enumerate(theirs):
            data = add_ref_logprobs(reference, train_set.get_batch(i))
            result = client.forward_backward_custom(
                data, lambda data, logprobs: dpo_loss(data, logprobs, beta=0.5)
            ).result()
            assert result.loss == pytest.approx(row["dpo_loss"], abs=1e-5)
            assert result.metrics["reward_margin"] == pytest.approx(row["margin"], abs=1e-5)
            adam = tinker.AdamParams(learning_rate=row["learning_rate"], eps=config.adam_eps)
            client.optim_step(adam).result()


def test_their_dpo_loss_function(client, renderer):
    """Its value and our recipe's on the same logprobs."""
    rows = rows_of("dpo_train.jsonl", 3)
    data = [
        conversation_to_datum([*row["prompt"], *row[side]], renderer, None, reduction="none")
        for row in rows
        for side in ("chosen", "rejected")
    ]
    torch.manual_seed(0)
    policy = [torch.randn(d.model_input.length).abs().neg() for d in data]
    ref = [torch.randn(d.model_input.length).abs().neg() for d in data]
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in data]
    sums = [[lp.dot(w) for lp, w in zip(lps, weights, strict=True)] for lps in (policy, ref)]
    theirs, _ = train_dpo.compute_dpo_loss(
        sums[0][0::2], sums[0][1::2], sums[1][0::2], sums[1][1::2], dpo_beta=0.3
    )
    carrying = [
        sdk.Datum(
            model_input=d.model_input,
            loss_fn_inputs={**d.loss_fn_inputs, "ref_logprobs": sdk.TensorData.from_torch(lp)},
        )
        for d, lp in zip(data, ref, strict=True)
    ]
    mine, _ = dpo_loss(carrying, policy, beta=0.3)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
