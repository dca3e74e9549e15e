"""`cookbook export`: an export computes what was trained; it is written whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cookbook_core import datum_from_prompt_completion
from cookbook_core.clients import final_adapter
from cookbook_core.commands import cli
from cookbook_core.commands.export import export
from cookbook_core.errors import CheckpointError, ConfigError, ModelError
from cookbook_core.runs import RunFlags, run_folder
from cookbook_core.runs.run_folder import find_checkpoint
from cookbook_core.storage import folders
from cookbook_core.tinker import ModelInput, SamplingParams, ServiceClient, TrainingClient
from recipes import sft
from tests.conftest import make_random_data
from tests.oracles.logprobs import randomize, slow_logprobs
from tests.test_client_contract import logprobs_of

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PROMPT = [5, 17, 40, 41, 60]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., str]
) -> Callable[..., tuple[TrainingClient, str]]:
    """`trained(arch, train_unembed)`: a float32 client with noise for A and B; its checkpoint."""

    def make(arch: str, train_unembed: bool = False) -> tuple[TrainingClient, str]:
        folder = tmp_path_factory.mktemp("checkpoints")
        service = ServiceClient(device="cpu", dtype="float32", checkpoint_dir=folder)
        client = service.create_lora_training_client(
            model_folder(arch), rank=4, seed=0, train_unembed=train_unembed
        ).result(60)
        randomize(client, scale=0.05)
        return client, client.save_weights_for_sampler("final").result(60).path

    return make


def load(folder: Path, form: str = "merged") -> Any:
    """Open the exported folder with transformers and peft alone."""
    if form != "peft":
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    base = read(folder / "adapter_config.json")["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, folder).eval()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def patch(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**(read(path) if path.exists() else {}), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values), encoding="utf-8")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def greedy(model: Any, count: int = 12) -> list[int]:
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    return made[0, len(PROMPT) :].tolist()


# ---- what is exported is what was trained --------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "llama", "gemma2", "gpt2"])
def test_round_trip(trained, model_folder, tmp_path, arch: str, train_unembed: bool) -> None:
    """Same logprobs to 1e-5 (the bare base: off by more than 1), same greedy text; llama is untied.

    A merge in place would add the unembedding's LoRA to a tied embedding too.
    """
    client, path = trained(arch, train_unembed)
    data = make_random_data(2)
    ours = logprobs_of(client, data)
    for form in ("peft", "merged"):
        out = export(path, form, tmp_path / form)
        model = load(out, form)
        if form == "merged":
            prompt = ModelInput.from_ints(PROMPT)
            params = SamplingParams(max_tokens=12, temperature=0, stop=[2])
            sampler = client.save_weights_and_get_sampling_client().result(60)
            sampled = sampler.sample(prompt, 1, params).result(60).sequences[0].tokens
            assert greedy(model) == list(sampled)
        with torch.no_grad():
            theirs = [slow_logprobs(model.double(), datum) for datum in data]
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 1e-5
    bare = AutoModelForCausalLM.from_pretrained(model_folder(arch))
    with torch.no_grad():
        off = [slow_logprobs(bare, datum) for datum in data]
    assert max((a - b).abs().max() for a, b in zip(ours, off, strict=True)) > 0.5

    tied = arch != "llama"
    saved = tensors(tmp_path / "merged")
    assert ("lm_head.weight" in saved) == (train_unembed or not tied)
    embedding = bare.get_input_embeddings().weight
    assert torch.equal(load(tmp_path / "merged").get_input_embeddings().weight, embedding)
    if tied and train_unembed:
        assert read(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    if arch == "gemma2" and train_unembed:
        with pytest.raises(ModelError, match="Gemma2ForCausalLM without an unembedding"):
            export(path, "gguf-ready", tmp_path / "gguf")
        assert not (tmp_path / "gguf").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_folder_that_peft_saved_again(trained, tmp_path) -> None:
    """peft adds the unembedding's base weight: rounded, as here, it must not replace the base's."""
    _, path = trained("llama", True)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    again = tmp_path / "again"
    model.save_pretrained(again)
    copied = export(again, "peft", tmp_path / "peft") / "adapter_model.safetensors"
    assert copied.read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    expected = tensors(export(path, "merged", tmp_path / "first"))
    merged = tensors(export(again, "merged", tmp_path / "second"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    key = "base_model.model.lm_head.base_layer.weight"
    saved = load_file(again / "adapter_model.safetensors")
    save_file({**saved, key: saved[key] + 1}, again / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight: differs"):
        export(again, "merged", tmp_path / "other")


def test_a_recipe_then_each_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two steps on the bundled model, then the command; the three load and agree."""
    monkeypatch.chdir(tmp_path)
    sizes = {"batch_size": 2, "test_rows": 2, "max_tokens": 4, "lora_rank": 4}
    sizes["dataset"] = "tiny/sft@train[:20]/test"
    sft.train(sft.Config(num_steps=2, log_path="run", **sizes), RunFlags(save_every=1))
    capsys.readouterr()
    for form in ("peft", "merged", "gguf-ready"):
        assert cli.main(["export", "run", "--to", form]) == 0
        assert capsys.readouterr().out == f"{form}: {Path('run', 'export', form)}\n"
    assert cli.main(["export", "run", "--to", "peft", "--checkpoint", "1"]) == 0
    written = {p.name for p in (tmp_path / "run" / "export").iterdir()}
    assert written == {"peft", "merged", "gguf-ready", "peft-step-000001"}

    folders = {form: tmp_path / "run" / "export" / form for form in written}
    service = ServiceClient(device="cpu", dtype="float32")
    final = next(Path("run").glob("checkpoints/*/sampler_weights/final"))
    client = service.create_training_client_from_state(str(final)).result(60)
    encode = client.get_tokenizer().encode
    data = [datum_from_prompt_completion(encode("What is 2 + 3?"), encode(" It is 5."))]
    ours = logprobs_of(client, data)
    for form in ("peft", "merged", "gguf-ready"):
        with torch.no_grad():
            theirs = [slow_logprobs(load(folders[form], form).double(), data[0])]
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 1e-5
        tokenizer = AutoTokenizer.from_pretrained(folders[form])
        assert tokenizer.chat_template == client.get_tokenizer().chat_template
        card = (folders[form] / "README.md").read_text(encoding="utf-8")
        assert "recipe: sft, checkpoint final" in card
        assert '"lora_rank": 4' in card
    assert not list(folders["peft"].glob("*optimizer*"))
    ends = GenerationConfig.from_pretrained(folders["merged"])
    assert (ends.eos_token_id, ends.pad_token_id) == ([2], 0)
    assert "<|im_end|>" in read(folders["gguf-ready"] / "tokenizer_config.json")["chat_template"]
    model_file = (folders["gguf-ready"] / "Modelfile").read_text(encoding="utf-8")
    assert 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n' in model_file
    card = (folders["gguf-ready"] / "README.md").read_text(encoding="utf-8")
    assert "convert_hf_to_gguf.py . --outtype f32" in card


