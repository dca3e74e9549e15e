"""Checkpoints: whole or not at all, opened by peft, nothing unpickled, nothing lost."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path

from cookbook_core.errors import CheckpointError, ConfigError
from cookbook_core.tinker import AdamParams
from tests.test_client_contract import logprobs_of, train, weights_of

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def client(service, model_folder):
    return service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()


def moments_of(client) -> list[bytes]:
    adapter = client._backend._adapter
    state = adapter.optimizer.state[adapter.flat]
    return [state[key].numpy().tobytes() for key in ("exp_avg", "exp_avg_sq", "step")]


def files_of(folder: str | Path) -> dict[str, str]:
    """Name -> hash of every file below a folder."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_four_steps_are_two_steps_saved_loaded_and_two_more(
    make_service, model_folder, random_data, arch
):
    """Pitfall 36: parameters, Adam moments and step, byte-equal."""
    folder, data = model_folder(arch), random_data(3)
    whole = make_service().create_lora_training_client(folder, rank=4, seed=0).result()
    train(whole, data, 4)
    half = make_service().create_lora_training_client(folder, rank=4, seed=0).result()
    train(half, data, 2)
    path = half.save_state("half").result().path
    service = make_service()
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    train(resumed, data, 2)
    assert weights_of(resumed) == weights_of(whole)
    assert moments_of(resumed) == moments_of(whole)
    assert resumed._backend._adapter.step == 4
    loaded = service.create_lora_training_client(folder, rank=4, seed=5).result()
    loaded.load_state_with_optimizer(path).result()
    train(loaded, data, 2)
    assert weights_of(loaded) == weights_of(whole)


def test_a_second_start_saves_beside_the_first(tmp_path, make_service, model_folder, random_data):
    """A new client takes the next folder, a resumed one its own, and two resumed ones differ."""

    def saved(client) -> str:
        path = Path(client.save_state("final", overwrite=True).result().path)
        assert path == tmp_path / "checkpoints" / client.model_id / "weights" / "final"
        return client.model_id

    folder, first, second = model_folder("qwen3"), make_service(), make_service()
    one, two = (first.create_lora_training_client(folder, rank=4).result() for _ in "12")
    train(two, random_data(3), 1)
    assert [saved(one), saved(two)] == ["model-0", "model-1"]
    path = str(tmp_path / "checkpoints/model-1/weights/final")
    continued = second.create_training_client_from_state_with_optimizer
    clients = [continued(path), second.create_training_client_from_state(path)]
    clients += [second.create_lora_training_client(folder, rank=4), continued(path)]
    ids = [saved(client.result()) for client in clients]
    assert ids == ["model-1", "model-2", "model-3", "model-4"]
    elsewhere = make_service(checkpoint_dir=tmp_path / "other")
    moved = elsewhere.create_training_client_from_state_with_optimizer(path).result()
    assert moved.model_id == "model-0"


