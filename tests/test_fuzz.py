"""Nothing a caller hands over gets past with a foreign error, or leaves a trace when refused.

Every case either works or raises one of our own errors, with where, expected and got in it; a
refused call changes no weight, gradient, optimizer moment or file, and the client works on.

CI runs a fixed set of about 1,500 cases. The long form runs about 22,000, at random, others each
time:

    COOKBOOK_FUZZ=long python -m pytest tests/test_fuzz.py

Both print how many cases ran, in all and of each property, and fail when they were fewer than
promised (1,000 and 20,000).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cookbook_core
from cookbook_core import chat, clients, data, runs, tinker, token_set
from cookbook_core.errors import CookbookError
from recipes import bradley_terry, dpo, grpo, sft
from recipes import token_set_kl as tskl
from tests import fuzz_strategies as fuzz
from tests.fuzz_strategies import junk, mostly, nasty_text, numbers, scalars

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LONG = os.environ.get("COOKBOOK_FUZZ") == "long"
TIMES, PROMISED = (15, 20_000) if LONG else (1, 1_000)
RAN: collections.Counter[str] = collections.Counter()
REFUSED = object()
RECIPES = {"sft": sft, "dpo": dpo, "bradley_terry": bradley_terry, "grpo": grpo}
RECIPES["token_set_kl"] = tskl

settings.register_profile("ci", derandomize=True)
settings.register_profile("long", derandomize=False, print_blob=True)
pytestmark = [
    pytest.mark.timeout(7200 if LONG else 300),
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # numpy's word for a silent overflow
]


def cases(count: int, **strategies: Any) -> Callable[..., Any]:
    """`count` examples in CI, more in the long form, each counted."""

    def wrap(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            RAN[test.__name__] += 1
            test(*args, **kwargs)

        chosen = settings(
            settings.get_profile("long" if LONG else "ci"),
            max_examples=count * TIMES,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        return chosen(given(**strategies)(counted))

    return wrap


def attempt(act: Callable[[], Any]) -> Any:
    """The result of `act`, or REFUSED after an error of ours: where, what, and a rule or a fix."""
    try:
        return act()
    except CookbookError as error:
        refused = error
    assert refused.where, str(refused)
    assert refused.what, str(refused)
    assert refused.expected or refused.fix, str(refused)
    return REFUSED


def digest(client: Any, folder: Path) -> str:
    """Of everything that a refused call must leave alone."""
    adapter, found = client._backend._adapter, hashlib.sha256()
    model = client._backend._backend.engine().base.model
    base = [p for name, p in model.named_parameters() if ".lora_" not in name]
    moments = adapter.optimizer.state_dict()["state"] if adapter.optimizer else {}
    moving = [t for _, state in sorted(moments.items()) for _, t in sorted(state.items())]
    for tensor in [*base, *adapter.params, *(adapter.grads or []), *moving]:
        found.update(tensor.detach().numpy().tobytes())
    found.update(repr((adapter.step, adapter.grads is None)).encode())
    for path in sorted(folder.rglob("*")):
        found.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


def good_datum(**inputs: Any) -> tinker.Datum:
    given = {"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 1.0], **inputs}
    return tinker.Datum(tinker.ModelInput.from_ints([5, 6, 7]), given)


def sum_loss(data: Any, logprobs: Any) -> Any:
    return -sum(lp.sum() for lp in logprobs), {}


@pytest.fixture(scope="module")
def live(tmp_path_factory: Any, model_folder: Any) -> Any:
    """A service, a client one step in with a gradient accumulated, a sampler, their folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    service = tinker.ServiceClient(device="cpu", dtype="float32", checkpoint_dir=folder)
    client = service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()
    client.forward_backward([good_datum()], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(1e-2)).result()
    client.forward_backward([good_datum()], "cross_entropy").result()
    start = client.save_state("start").result().path
    sampler = client.save_weights_and_get_sampling_client().result()
    names = {"service": service, "client": client, "sampler": sampler, "start": start}
    yield SimpleNamespace(**names, folder=folder, model=model_folder("qwen3"))
    service.close()


