"""Images through the model: against transformers' own forward, generate, and plain autograd."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cookbook_core import datum_from_prompt_completion
from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model import loading, memory, vision
from cookbook_core.backend.local.model.adapters import Adapter
from cookbook_core.backend.local.multiprocess import packets
from cookbook_core.backend.local.multiprocess.group import Packet
from cookbook_core.backend.sampling_requests import sampling_request
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.commands.export import export
from cookbook_core.errors import DatumError, ModelError
from cookbook_core.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    LoraConfig,
    ModelData,
    ModelInput,
    SamplingParams,
)
from tests.oracles.logprobs import adapter_of, assert_close, randomize
from tests.tiny_vision import FAMILIES, PACKED, picture, write

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

CE = builtin_loss("cross_entropy")
STEM = tuple(range(10, 28))


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: Any, small_tokenizer: Any) -> Callable[..., Engine]:
    """`engine_of(family, dtype="float32")`: an engine over a tiny model of that family."""
    folders: dict[str, str] = {}
    made: dict[tuple[str, str], Engine] = {}

    def engine(family: str, dtype: str = "float32") -> Engine:
        if family not in folders:
            path = tmp_path_factory.mktemp(family)
            folders[family] = write(family, path, small_tokenizer)
        key = family, dtype
        if key not in made:
            made[key] = Engine(loading.load_base_model(folders[family], "cpu", dtype))
        return made[key]

    return engine


def text(*tokens: int) -> EncodedTextChunk:
    return EncodedTextChunk(list(tokens))


def chunks_of(engine: Engine) -> list[ImageChunk]:
    """Three images of two sizes."""
    reader = engine.base.image_reader()
    return [reader.chunk(picture(n, size)) for n, size in enumerate([(40, 40), (64, 32), (40, 40)])]


def mixed(engine: Engine) -> list[Datum]:
    """Seven datums: shared prefixes with an image, other images, two images, none.

    Two images in a row where the model can tell them apart.
    """
    a, b, c = chunks_of(engine)
    between = [text(33)] if engine.scorer.tower().in_space else []
    prompts = [
        [text(*STEM), a, text(30)],
        [text(*STEM), a, text(30)],
        [text(*STEM), b, text(30)],
        [text(*STEM), c, text(30)],
        [text(40, 41), a, text(31), b, text(32)],
        [text(40, 41), b, *between, a, text(31)],
        [text(*STEM, 30)],
    ]
    ends = [(50, 51), (52, 53, 54), (50,), (55, 56), (57,), (58, 59), (60, 61)]
    return [
        datum_from_prompt_completion(ModelInput(prompt), end)
        for prompt, end in zip(prompts, ends, strict=True)
    ]


def own_inputs(engine: Engine, value: ModelInput) -> dict[str, torch.Tensor]:
    """The arguments of transformers' forward for one input, with pixels."""
    reader, config = engine.base.image_reader(), engine.base.model.config
    ids: list[int] = []
    pixels: dict[str, list[torch.Tensor]] = {}
    for chunk in value.chunks:
        if isinstance(chunk, ImageChunk):
            found = reader.pixels(chunk)
            ids += found.ids
            for name, x in found.inputs.items():
                pixels.setdefault(name, []).append(x)
        else:
            ids += chunk.tokens
    at = 1 if "pixel_attention_mask" in pixels else 0  # SmolVLM: all tiles of a text in one axis
    row = torch.tensor([ids])
    kinds = (row == config.image_token_id).long()
    inputs = {name: torch.cat(own, dim=at) for name, own in pixels.items()}
    if value.images and config.model_type == "gemma3":
        inputs["token_type_ids"] = kinds
    if value.images and config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = kinds
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **inputs}


def own_logprobs(model: Any, engine: Engine, datum: Datum) -> torch.Tensor:
    """log p of a datum's targets `(N,)` by transformers' forward with pixels."""
    logits = model(**own_inputs(engine, datum.model_input)).logits[0]
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def adapted(engine: Engine, seed: int = 1) -> Adapter:
    adapter = engine.bank.create(LoraConfig(rank=4, seed=0))
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.params:  # B starts at 0, where A has no gradient
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(0.1 * noise)
    return adapter