def test_loading_without_the_optimizer_starts_it_afresh(client, service, random_data):
    data = random_data(3)
    train(client, data, 3)
    path = client.save_state("three").result().path
    fresh = service.create_training_client_from_state(path).result()
    assert weights_of(fresh) == weights_of(client)
    assert fresh._backend._adapter.optimizer is None
    client.forward_backward(data, "cross_entropy").result()
    client.load_state(path).result()
    assert client._backend._adapter.grads is None
    assert client._backend._adapter.optimizer is None


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_peft_opens_what_we_save(make_service, model_folder, random_data, arch):
    """Pitfalls 23 and 24: same logprobs through peft, unmerged and merged, with B != 0."""
    client = make_service().create_lora_training_client(model_folder(arch), rank=4).result()
    data = random_data(3)
    train(client, data, 3)
    path = client.save_weights_for_sampler("final").result().path
    ours = logprobs_of(client, data)
    base = AutoModelForCausalLM.from_pretrained(model_folder(arch))
    model = peft.PeftModel.from_pretrained(base, path).eval()

    def scored() -> list[torch.Tensor]:
        scores = []
        for datum in data:
            ids = torch.tensor([datum.model_input.to_ints()])
            with torch.no_grad():
                table = model(input_ids=ids).logits[0].log_softmax(-1)
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()
            scores.append(table.gather(1, targets[:, None])[:, 0])
        return scores

    for a, b in zip(ours, scored(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    if arch == "llama":  # its unembedding is its own; a tied one cannot be merged in place
        model = model.merge_and_unload()
        for a, b in zip(ours, scored(), strict=True):
            assert torch.allclose(a, b, atol=2e-4)


def test_we_open_what_peft_saves(service, model_folder, random_data, tmp_path):
    """Pitfall 24: a rank and alpha that are not our defaults keep their scale."""
    name, data = model_folder("qwen3"), random_data(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config).eval()
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "elsewhere")
    path = str(tmp_path / "elsewhere")
    client = service.create_training_client_from_state(path, base_model=name).result()
    assert client.get_info().lora_rank == 3
    datum = data[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs_of(client, data)[0], expected, atol=1e-5)
    train(client, data, 1)
    saved = client.save_state("more").result().path
    assert (
        json.loads(Path(saved, "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
        == 7
    )


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_what_peft_saves_again_can_be_trained_on(
    service, model_folder, random_data, tmp_path, arch, dtype
):
    """peft adds the base weight of an unembedding with LoRA, in the dtype it was loaded in."""
    name, data = model_folder(arch), random_data(2)
    client = service.create_lora_training_client(name, rank=4, seed=0).result()
    train(client, data, 1)
    path = client.save_state("first").result().path
    model = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    saved = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved["base_model.model.lm_head.base_layer.weight"].dtype == dtype
    again = service.create_training_client_from_state(str(tmp_path / "again")).result()
    assert weights_of(again) == weights_of(client)
    client.load_state(str(tmp_path / "again")).result()
    assert logprobs_of(again, data)[0].tolist() == logprobs_of(client, data)[0].tolist()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], ["q_proj"]])
def test_lora_on_an_embedding_is_trained_as_peft_trains_it(
    make_service, model_folder, random_data, tmp_path, targets
):
    """Logprobs and gradients equal to autograd through peft's model; with `save_embedding_layers`
    a folder holds base weights whose layers have no LoRA."""
    name, datum = model_folder("llama"), random_data(1)[0]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
    model = peft.get_peft_model(base, config).eval()
    params = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    for p in params.values():
        p.data = torch.randn_like(p, dtype=torch.float64) * 0.3
    model.save_pretrained(tmp_path / "foreign", save_embedding_layers=True)
    service = make_service(dtype="float64")
    loading = service.create_training_client_from_state(str(tmp_path / "foreign"), base_model=name)
    client = loading.result()
    result = client.forward_backward([datum], "cross_entropy").result()
    table = model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0].log_softmax(-1)
    targets, weights = (datum.loss_fn_inputs[k].to_torch() for k in ("target_tokens", "weights"))
    expected = table.gather(1, targets[:, None])[:, 0]
    scored = result.loss_fn_outputs[0]["logprobs"].to_torch()[weights != 0]
    assert torch.allclose(scored, expected.detach()[weights != 0], atol=1e-12)
    grads = torch.autograd.grad(-(weights.double() * expected).sum(), list(params.values()))
    adapter = client._backend._adapter
    ours = dict(zip(adapter.named(), adapter.grads, strict=True))
    assert ours.keys() == params.keys()
    for key, grad in zip(params, grads, strict=True):
        assert torch.allclose(ours[key], grad, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_folder_with_another_unembedding_is_refused(client, service, tmp_path, random_data):
    """What such an adapter computes depends on weights that this base model does not have."""
    path = client.save_state("first").result().path
    peft.AutoPeftModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    file = tmp_path / "again" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    train(client, random_data(2), 1)
    before = weights_of(client)
    wider = torch.cat([tensors[key], tensors[key][:1]])
    for changed, got in ((tensors[key] + 0.01, "3200 of 3200 numbers"), (wider, r"\(101, 32\)")):
        safetensors.torch.save_file({**tensors, key: changed}, file, {"format": "pt"})
        says = rf"lm_head\.base_layer\.weight: differs from the base model.*{got}.*base_model="
        with pytest.raises(CheckpointError, match=says):
            service.create_training_client_from_state(str(file.parent)).result()
        with pytest.raises(CheckpointError, match=says):
            client.load_state(str(file.parent)).result()
    safetensors.torch.save_file({**tensors, "base_model.model.score.weight": wider}, file)
    with pytest.raises(CheckpointError, match=r"score\.weight: neither LoRA nor a weight of"):
        client.load_state(str(file.parent)).result()
    assert weights_of(client) == before


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_tied_lora_is_refused_by_name(service, model_folder, tmp_path):
    """Tensors of an adapter are trained apart: two that have to stay equal would not."""
    name = model_folder("qwen3")
    config = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    model.save_pretrained(tmp_path / "tied")
    loading = service.create_training_client_from_state(str(tmp_path / "tied"), base_model=name)
    with pytest.raises(CheckpointError, match="ensure_weight_tying: not supported"):
        loading.result()


def test_a_relative_model_folder_is_saved_absolute(
    make_service, model_folder, tmp_path, monkeypatch
):
    """Opened from another folder, a relative name would be looked up on the Hub."""
    shutil.copytree(model_folder("qwen3"), tmp_path / "work" / "qwen")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "link")
    client = make_service().create_lora_training_client("./qwen", rank=4, seed=0).result()
    path = Path(client.save_weights_for_sampler("final").result().path)
    for file, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("state.json", "base_model"),
    ):
        content = json.loads((path / file).read_text(encoding="utf-8"))
        assert content[key] == str((tmp_path / "work" / "qwen").resolve())
    monkeypatch.chdir(tmp_path)
    assert peft.AutoPeftModelForCausalLM.from_pretrained(path)