def call(live: Any, act: Callable[[], Any], changes: bool = False) -> Any:
    """Run `act` (waiting for futures); refused, or meant to change nothing, it changes nothing."""
    before = digest(live.client, live.folder)

    def finished() -> Any:
        result = act()
        return result.result(60) if isinstance(result, tinker.APIFuture) else result

    result = attempt(finished)
    if result is REFUSED or not changes:
        assert digest(live.client, live.folder) == before
    if result is REFUSED:
        output = live.client.forward([good_datum()], "cross_entropy").result(60)
        assert np.isfinite(output.loss)
    return result


def start_again(live: Any) -> None:
    """The weights back where they were: valid calls of the fuzz may have driven them anywhere."""
    live.client.load_state_with_optimizer(live.start).result(60)
    live.client.forward_backward([good_datum()], "cross_entropy").result(60)


# ---- values ----------------------------------------------------------------------------------


@cases(
    140,
    value=st.one_of(junk, fuzz.lengths.flatmap(lambda n: fuzz.arrays(n, numbers))),
    dtype=mostly(st.sampled_from(["float32", "int64", "float64"])),
    shape=st.one_of(st.none(), st.none(), st.lists(st.integers(-2, 4), max_size=3), junk),
)
def test_tensor_data(value, dtype, shape):
    made = attempt(lambda: tinker.TensorData(value, dtype, shape))
    for other in (tinker.TensorData.from_numpy, tinker.TensorData.from_torch):
        attempt(lambda make=other: make(value))
    if made is not REFUSED:
        assert list(made.to_torch().shape) == made.shape == list(made.to_numpy().shape)
        assert str(made.to_torch().dtype) == f"torch.{dtype}"
        assert len(made.data) == made.to_numpy().size
        assert attempt(lambda: tinker.TensorData(made.data, made.dtype, made.shape)) == made or (
            np.isnan(made.to_numpy()).any()
        )
        repr(made)


@cases(60, make=fuzz.model_inputs(5), token=mostly(fuzz.tokens), chunk=junk)
def test_model_input(make, token, chunk):
    made = attempt(make)
    if isinstance(made, tinker.ModelInput):
        assert made.length == len(made.to_ints())
        attempt(lambda: made.append_int(token))
        attempt(lambda: made.append(chunk))
    attempt(lambda: tinker.EncodedTextChunk(chunk).length)


@cases(80, make=fuzz.datums(), key=nasty_text, value=junk)
def test_datum(make, key, value):
    made = attempt(make)
    if made is not REFUSED:
        assert all(isinstance(v, tinker.TensorData) for v in made.loss_fn_inputs.values())
        attempt(lambda: cookbook_core.with_inputs(made, **{key: value}))


@cases(
    110,
    tokens=mostly(fuzz.lengths.flatmap(lambda n: fuzz.arrays(n, fuzz.tokens))),
    other=mostly(fuzz.lengths.flatmap(lambda n: fuzz.arrays(n, fuzz.floats))),
    max_length=mostly(st.one_of(st.none(), st.integers(0, 9))),
    reduction=mostly(st.sampled_from(["none", "mean"]), odds=6),
    extra=st.one_of(fuzz.floats, st.lists(fuzz.floats, max_size=4), junk),
    flag=st.booleans(),
)
def test_builders_of_datums(tokens, other, max_length, reduction, extra, flag):
    attempt(lambda: cookbook_core.shift_tokens(tokens))
    for pair in ((tokens, other), (tokens, [1.0] * 5), ([5, 6, 7], other), ([5, 6, 7], [0, 1, 1])):
        made = attempt(
            lambda pair=pair: cookbook_core.datum_from_tokens_weights(
                *pair, max_length, reduction=reduction, allow_zero_weights=flag
            )
        )
        if made is not REFUSED:
            n = made.model_input.length
            assert made.loss_fn_inputs["weights"].shape == [n]
            assert made.loss_fn_inputs["target_tokens"].shape == [n]
            assert np.isfinite(made.loss_fn_inputs["weights"].to_numpy()).all()
    for pair in ((tokens, [5, 6]), ([5, 6], tokens), ([5], [6, 7])):
        attempt(
            lambda pair=pair: cookbook_core.datum_from_prompt_completion(
                *pair, max_length, score_prompt=flag, advantages=extra
            )
        )
        attempt(lambda pair=pair: cookbook_core.datum_from_token_set(*pair, mine=extra))