# ---- dtypes, config, generation ------------------------------------------------------------------


@pytest.fixture
def base(model_folder: Callable[..., str], tmp_path: Path) -> Path:
    """A copy of a base model, to change."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))


def test_merged_in_float32_and_rounded_once(trained, model_folder, base, tmp_path) -> None:
    """A bfloat16 base stays bfloat16: W + BA in float32, then rounded; --dtype says otherwise."""
    _, path = trained("llama")
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    model.save_pretrained(base)
    patch(base / "config.json", torch_dtype="bfloat16", dtype=None)
    exact = tensors(export(path, "merged", tmp_path / "f32", dtype="float32", base_model=str(base)))
    out = export(path, "merged", tmp_path / "bf16", base_model=str(base))
    for key, rounded in tensors(out).items():
        assert rounded.dtype == torch.bfloat16
        assert exact[key].dtype == torch.float32
        assert torch.equal(rounded, exact[key].bfloat16())
    assert read(out / "config.json")["torch_dtype"] == "bfloat16"
    assert read(tmp_path / "f32" / "config.json")["torch_dtype"] == "float32"
    assert load(out).dtype == torch.bfloat16


def test_a_dtype_too_narrow_is_refused(trained, base, tmp_path) -> None:
    _, path = trained("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[99] = 1e5  # float16 ends at 65504
    model.save_pretrained(base)
    (Path(path) / "manifest.json").unlink()  # these are not the weights it was trained on
    with pytest.raises(ModelError, match=r"infinity in model\.embed_tokens\.weight.*bfloat16"):
        export(path, "merged", tmp_path / "out", dtype="float16", base_model=str(base))
    assert not (tmp_path / "out").exists()


def test_the_publishers_files_are_kept(trained, base, tmp_path) -> None:
    """Older readers know only rope_theta, which transformers 5 would not write."""
    _, path = trained("llama")
    patch(base / "config.json", rope_parameters=None, rope_theta=10000.0, n_ctx=256)
    patch(base / "generation_config.json", eos_token_id=[2, 7], do_sample=False, temperature=0.6)
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}<unk>{% endfor %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    out = export(path, "gguf-ready", tmp_path / "out", base_model=str(base))
    config = read(base / "config.json")
    assert read(out / "config.json") == config
    assert "rope_parameters" not in config
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert read(out / "tokenizer_config.json")["chat_template"] == template
    ends = GenerationConfig.from_pretrained(out)
    assert ends.eos_token_id == [2, 3, 7]  # tokenizer's, template's, base model's
    assert (ends.pad_token_id, ends.bos_token_id) == (0, 1)
    assert ends.temperature is None or ends.temperature == 1.0
    stops = (out / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "<unk>"' in stops


def test_the_base_model_may_have_moved(trained, base, tmp_path) -> None:
    """A local path is written absolute; after a move, --base_model gives the new one."""
    _, path = trained("llama")
    folder = Path(shutil.copytree(path, tmp_path / "mine"))
    (folder / "manifest.json").unlink()
    patch(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"gone.*--base_model"):
        export(folder, "peft")
    out = export(folder, "peft", base_model=str(base))
    assert out == tmp_path / "peft-mine"
    assert read(out / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert load_file(out / "adapter_model.safetensors").keys()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card.split("---")[1]
    assert f"base model: {base}" in card


def test_another_base_model_is_refused(trained, model_folder, tmp_path) -> None:
    _, path = trained("llama")
    with pytest.raises(CheckpointError, match="not the one it was trained on"):
        export(path, "merged", tmp_path / "out", base_model=model_folder("qwen3"))
    folder = Path(shutil.copytree(path, tmp_path / "foreign"))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        export(folder, "merged", tmp_path / "out", base_model=model_folder("gpt2"))
    assert not (tmp_path / "out").exists()


# ---- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch, form: str) -> None:
    _, path = trained("llama")

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(folders, "sync", full)
        with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
            export(path, form, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"not enough disk\. Expected 17 MB, got 0 MB free"):
        export(path, form, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- which checkpoint ----------------------------------------------------------------------------


def write_run(path: Path, steps: list[int], best: int | None = None, final: bool = False) -> Path:
    """A run folder with empty checkpoints, whose record has the paths of another place."""
    names = [f"weights/step-{step:06d}" for step in steps] + ["sampler_weights/final"] * final
    for name in names:
        patch(path / "checkpoints" / "model-0" / name / "adapter_config.json")
    entries = [
        {"step": step, "path": f"elsewhere/checkpoints/model-0/weights/step-{step:06d}"}
        for step in steps
    ]
    record = {"checkpoints": entries, "best": None, "values": {}, "finished": final}
    if best is not None:
        record["best"] = {"step": best, "value": 1.0}
    run_folder.write_record(path, record)
    return path


def test_a_run_s_checkpoints_are_found_where_the_run_is_now(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [20, 40, 60], best=40, final=True)
    inside = run / "checkpoints" / "model-0"
    assert find_checkpoint(run) == (inside / "sampler_weights" / "final", run)
    assert find_checkpoint(run, "best") == (inside / "weights" / "step-000040", run)
    assert find_checkpoint(run, "60") == (inside / "weights" / "step-000060", run)
    assert find_checkpoint(run, "000020") == (inside / "weights" / "step-000020", run)
    direct = inside / "weights" / "step-000020"
    assert find_checkpoint(direct) == (direct, run)
    foreign = tmp_path / "foreign"
    patch(foreign / "adapter_config.json")
    assert find_checkpoint(foreign) == (foreign, None)


def test_init_from_takes_a_run_s_final_adapter_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "sft-1", [20], final=True)
    adapter = run / "checkpoints/model-0/sampler_weights/final"
    assert final_adapter(str(run)) == str(run)  # without a config.json it is no run
    (run / "config.json").touch()
    assert final_adapter(str(run)) == str(adapter)
    assert capsys.readouterr().out == f"init_from {run}: starting from {adapter}\n"
    assert final_adapter(str(adapter)) == str(adapter)
    unfinished = write_run(tmp_path / "sft-2", [20])
    (unfinished / "config.json").touch()
    says = (
        r"Config\.init_from: .*not finished; .*Give the folder of a checkpoint that is in .*sft-2"
    )
    with pytest.raises(ConfigError, match=says):
        final_adapter(str(unfinished))


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["nowhere", "--to", "peft"], 2, "nowhere: no such folder. Expected a run folder such as"),
        (
            ["empty", "--to", "peft"],
            2,
            "empty: neither a run folder nor a checkpoint. Expected a run folder",
        ),
        (["stopped", "--to", "peft"], 2, "not finished; --resume stopped finishes it"),
        (["stopped", "--to", "peft"], 2, "Expected --checkpoint 20, --checkpoint 40, got final"),
        (["stopped", "--to", "peft", "--checkpoint", "30"], 2, "--checkpoint 40, got 30"),
        (["stopped", "--to", "peft", "--checkpoint", "best"], 2, "the untrained weights"),
        (["new", "--to", "merged"], 2, "no such checkpoint. Got final"),
        (["lora", "--to", "peft", "--checkpoint", "20"], 2, "lora is a checkpoint itself"),
        (["lora", "--to", "peft", "--dtype", "float16"], 2, "--dtype: not for --to peft"),
        (["lora", "--to", "peft", "--out", "empty"], 2, "empty: exists"),
        (["lora", "--to", "peft", "--out", "new/progress.json"], 2, "progress.json: exists"),
        (["lora", "--to", "peft"], 1, "no safetensors weights"),
        (["tinker://run/sampler_weights/final", "--to", "peft"], 1, "is on a service"),
        (["remote", "--to", "merged", "--checkpoint", "2"], 1, "tinker://a/weights/2: is on a"),
        (["broken", "--to", "merged"], 1, "progress.json: damaged"),
    ],
)
def test_mistaken_commands(
    argv: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The exit code, the mistake on stderr, and no file written."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_run(Path("stopped"), [20, 40], best=0)
    patch(Path("lora") / "adapter_config.json")
    for name, text in {
        "new": "{}",
        "broken": "{",
        "remote": '{"checkpoints": [{"step": 2, "path": "tinker://a/weights/2"}]}',
    }.items():
        Path(name).mkdir()
        (Path(name) / "progress.json").write_text(text, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["export", *argv]) == code
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_export_checks_its_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--to: unknown form.*Did you mean "merged"'):
        export(tmp_path, "merge")
    with pytest.raises(ConfigError, match="--dtype: unknown dtype"):
        export(tmp_path, "merged", dtype="float8")