def test_the_saved_file_changes_with_training(client, random_data):
    """Pitfall 39: adapter trained, saved file unchanged."""
    first = files_of(client.save_weights_for_sampler("first").result().path)
    train(client, random_data(2), 1)
    second = files_of(client.save_weights_for_sampler("second").result().path)
    weights = "adapter_model.safetensors"
    assert first[weights] != second[weights]
    assert first["adapter_config.json"] == second["adapter_config.json"]
    assert "optimizer.safetensors" not in first


def test_an_existing_name_is_refused_and_kept(client, random_data):
    path = client.save_state("one").result().path
    before = files_of(path)
    train(client, random_data(2), 1)
    with pytest.raises(CheckpointError, match=r"one: already exists.*overwrite=True"):
        client.save_state("one").result()
    assert files_of(path) == before
    assert client.save_state("one", overwrite=True).result().path == path
    assert files_of(path) != before
    assert [p.name for p in Path(path).parent.iterdir()] == ["one"], "no leftovers"


def test_a_failed_write_leaves_nothing_and_keeps_the_old(client, random_data, monkeypatch):
    path = client.save_state("one").result().path
    before = files_of(path)
    train(client, random_data(2), 1)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name, overwrite in (("one", True), ("two", False)):
        with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
            client.save_state(name, overwrite=overwrite).result()
    assert files_of(path) == before
    assert [p.name for p in Path(path).parent.iterdir()] == ["one"]
    monkeypatch.undo()
    client.save_state("two").result()


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "/etc/x", "", ".hidden", "a\0b", "x" * 10_000, None, "a\n"]
)
def test_names_cannot_leave_the_folder(client, name):
    with pytest.raises(CheckpointError, match="name: not usable"):
        client.save_state(name)
    with pytest.raises(CheckpointError, match="name: not usable"):
        client.save_weights_for_sampler(name)


def damaged(client, tmp_path: Path, damage) -> str:
    path = Path(client.save_state("whole").result().path)
    copy = tmp_path / "damaged"
    shutil.copytree(path, copy)
    (copy / "manifest.json").unlink()  # as in a folder that peft or another tool wrote
    damage(copy)
    return str(copy)


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def edit_config(**changes):
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return edit