@cases(
    80,
    datums=st.lists(fuzz.good_datums(), max_size=3),
    pair=fuzz.lengths.flatmap(
        lambda n: st.tuples(st.just(n), mostly(fuzz.arrays(n, fuzz.floats), junk))
    ),
    mode=mostly(st.sampled_from(["strict", "min_length"]), odds=8),
    flag=st.booleans(),
    key=st.one_of(st.sampled_from(["weights", "advantages", "nothing"]), nasty_text),
)
def test_alignment(datums, pair, mode, flag, key):
    n, weights = pair
    options = {"mode": mode, "allow_dropped_weights": flag}
    for logprobs in (-torch.ones(n), -torch.ones(n, 2)):
        logprobs.requires_grad_(True)
        attempt(lambda lp=logprobs: cookbook_core.align_weights(lp, weights, **options))
        for average in (cookbook_core.weighted_sum, cookbook_core.weighted_mean):
            found = attempt(lambda lp=logprobs, f=average: f(lp, weights, **options))
            assert found is REFUSED or found.shape == ()
    shapes = [d.loss_fn_inputs["target_tokens"].shape for d in datums]
    many = [-torch.ones(shape) for shape in shapes]
    attempt(lambda: cookbook_core.check_alignment(datums, many, key))
    attempt(lambda: cookbook_core.weighted_sums(datums, many, key))
    attempt(lambda: cookbook_core.weighted_sums(datums, many[1:], key))
    attempt(lambda: cookbook_core.weighted_sums(datums, key))


# ---- a live client ---------------------------------------------------------------------------


@cases(
    90,
    values=st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(tinker.AdamParams)]),
        mostly(st.floats(0, 0.999), st.one_of(numbers, scalars, junk)),
        min_size=1,
        max_size=4,
    ),
    other=st.one_of(st.none(), junk),
)
def test_adam_params(live, values, other):
    params = attempt(lambda: tinker.AdamParams(**values))
    if params is REFUSED or other is not None:
        changes = isinstance(other, tinker.AdamParams)
        call(live, lambda: live.client.optim_step(other), changes)
        start_again(live)
        return
    if call(live, lambda: live.client.optim_step(params), changes=True) is not REFUSED:
        adapter = live.client._backend._adapter
        assert all(torch.isfinite(p).all() for p in adapter.params)
    start_again(live)


METHODS = ("forward", "forward_backward", "forward_backward_custom")
BUILTIN = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]


