"""Runs and checkpoints over REST, sessions, and the page for people."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

from tests.conftest import make_random_data
from tests.serve.running import NAME, Wire, adam, scoring

import pytest
from safetensors.numpy import load


@pytest.fixture(scope="module")
def trained(running):
    """A client with one step, saved twice; (client, model, its two paths)."""
    with Wire(running.url) as client:
        model = client.start()
        client.call("forward_backward", scoring(model, 1, make_random_data(2)))
        client.call("optim_step", adam(model, 2))
        more = {"user_metadata": {"note": "a < b"}}
        one = client.call("save_weights", {"model_id": model, "seq_id": 3, "path": "one", **more})
        two = client.call(
            "save_weights_for_sampler", {"model_id": model, "seq_id": 4, "path": "two"}
        )
        yield client, model, [one["path"], two["path"]]


def test_lists(trained):
    client, model, paths = trained
    listed = client.get(f"training_runs/{model}/checkpoints").json()
    assert {row["tinker_path"] for row in listed["checkpoints"]} == set(paths)
    by_kind = {row["checkpoint_type"]: row for row in listed["checkpoints"]}
    assert by_kind["training"]["user_metadata"] == {"note": "a < b"}
    assert by_kind["training"]["size_bytes"] > by_kind["sampler"]["size_bytes"] > 0
    run = client.get(f"training_runs/{model}").json()
    assert (run["base_model"], run["lora_rank"]) == (NAME, 4)
    assert run["last_checkpoint"]["tinker_path"] == paths[0]
    page = client.get("checkpoints?limit=1&offset=1").json()
    assert len(page["checkpoints"]) == 1
    assert page["cursor"]["total_count"] >= 2
    for query in ("limit=-1", "offset=x", "limit=99999999999"):
        assert client.get(f"checkpoints?{query}").status_code == 422
    for path in ("training_runs/dead:train:0", "training_runs/dead:train:0/checkpoints"):
        assert client.get(path).status_code == 404
    info = client.post("weights_info", {"tinker_path": paths[0]}).json()
    assert info["train_attn"]
    assert info["train_mlp"]
    assert not info["train_unembed"]
    session = client.get(f"sessions/{client.session}").json()
    assert session["training_run_ids"] == [model]
    assert client.session in client.get("sessions").json()["sessions"]


def test_an_archive_holds_the_weights(trained):
    client, model, _ = trained
    link = client.get(f"training_runs/{model}/checkpoints/weights/one/archive")
    assert link.status_code == 302
    tar = tarfile.TarFile(fileobj=io.BytesIO(client.http.get(link.headers["location"]).content))
    names = set(tar.getnames())
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= names
    weights = tar.extractfile("adapter_model.safetensors")
    assert weights is not None
    assert load(weights.read())


def paths_of_sdks() -> set[str]:
    """Every path that the installed SDKs can call, with "x" for what they fill in."""
    found = set()
    for folder in (Path(sys.prefix) / "sdk").glob("*/tinker"):
        for file in folder.rglob("*.py"):
            if not file.name.endswith("_test.py"):
                text = file.read_text(encoding="utf-8")
                found |= set(re.findall(r"""["']/api/v1/([^"'?]+)["']""", text))
    return {re.sub(r"\{[^}]+\}", "x", path) for path in found}


def test_every_path_of_the_sdks_is_served_or_refused_by_name(running, client):
    """A refusal has a sentence and a status that clients do not retry."""
    paths = paths_of_sdks()
    if not paths:
        pytest.skip("no SDK beside the packages; make test installs them")
    refused = set()
    for path in paths:
        path = path.replace("checkpoints/x", "checkpoints/weights/x")  # an id has two parts
        replies = [client.http.request(m, f"/api/v1/{path}") for m in ("GET", "POST", "DELETE")]
        unknown = [r for r in replies if r.status_code == 404 and "endpoint" in r.text]
        assert not unknown, path
        if all("not offered by this server" in reply.text for reply in replies):
            assert {reply.status_code for reply in replies} == {422}
            assert all(reply.json()["error"]["fix"] for reply in replies)
            refused.add(path)
    one = "training_runs/x/checkpoints/weights/x"
    assert refused == {
        "audit", "auth/apikey/me", "auth/token", "billing/usage/checkpoints/current",
        "billing/usage/events", "copy_weights", "join_sampling_session", "retrieve_futures",
        "save_weights_external", "sessions/search", "sessions/x/project", "sessions/x/trace_export",
        f"{one}/external_weights_urls", f"{one}/publish", f"{one}/ttl",
    }  # fmt: skip


class Cells(HTMLParser):
    """The text of a page's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_page_shows_what_runs(trained, running):
    client, model, paths = trained
    reply = client.http.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    assert 'http-equiv="refresh"' in reply.text
    assert "<script" not in reply.text
    page = Cells()
    page.feed(reply.text)
    assert {NAME, model, client.session, *paths} <= set(page.cells)
    assert "1" in page.cells  # a step
    with Wire(running.url, agent="<b>bold</b>") as other:
        other.start()
        assert "<b>bold" not in client.http.get("/").text


def test_deletion(trained):
    client, model, paths = trained
    one = f"/api/v1/training_runs/{model}/checkpoints/sampler_weights/two"
    assert client.http.delete(one).status_code == 204
    assert client.http.delete(one).status_code == 404
    assert client.post("weights_info", {"tinker_path": paths[1]}).status_code == 404
    assert client.post("weights_info", {"tinker_path": paths[0]}).status_code == 200