DAMAGE = {
    "truncated": (truncate, "cannot be read"),
    "pickled": (pickled, "pickled ones are never opened.*adapter_model.bin"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "not a checkpoint"),
    "DoRA": (edit_config(use_dora=True), "use_dora: not supported"),
    "saved modules": (edit_config(modules_to_save=["lm_head"]), "modules_to_save: not supported"),
    "other alpha per layer": (edit_config(alpha_pattern={"q_proj": 320}), "alpha_pattern: differs"),
    "other rank": (edit_config(r=8), "r: differs from this client's adapter.*Expected 4, got 8"),
    "other alpha": (edit_config(lora_alpha=8), "lora_alpha: differs.*Expected 32, got 8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_or_foreign_folders_are_refused(client, random_data, tmp_path, name):
    damage, match = DAMAGE[name]
    train(client, random_data(2), 1)
    before = weights_of(client), moments_of(client)
    path = damaged(client, tmp_path, damage)
    with pytest.raises(CheckpointError, match=match):
        client.load_state(path).result()
    assert (weights_of(client), moments_of(client)) == before


def test_an_adapter_of_another_base_or_layout_is_refused(client, service, model_folder):
    other = service.create_lora_training_client(model_folder("llama"), rank=4).result()
    path = other.save_state("llama").result().path
    few = service.create_lora_training_client(
        model_folder("qwen3"), rank=4, train_mlp=False
    ).result()
    few_path = few.save_state("few").result().path
    before = weights_of(client)
    with pytest.raises(CheckpointError, match=r"does not fit.*tensors differ"):
        client.load_state(few_path).result()
    create = service.create_training_client_from_state
    base = r"base model: not the one .* Expected LlamaForCausalLM of .*, got GPT2LMHeadModel of"
    with pytest.raises(CheckpointError, match=base):
        create(path, base_model=model_folder("gpt2")).result()
    with pytest.raises(CheckpointError, match=r"base model: not the one"):
        client.load_state(path).result()
    (Path(path) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit.*tensors differ"):
        create(path, base_model=model_folder("gpt2")).result()
    assert weights_of(client) == before


def test_the_base_model_is_known_by_its_weights(service, make_service, model_folder, tmp_path):
    """Moved to another folder or loaded in another dtype it is the same model; with one number
    changed it is another."""
    path = service.create_lora_training_client(model_folder("qwen3"), rank=4).result()
    path = path.save_state("a").result().path
    moved = shutil.copytree(model_folder("qwen3"), tmp_path / "moved")
    for dtype in ("float32", "bfloat16", "float64"):
        make_service(dtype=dtype).create_training_client_from_state(path, str(moved)).result()
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    safetensors.torch.save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="base model: not the one it was trained on"):
        make_service().create_training_client_from_state(path, str(moved)).result()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "header"])