@cases(
    110,
    makes=st.lists(fuzz.datums(), max_size=3),
    method=st.sampled_from(METHODS),
    loss=st.sampled_from(BUILTIN),
    around=mostly(st.just(list), st.sampled_from([tuple, iter, np.array, str, lambda x: None])),
)
def test_bad_datums(live, makes, method, loss, around):
    def act() -> Any:
        batch = [make() for make in makes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's about datums made into an array
            batch = around(batch)
        chosen = sum_loss if method.endswith("custom") else loss
        return getattr(live.client, method)(batch, chosen)

    call(live, act, changes=method != "forward")


@cases(
    70,
    datums=st.lists(fuzz.good_datums(), min_size=1, max_size=4),
    loss=mostly(st.sampled_from(BUILTIN), st.one_of(junk, nasty_text), 8),
    config=mostly(
        st.one_of(
            st.none(),
            st.dictionaries(
                st.sampled_from(["clip_low_threshold", "clip_high_threshold", "beta"]),
                mostly(st.floats(0.1, 2), st.one_of(numbers, junk)),
                max_size=2,
            ),
        )
    ),
    method=st.sampled_from(METHODS[:2]),
)
def test_builtin_losses(live, datums, loss, config, method):
    result = call(
        live,
        lambda: getattr(live.client, method)(datums, loss, config),
        changes=method != "forward",
    )
    if config is None and isinstance(loss, str) and loss in BUILTIN:
        assert result is not REFUSED
        shapes = [d.loss_fn_inputs["target_tokens"].shape for d in datums]
        assert [o["logprobs"].shape for o in result.loss_fn_outputs] == shapes


@cases(
    120,
    datums=st.lists(fuzz.good_datums(), min_size=1, max_size=4),
    loss=fuzz.losses(),
    form=mostly(st.sampled_from([None, "logprobs", "vocab_logprobs"]), odds=12),
    passes=st.sampled_from([None, None, 0]),
)
def test_custom_losses(live, datums, loss, form, passes):
    engine = live.client._backend._backend.engine()
    engine.limits.graph_tokens = passes
    try:
        before = [d.model_input.to_ints() for d in datums]
        result = call(
            live,
            lambda: live.client.forward_backward_custom(datums, loss, loss_type_input=form),
            changes=True,
        )
        assert [d.model_input.to_ints() for d in datums] == before
    finally:
        engine.limits.graph_tokens = None
    if result is not REFUSED:
        assert all(isinstance(v, float) for v in result.metrics.values())
        adapter = live.client._backend._adapter
        assert all(torch.isfinite(g).all() for g in adapter.grads)
        start_again(live)


@cases(
    110,
    prompt=mostly(fuzz.token_lists.map(tinker.ModelInput.from_ints), junk, 6),
    make=st.one_of(st.none(), st.none(), fuzz.model_inputs(4)),
    num_samples=mostly(st.integers(1, 3), st.one_of(scalars, junk), 6),
    values=st.fixed_dictionaries(
        {"max_tokens": mostly(st.integers(1, 4), scalars, 8)},
        optional={
            "seed": mostly(st.integers(0, 9), st.one_of(numbers, scalars)),
            "temperature": mostly(st.floats(0, 2), st.one_of(numbers, scalars)),
            "top_k": mostly(st.integers(1, 120), st.one_of(numbers, scalars)),
            "top_p": mostly(st.floats(0.01, 1), st.one_of(numbers, scalars)),
            "stop": mostly(
                st.sampled_from([None, [], "a", ["a", "b"], [2], [2, 3], ["a", 2]]),
                st.one_of(nasty_text, st.lists(scalars, max_size=2), junk),
            ),
        },
    ),
    params=st.one_of(st.none(), st.none(), st.none(), junk),
    options=st.dictionaries(
        st.sampled_from(["include_prompt_logprobs", "topk_prompt_logprobs", "prompt_alt_tokens_k"]),
        st.one_of(st.integers(0, 3), st.booleans(), junk),
        max_size=1,
    ),
)
def test_sampling(live, prompt, make, num_samples, values, params, options):
    def act() -> Any:
        given = make() if make else prompt
        chosen = tinker.SamplingParams(**values) if params is None else params
        return live.sampler.sample(given, num_samples, chosen, **options)

    result = call(live, act)
    if result is not REFUSED:
        assert len(result.sequences) == num_samples
        for sequence in result.sequences:
            assert 1 <= len(sequence.tokens) <= (values["max_tokens"] or fuzz.CONTEXT)
            assert all(0 <= token < fuzz.VOCAB for token in sequence.tokens)
            assert np.isfinite(sequence.logprobs).all()
    call(live, lambda: live.sampler.compute_logprobs(make() if make else prompt))


@cases(
    60,
    values=st.dictionaries(
        st.sampled_from(["rank", "seed", "train_mlp", "train_attn", "train_unembed", "optimizer"]),
        mostly(st.integers(1, 8), st.one_of(numbers, scalars, junk), 2),
        min_size=1,
        max_size=2,
    ),
    model=st.one_of(st.none(), st.none(), st.none(), nasty_text, junk),
)
def test_making_clients(live, values, model):
    base = live.model if model is None else model
    values = {"rank": 2, **values} if "rank" not in values else values
    made = call(live, lambda: live.service.create_lora_training_client(base, **values))
    if made is not REFUSED:
        assert np.isfinite(made.forward([good_datum()], "cross_entropy").result(60).loss)


@cases(40, name=st.one_of(nasty_text, junk), more=st.one_of(st.none(), junk), again=st.booleans())
def test_names_and_paths(live, name, more, again):
    client, service = live.client, live.service
    saved = call(live, lambda: client.save_state(name, overwrite=again), changes=True)
    if saved is not REFUSED:
        path = Path(saved.path)
        assert path.parent.parent.parent == live.folder
        call(live, lambda: client.load_state_with_optimizer(saved.path), changes=True)
    for act in (client.load_state, client.create_sampling_client):
        call(live, lambda act=act: act(name))
    for act in (service.create_training_client_from_state, service.create_sampling_client):
        call(live, lambda act=act: act(name))
        call(live, lambda act=act: act(name, live.model))
    call(live, lambda: client.save_weights_and_get_sampling_client(kind=name))
    if more is not None:
        call(live, lambda: client.save_state("mine", user_metadata=more, overwrite=True), True)
    start_again(live)


# ---- configs ---------------------------------------------------------------------------------


flags = st.one_of(
    nasty_text,
    st.sampled_from(["3", "0.5", "-1", "0", "1e400", "nan", "True", "None", "1_0", "9" * 50]),
    st.builds(lambda: "9" * 5000),
    st.sampled_from(["k2", "reverse", "all", "float32", " 7", "\u0665", "0x10", "[1]", "{}"]),
)


@cases(
    60,
    recipe=st.sampled_from(sorted(RECIPES)),
    picks=st.lists(st.tuples(st.integers(0, 30), flags), min_size=1, max_size=3),
    extra=st.lists(nasty_text, max_size=1),
)
def test_flags(recipe, picks, extra):
    fields = [f.name for f in dataclasses.fields(RECIPES[recipe].Config)]
    argv = [part for i, v in picks for part in (f"--{fields[i % len(fields)]}", v)]
    ended: list[Any] = []
    try:
        config = attempt(lambda: runs.parse_config(RECIPES[recipe].Config, [*argv, *extra])[0])
    except SystemExit as error:  # the mistake has been printed
        config, ended = REFUSED, [error.code]
    assert ended in ([], [2]) or {"-h", "--help"} & {*argv, *extra}
    if config is not REFUSED:
        assert isinstance(config, RECIPES[recipe].Config)


@cases(
    60,
    recipe=st.sampled_from(sorted(RECIPES)),
    picks=st.lists(st.tuples(st.integers(0, 30), st.one_of(numbers, junk)), min_size=1, max_size=2),
)
def test_configs(recipe, picks):
    fields = [f.name for f in dataclasses.fields(RECIPES[recipe].Config)]
    values = {fields[i % len(fields)]: value for i, value in picks}
    attempt(lambda: RECIPES[recipe].Config(**values))


# ---- rows ------------------------------------------------------------------------------------

COLUMNS: dict[str, Any] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "dpo": ("prompt", "chosen", "rejected"),
    "bradley_terry": ("prompt", "chosen", "rejected"),
    "grpo": ("prompt", "answer"),
    "token_set_kl": (("text", "label_probs"), ("question", "answer")),
}