def plain_model(engine: Engine, adapter: Adapter, dtype: torch.dtype) -> Any:
    base = AutoModelForImageTextToText.from_pretrained(engine.base.path, dtype=dtype).eval()
    model = peft.get_peft_model(base, adapter.slot.config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    tensors = {key: t.clone() for key, t in adapter.named().items()}
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    return model


def worst(engine: Engine, adapter: Adapter, data: Sequence[Datum]) -> float:
    """The largest difference of logprobs from transformers' own forward, in nats."""
    model = plain_model(engine, adapter, torch.float32)
    with torch.no_grad():
        want = [own_logprobs(model, engine, datum) for datum in data]
    found = engine.score(adapter, data)
    return max(float((a - b).abs().max()) for a, b in zip(found, want, strict=True))


# ---- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers_own_forward(family, engine_of):
    engine = engine_of(family)
    data = mixed(engine)
    assert engine.scorer.packs_all(data) == (family in PACKED)
    assert worst(engine, adapted(engine), data) <= 1e-5
    tokens = sum(batch.tokens for batch in engine.scorer.batches(data))
    lengths = sum(datum.model_input.length for datum in data)
    assert (tokens < lengths) == (family in PACKED)  # shared prefixes once, or padding


def _another_image(monkeypatch: Any) -> None:
    own = vision.VisionTower.features
    monkeypatch.setattr(
        vision.VisionTower, "features", lambda self, chunk: own(self, self.swapped(chunk))
    )


def _flat_positions(monkeypatch: Any) -> None:
    def flat(self: Any, value: ModelInput) -> torch.Tensor:
        del self
        return torch.arange(value.length).expand(3, -1)

    monkeypatch.setattr(vision.VisionTower, "places", flat)


def _no_deepstack(monkeypatch: Any) -> None:
    own = vision.VisionTower._outputs

    def without(self: Any, chunks: Any) -> Any:
        outputs = own(self, chunks)
        for layer in outputs["mm_encoder_outputs"]["image"].deepstack_features:
            layer[0].zero_()
        return outputs

    monkeypatch.setattr(vision.VisionTower, "_outputs", without)


@pytest.mark.parametrize("change", [_another_image, _flat_positions, _no_deepstack])
def test_a_wrong_reading_fails_the_same_check(change, engine_of, monkeypatch):
    engine = engine_of("qwen3_vl")
    engine.scorer.tower()
    a, _, c = chunks_of(engine)
    swap = {a.key: c, c.key: a}
    monkeypatch.setattr(
        vision.VisionTower, "swapped", lambda _, x: swap.get(x.key, x), raising=False
    )
    change(monkeypatch)
    data = [datum for datum in mixed(engine) if datum.model_input.images]
    assert worst(engine, adapted(engine), data) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_autograd(family, engine_of):
    engine = engine_of(family, "float64")
    adapter = adapted(engine)
    data = mixed(engine)
    engine.forward_backward(adapter, data, CE)
    assert adapter.grads is not None
    found = dict(zip(adapter.slot.params, adapter.grads, strict=True))
    model = plain_model(engine, adapter, torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for datum in data:
        weights = datum.loss_fn_inputs["weights"].to_torch().double()
        loss = loss - (weights * own_logprobs(model, engine, datum)).sum()
    loss.backward()
    want = {
        name.replace(".default.", "."): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    # a packed row sums the gradients of shared tokens before transformers' norms round them to
    # float32, and not after
    error = torch.stack([(found[name] - g).norm() for name, g in want.items()]).norm()
    size = torch.stack([g.norm() for g in want.values()]).norm()
    assert error <= (1e-7 if family in PACKED else 1e-12) * size
    assert_close(found, want, 1e-6 if family in PACKED else 1e-11)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_gradients_are_equal_to_the_bit_where_layers_are_recomputed(family, engine_of):
    engine = engine_of(family)
    recomputing = Engine(loading.load_base_model(engine.base.path, "cpu"), "on")
    data, grads = mixed(engine), []
    for each in (engine, recomputing):
        adapter = adapted(each)
        each.forward_backward(adapter, data, CE)
        assert adapter.grads is not None
        grads.append(adapter.grads)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_the_language_model_only(family, engine_of):
    names = engine_of(family).bank.create(LoraConfig(rank=2, seed=0)).slot.params
    assert names
    assert not [n for n in names if "visi" in n or "visual" in n or "projector" in n
                or "connector" in n]  # fmt: skip


# ---- each image once -----------------------------------------------------------------------------


def test_a_pair_and_a_group_on_one_image_are_one_run_of_the_tower(engine_of):
    engine = engine_of("qwen3_vl")
    tower = engine.scorer.tower()
    chunk = tower.reader.chunk(picture(11))
    prompt = ModelInput([text(*STEM), chunk, text(30)])
    before = tower.runs
    group = [datum_from_prompt_completion(prompt, [50 + n, 51]) for n in range(8)]
    policy, reference = adapted(engine), adapted(engine, 2)
    engine.forward_backward(policy, group[:2], CE)
    engine.score(reference, group[:2])
    engine.forward_backward(policy, group, CE)
    engine.score(reference, group)
    params = SamplingParams(max_tokens=2, seed=0)
    engine.sample(policy, [sampling_request(engine.base.data(), prompt, 8, params, False, 0)])
    assert tower.runs == before + 1
    (batch,) = engine.scorer.batches(group)
    # the prompt once; its completion's first token each, as the second is a target alone
    assert batch.tokens == prompt.length + 8


def test_features_that_were_dropped_come_back_equal_to_the_bit(engine_of):
    """A bound of three images, a hundred images: the bound holds, and all are recomputed."""
    engine = engine_of("qwen2_5_vl")
    reader = engine.base.image_reader()
    chunks = [reader.chunk(picture(100 + n)) for n in range(100)]
    size = vision.VisionTower(engine.base.model, reader, engine.base.device, 0)
    bound = 3 * size.features(chunks[0]).nbytes
    tower = vision.VisionTower(engine.base.model, reader, engine.base.device, bound)
    first = []
    for chunk in chunks:
        first.append(tower.features(chunk).rows.clone())
        assert tower.nbytes <= bound
    assert all(torch.equal(tower.features(c).rows, x) for c, x in zip(chunks, first, strict=True))
    assert tower.runs == 200


def test_features_have_no_graph(engine_of):
    engine = engine_of("qwen3_vl")
    with torch.enable_grad():
        found = engine.scorer.tower().features(chunks_of(engine)[0])
    assert not any(x.requires_grad for x in (found.rows, *found.deep))
    assert len(found.deep) == 2


def test_scoring_after_everything_was_dropped_gives_equal_bits(engine_of, monkeypatch):
    engine = engine_of("qwen3_vl")
    adapter, data = adapted(engine), mixed(engine)
    want = engine.score(adapter, data)
    tower = engine.scorer.tower()
    monkeypatch.setattr(tower, "bound", 0)
    tower._kept.clear()
    before = tower.runs
    found = engine.score(adapter, data)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert tower.runs == before + 3  # of one micro-batch, each image once all the same
    assert len(tower._kept) == 1


def test_features_to_come_are_left_free(engine_of, monkeypatch):
    """Graphs are given what is free, less what the cache of features may still take."""
    engine = engine_of("qwen2_5_vl")
    tower, free = engine.scorer.tower(), 8 << 30
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    size = engine.limits.graph_bytes(()).whole
    before = tower.nbytes
    for n in range(2):
        found = engine.limits.limits(100).graph_tokens
        assert found == int(memory.SHARE * (free - tower.bound + tower.nbytes) / size)
        tower.features(tower.reader.chunk(picture(300 + n)))
    assert tower.nbytes > before


# ---- sampling ------------------------------------------------------------------------------------


def prompts_of(engine: Engine) -> list[ModelInput]:
    """With no image, with one, with two, of different lengths."""
    a, b, _ = chunks_of(engine)
    return [
        ModelInput([text(40, 41, 42)]),
        ModelInput([text(40, 41), a, text(43)]),
        ModelInput([text(44), b, text(45), a, text(46, 47)]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_are_those_of_generate_and_logprobs_those_of_scoring(family, engine_of):
    engine, steps = engine_of(family), 10
    adapter = adapted(engine)
    model = plain_model(engine, adapter, torch.float32)
    model.generation_config.eos_token_id = None
    greedy = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    params = SamplingParams(max_tokens=steps, temperature=0, stop=[])
    prompts = prompts_of(engine)
    data = engine.base.data()
    requests = [sampling_request(data, prompt, 1, params, False, 0) for prompt in prompts]
    engine.scorer.tower()
    for prompt, response in zip(prompts, engine.sample(adapter, requests), strict=True):
        (sample,) = response.sequences
        with torch.no_grad():
            whole = model.generate(**own_inputs(engine, prompt), generation_config=greedy)
        assert sample.tokens == whole[0, prompt.length :].tolist()
        scored = engine.score(adapter, [datum_from_prompt_completion(prompt, sample.tokens)])[0]
        assert sample.logprobs == pytest.approx(scored[-steps:].tolist(), abs=1e-5)


def test_prompt_logprobs_are_none_at_images(engine_of):
    engine = engine_of("llava")
    prompt = prompts_of(engine)[1]
    datum = datum_from_prompt_completion(ModelInput(prompt.chunks[:2]), [43])
    (logprobs,) = engine.compute_logprobs(None, [datum])
    assert [lp is None for lp in logprobs] == [True, False, *[True] * 16, False]


# ---- clients and processes -----------------------------------------------------------------------


def test_clients_train_score_and_sample(engine_of, service):
    """One step on a pair lowers its loss; the sampler's logprobs are the training's."""
    reader = engine_of("qwen3_vl").base.image_reader()
    client = service.create_lora_training_client(engine_of("qwen3_vl").base.path, rank=4, seed=0)
    client = client.result(60)
    prompt = ModelInput([text(40, 41), reader.chunk(picture(0)), text(43)])
    pair = [datum_from_prompt_completion(prompt, end) for end in ([50, 51], [52])]

    def loss_fn(data: Any, logprobs: Any) -> Any:
        del data
        return -torch.nn.functional.logsigmoid(logprobs[0][-2:].sum() - logprobs[1][-1]), {}

    first = client.forward_backward_custom(pair, loss_fn).result(60)
    client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    second = client.forward_backward_custom(pair, loss_fn).result(60)
    assert second.loss < first.loss
    sampler = client.save_weights_and_get_sampling_client()
    answer = sampler.sample(prompt, 2, SamplingParams(max_tokens=3, seed=0)).result(60)
    assert len(answer.sequences) == 2
    whole = sampler.compute_logprobs(prompt.append(text(50, 51))).result(60)
    trained = second.loss_fn_outputs[0]["logprobs"].to_numpy()[-2:]
    assert whole[-2:] == pytest.approx(trained.tolist(), abs=1e-6)
    with pytest.raises(DatumError, match=r"sample\.prompt\.chunks\[1\]\.expected_tokens"):
        sampler.sample(
            ModelInput([text(5), ImageChunk(picture(0), "png", 9), text(6)]),
            1,
            SamplingParams(max_tokens=2),
        )


def test_a_resumed_client_ends_with_the_same_bits(engine_of, make_service):
    """Another process would have no features and no pixels either."""
    path = engine_of("qwen3_vl").base.path
    reader = engine_of("qwen3_vl").base.image_reader()
    prompts = [ModelInput([text(40), reader.chunk(picture(n)), text(43)]) for n in range(6)]
    data = [datum_from_prompt_completion(prompt, [50, 51]) for prompt in prompts]

    def train(client: Any, steps: range) -> None:
        for n in steps:
            client.forward_backward(data[n : n + 3], "cross_entropy").result(60)
            client.optim_step(AdamParams(learning_rate=1e-2)).result(60)

    whole = make_service().create_lora_training_client(path, rank=4, seed=0).result(60)
    train(whole, range(2))
    saved = whole.save_state("cut").result(60).path
    train(whole, range(2, 4))
    resumed = make_service().create_training_client_from_state_with_optimizer(saved).result(60)
    train(resumed, range(2, 4))
    ends = [adapter_of(client).named() for client in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_images_reach_other_processes_as_they_are(engine_of):
    data = mixed(engine_of("llava"))
    sent = packets.datum_packet(data, [1, 5, 6])
    assert len(sent.header["inputs"]["files"]) == 2  # of three images, two are the same
    received = packets.datums_in(through_json(sent))
    assert [d.model_input for d in received] == [data[i].model_input for i in (1, 5, 6)]
    params = SamplingParams(max_tokens=2)
    prompts = [ModelInput.from_ints([5, 6]), data[5].model_input, data[5].model_input]
    requests = [sampling_request(ModelData(), p, 3, params, False, 0) for p in prompts]
    sent = packets.sample_packet(requests)
    assert len(sent.header["inputs"]["files"]) == 2
    assert packets.sample_requests(through_json(sent)) == requests


def through_json(packet: Packet) -> Packet:
    return Packet(json.loads(json.dumps(packet.header)), packet.tensors)


# ---- bad input -----------------------------------------------------------------------------------


def scored(engine: Engine, *chunks: Any) -> Any:
    value = ModelInput(chunks)
    datum = Datum(value, {"target_tokens": [5] * value.length})
    good = Datum(ModelInput([text(5)]), {"target_tokens": [5]})
    return engine.forward_backward(engine.bank.create(LoraConfig(rank=2)), [good, datum], CE)


def test_a_text_model_refuses_an_image(model_folder):
    engine = Engine(loading.load_base_model(model_folder(), "cpu"))
    chunk = ImageChunk(picture(0), "png", 4)
    with pytest.raises(DatumError, match=r"data\[1\]\.model_input\.chunks\[1\].*text only"):
        scored(engine, text(5), chunk, text(6))
    with pytest.raises(DatumError, match=r"sample\.prompt\.chunks\[1\].*text only"):
        engine.check_prompt(ModelInput([text(5), chunk, text(6)]), "sample")


def test_bad_images_are_refused_before_anything_changes(engine_of):
    engine = engine_of("qwen3_vl")
    a, *_ = chunks_of(engine)
    token = engine.base.model.config.image_token_id
    cases = [
        ([ImageChunk(a.data, "png", 5)], r"\[1\]\.expected_tokens.*Expected 4, got 5"),
        ([ImageChunk(a.data[:-60], "png", 4)], r"\[1\]: the image cannot be read"),
        ([a, text(token, token)], r"\[2\]: the token that stands for images"),
        ([a, a], r"\[2\]: an image directly after another"),
    ]
    for chunks, where in cases:
        with pytest.raises(DatumError, match=r"data\[1\]\.model_input\.chunks" + where):
            scored(engine, text(5), *chunks, text(6))


def test_a_model_that_would_be_read_in_another_way_is_given_no_images(engine_of, monkeypatch):
    engine = Engine(loading.load_base_model(engine_of("qwen2_5_vl").base.path, "cpu"))
    _flat_positions(monkeypatch)
    a, *_ = chunks_of(engine)
    with pytest.raises(DatumError, match=r"chunks\[0\].*another way than the model's own"):
        scored(engine, a, text(6))


def test_an_older_transformers_is_named(engine_of, monkeypatch):
    a, *_ = chunks_of(engine_of("llava"))
    engine = Engine(loading.load_base_model(engine_of("llava").base.path, "cpu"))
    inner = type(getattr(engine.base.model, engine.base.model.base_model_prefix))
    monkeypatch.setattr(inner, "forward", lambda self, input_ids=None: None)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(DatumError, match=r"images need transformers 5\.18 or newer, and 5\.17\.0"):
        scored(engine, a, text(6))


def test_a_model_without_a_processor_trains_on_text(engine_of, tmp_path, small_tokenizer):
    path = tmp_path / "bare"
    path.mkdir()
    write("llava", path, small_tokenizer)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (path / name).unlink()
    engine = Engine(loading.load_base_model(str(path), "cpu"))
    scored(engine, text(5, 6))
    with pytest.raises(DatumError, match="image processor cannot be loaded"):
        scored(engine, ImageChunk(picture(0), "png", 16), text(6))
    del engine_of


def test_an_adapter_on_the_tower_is_given_no_images(engine_of):
    engine = engine_of("qwen3_vl")
    config = engine.bank.peft_config(LoraConfig(rank=2))
    config.target_modules = {"q_proj", "qkv"}
    adapter = engine.bank.empty(config)
    a, *_ = chunks_of(engine)
    value = ModelInput([a, text(6)])
    datum = Datum(value, {"target_tokens": [5] * value.length})
    with pytest.raises(DatumError, match=r"layers outside the language model.*visual"):
        engine.forward(adapter, [datum], CE)


# ---- exports -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_export_scores_images_as_the_client_does(engine_of, service, tmp_path):
    """As an adapter and merged, with the processor's files; llama.cpp's form is refused."""
    engine = engine_of("qwen3_vl")
    client = service.create_lora_training_client(engine.base.path, rank=4, seed=0).result(60)
    randomize(client, scale=0.05)
    data = mixed(engine)
    scored = client.forward(data, "cross_entropy").result(60).loss_fn_outputs
    ours = [output["logprobs"].to_torch() for output in scored]
    path = client.save_weights_for_sampler("final").result(60).path
    for form in ("peft", "merged"):
        out = export(path, form, tmp_path / form)
        base = engine.base.path if form == "peft" else out
        model: Any = AutoModelForImageTextToText.from_pretrained(base)
        if form == "peft":
            model = peft.PeftModel.from_pretrained(model, out)
        with torch.no_grad():
            theirs = [own_logprobs(model.eval(), engine, datum) for datum in data]
        assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= 1e-5
        for name in ("preprocessor_config.json", "processor_config.json"):
            assert (out / name).read_bytes() == (Path(engine.base.path) / name).read_bytes()
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "pipeline_tag: image-text-to-text" in card
        assert "model = AutoModelForImageTextToText" in card
    with pytest.raises(ModelError, match=r"vision tower as two files.*--mmproj"):
        export(path, "gguf-ready", tmp_path / "gguf")