def test_a_damaged_file_is_found_by_its_hash(client, random_data, file, how):
    train(client, random_data(2), 1)
    path = Path(client.save_state(f"{how}-{file[0]}").result().path)
    content = bytearray((path / file).read_bytes())
    if how == "cut":
        content = content[:-1]
    elif how == "flipped":
        content[-5] ^= 1
    elif how == "header":  # the length it gives for the header is larger than any memory
        content[:8] = (2**62).to_bytes(8, "little")
    (path / file).write_bytes(content)
    if how == "gone":
        (path / file).unlink()
    before = weights_of(client), moments_of(client)
    says = {"cut": "cut short", "gone": "missing|no safetensors"}.get(how, "damaged")
    with pytest.raises(CheckpointError, match=rf"{file}.*({says})|{says}"):
        client.load_state_with_optimizer(str(path)).result()
    if how == "header":  # without a manifest too
        (path / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            client.load_state_with_optimizer(str(path)).result()
    assert (weights_of(client), moments_of(client)) == before


def test_the_manifest_describes_the_folder(client, random_data):
    train(client, random_data(2), 3)
    path = Path(client.save_state("described").result().path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert manifest["base_model"]["architecture"] == "Qwen3ForCausalLM"
    assert {"python", "torch", "transformers", "peft"} <= set(manifest["versions"])
    manifest["format"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="format: is newer"):
        client.load_state(str(path)).result()


def test_the_same_weights_under_the_same_name_are_no_mistake(client, random_data):
    path = client.save_weights_for_sampler("twice").result().path
    assert client.save_weights_for_sampler("twice").result().path == path
    train(client, random_data(2), 1)
    with pytest.raises(CheckpointError, match="already exists"):
        client.save_weights_for_sampler("twice").result()


def test_a_full_disk_leaves_what_was_there(client, random_data, tmp_path):
    """The size of files is limited, as by a quota, so that writes fail in the middle of a save."""
    resource = pytest.importorskip("resource")
    path = Path(client.save_state("full").result().path)
    contents = {p.name: p.read_bytes() for p in path.iterdir()}
    train(client, random_data(2), 1)
    before = weights_of(client), moments_of(client)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        saved = client.save_state("full", overwrite=True)
        other = client.save_state("other")
        with pytest.raises(CheckpointError, match="cannot be written"):
            saved.result()
        with pytest.raises(CheckpointError, match="cannot be written"):
            other.result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == contents
    assert [p.name for p in path.parent.iterdir()] == ["full"]  # nothing half-written beside it
    assert (weights_of(client), moments_of(client)) == before
    client.save_state("full", overwrite=True).result()


def test_a_link_out_of_the_folder_is_not_followed(client, tmp_path):
    """A link may have the checkpoint's name: the folder it points to is not touched."""
    path = Path(client.save_state("linked").result().path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine", encoding="utf-8")
    shutil.rmtree(path)
    path.symlink_to(outside, target_is_directory=True)
    with pytest.raises(CheckpointError, match="already exists"):
        client.save_state("linked").result()
    client.save_state("linked", overwrite=True).result()
    assert not path.is_symlink()
    assert [p.name for p in outside.iterdir()] == ["precious"]


def test_sampler_weights_hold_no_optimizer(client, service):
    path = client.save_weights_for_sampler("s").result().path
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        service.create_training_client_from_state_with_optimizer(path).result()
    sampler = service.create_sampling_client(model_path=path).result()
    assert sampler.get_base_model()
    assert client.create_sampling_client(path).result().get_base_model()
    with pytest.raises(ConfigError, match="model_path and base_model both missing"):
        service.create_sampling_client()


def test_user_metadata_is_kept(client):
    path = client.save_state("m", user_metadata={"note": "é"}).result().path
    state = json.loads(Path(path, "state.json").read_text(encoding="utf-8"))
    assert state["user_metadata"] == {"note": "é"}
    assert state["step"] == 0
    assert AdamParams().learning_rate == 1e-4


def test_a_swap_that_fails_keeps_the_old(client, random_data, monkeypatch):
    path = Path(client.save_state("one").result().path)
    before = files_of(path)
    train(client, random_data(2), 1)
    rename = Path.rename

    def failing(self, target):
        if Path(target) == path and "-old-" not in str(self):
            raise OSError("Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="cannot be written"):
        client.save_state("one", overwrite=True).result()
    assert files_of(path) == before
    assert [p.name for p in path.parent.iterdir()] == ["one"]


def without_a_moment(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[-1])


def with_a_cut_moment(tensors: dict[str, torch.Tensor]) -> None:
    key = sorted(tensors)[-1]
    tensors[key] = tensors[key][:1, :1].clone()


@pytest.mark.parametrize("change", [without_a_moment, with_a_cut_moment])
def test_moments_that_do_not_fit_change_nothing(client, random_data, tmp_path, change):
    """Pitfall 36: all of a checkpoint or none of it."""

    def damage(folder: Path) -> None:
        file = folder / "optimizer.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)

    train(client, random_data(2), 1)
    path = damaged(client, tmp_path, damage)
    train(client, random_data(2), 1)
    before = weights_of(client), moments_of(client)
    with pytest.raises(CheckpointError, match="optimizer"):
        client.load_state_with_optimizer(path).result()
    assert (weights_of(client), moments_of(client)) == before


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_loading_an_adapter_never_changes_the_base(
    client, service, model_folder, random_data, tmp_path, start
):
    """Pitfall 28: starts that rewrite the base model would reach every client on it."""
    name, data = model_folder("qwen3"), random_data(2)
    before = logprobs_of(client, data)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config).save_pretrained(
        tmp_path / "foreign"
    )
    edit_config(init_lora_weights=start)(tmp_path / "foreign")
    loading = service.create_training_client_from_state(str(tmp_path / "foreign"), base_model=name)
    with pytest.raises(CheckpointError, match=f"init_lora_weights.*{start}"):
        loading.result()
    assert all(torch.equal(a, b) for a, b in zip(before, logprobs_of(client, data), strict=True))


def test_what_is_not_a_lora_is_refused(service, model_folder, tmp_path):
    name = model_folder("qwen3")
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(CheckpointError, match="not a LoRA"):
        service.create_training_client_from_state(str(tmp_path / "ia3"), base_model=name).result()


def test_metadata_that_is_not_json_is_refused(client):
    with pytest.raises(CheckpointError, match="user_metadata"):
        client.save_state("m", user_metadata={"a": object()}).result()