@pytest.fixture(scope="module")
def tokenizers(small_tokenizer: Any) -> Any:
    """With a chat template, and without."""
    from transformers import AutoTokenizer

    folder = Path(cookbook_core.__file__).parent / "assets" / "tiny_model"
    return AutoTokenizer.from_pretrained(folder), small_tokenizer


def build(recipe: str, rows: list[dict], tokenizer: Any) -> Any:
    """The recipe's own way from rows to datums."""
    if recipe == "sft":
        return sft.build_data(rows, tokenizer, 512, "last")[0]
    if recipe == "dpo":
        return dpo.build_pairs(rows, tokenizer, 512)[0]
    if recipe == "bradley_terry":
        verdicts = (" yes", " no") if tokenizer.chat_template else ("y", "n")
        judge = bradley_terry.Judge(tokenizer, "Was that good?", verdicts)
        return bradley_terry.build_pairs(rows, judge, 512)[0]
    if recipe == "grpo":
        rows = clients.with_prompt_tokens(rows, tokenizer, 512)
        texts = [["a", "b"]] * len(rows)
        return (rows and clients.grade({"exact": (1.0, grpo.exact_match)}, rows, texts)) and []
    labels = tskl.Config.labels if tokenizer.chat_template else tuple("tpfge")
    return tskl.build_data(rows, tokenizer, tskl.Config(labels=labels), "train")[0]


def check_built(built: Any) -> None:
    for datum in () if built is REFUSED else built:
        n = datum.model_input.length
        assert n >= 1
        assert datum.loss_fn_inputs["target_tokens"].shape[0] == n
        assert datum.loss_fn_inputs["weights"].to_numpy().any()


recipe_rows = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda name: st.booleans().flatmap(
        lambda chats: st.tuples(st.just(name), st.lists(fuzz.rows(name, chats), max_size=3))
    )
)
recipe_files = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda name: st.tuples(st.just(name), fuzz.files(name))
)


@cases(110, given=recipe_files, chats=st.booleans(), seed=numbers, tests=mostly(st.just(1), odds=8))
def test_dataset_files(tmp_path_factory, tokenizers, given, chats, seed, tests):
    recipe, (suffix, body) = given
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(body)
    split = attempt(lambda: data.train_test(str(path), COLUMNS[recipe], tests, seed))
    assert path.read_bytes() == body
    if split is not REFUSED:
        for rows in split:
            check_built(attempt(lambda rows=rows: build(recipe, rows, tokenizers[not chats])))


@cases(80, given=recipe_rows, chats=st.booleans())
def test_rows(tokenizers, given, chats):
    recipe, rows = given
    rows = [row for row in rows if {*row} >= {*_columns(recipe, row)}]
    if any("answer" in row for row in rows) and recipe == "token_set_kl":
        rows = [row for row in rows if "question" in row]
    check_built(attempt(lambda: build(recipe, rows, tokenizers[not chats])))


def _columns(recipe: str, row: dict) -> tuple[str, ...]:
    choices = COLUMNS[recipe] if isinstance(COLUMNS[recipe][0], tuple) else (COLUMNS[recipe],)
    return next((c for c in choices if {*c} <= {*row}), choices[0])


@cases(
    60, value=st.one_of(junk, fuzz.messages("user")), other=junk, labels=junk, chats=st.booleans()
)
def test_chat(tokenizers, value, other, labels, chats):
    tokenizer = tokenizers[not chats]
    attempt(lambda: chat.render_prompt(tokenizer, value))
    for pair in ((value, other), ("a", other), ([{"role": "user", "content": "a"}], other)):
        attempt(lambda pair=pair: chat.render_completion(tokenizer, *pair))
    attempt(lambda: chat.render_completion(tokenizer, "a", "b", boundary=other))
    for conversation in (value, other):
        attempt(lambda c=conversation: chat.render_messages(tokenizer, c, "all"))
        attempt(lambda c=conversation: chat.last_text(c))
    attempt(lambda: cookbook_core.single_tokens(tokenizer, labels))
    names, row = (" a", " b"), {"label_probs": other}
    found = attempt(lambda: token_set.label_distribution(row, names, "row"))
    assert found is REFUSED or abs(sum(found) - 1) < 1e-6
    attempt(lambda: token_set.label_distribution({"answer": other}, names, "row"))


@cases(
    60,
    name=st.one_of(nasty_text, junk),
    columns=mostly(st.sampled_from([("prompt",), (("prompt",), ("text",)), "prompt", (), ((),)])),
    numbers=st.tuples(*[mostly(st.integers(0, 6), st.one_of(fuzz.numbers, scalars))] * 4),
)
def test_dataset_names_and_batches(name, columns, numbers):
    hub = isinstance(name, str) and name[:1] not in ("", "/", ".", "~") and "\0" not in name
    if not hub:  # what could be a name on the hub is asked for there, which takes its time
        attempt(lambda: data.load_rows(name, ("prompt",)))
    attempt(lambda: data.load_rows(f"tiny/{name}", ("prompt",)))
    attempt(lambda: data.load_rows(f"/nowhere/{name}", ("prompt",)))
    attempt(lambda: data.load_rows("tiny/grpo", columns))
    attempt(lambda: data.load_rows("tiny/grpo", ("prompt",), name))
    if not isinstance(numbers[0], int) or numbers[0] < 10**6:  # it orders that many rows
        attempt(lambda: data.batch_indices(*numbers))


def test_as_many_cases_as_promised(request, capsys):
    """Only when the whole file ran."""
    with capsys.disabled():
        print(f"\nfuzz: {sum(RAN.values())} cases: {dict(RAN)}")
    tests = [n for n in globals() if n.startswith("test_") and n != request.node.name]
    if all(RAN[name] for name in tests):
        assert sum(RAN.values()) >= PROMISED
