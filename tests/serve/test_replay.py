"""Exchanges recorded from real clients, sent again: the SDK 0.38.0 (Python) and Tinkex (Elixir).

recorded.jsonl has one exchange a line, made with a bundled model and without times or secrets. Ids
differ from run to run: those of the replies are put in the place of the recorded ones.
"""

from __future__ import annotations

import json
from pathlib import Path

from cookbook_core.serve import wire
from cookbook_core.storage.paths import asset_path
from tests.serve.running import Running, Wire

import numpy as np
import pytest

FILES = sorted((Path(__file__).parent / "recorded").glob("*.jsonl"))
HEADERS = ("accept", "content-type", "user-agent", "content-encoding")
IDS = ("session_id", "model_id", "request_id", "sampling_session_id", "loss_id", "path")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Running(
        str(asset_path("tiny_model")), tmp_path_factory.mktemp("served"), name="tiny"
    ) as server:
        yield server


def exchanges(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def put_ids(value, ids: dict[str, str]):
    """A recorded value with the ids of this run."""
    if isinstance(value, str):
        for old, new in sorted(ids.items(), key=lambda pair: -len(pair[0])):
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {key: put_ids(item, ids) for key, item in value.items()}
    return [put_ids(item, ids) for item in value] if isinstance(value, list) else value


def learn_ids(recorded, found, ids: dict[str, str]) -> None:
    for key in IDS:
        if isinstance(recorded.get(key), str) and isinstance(found.get(key), str):
            ids[recorded[key]] = found[key]


def body_of(recorded, ids: dict[str, str]) -> bytes:
    if isinstance(recorded, dict):  # protobuf: the ids are in two of its fields
        message = wire.parse("Request", bytes.fromhex(recorded["hex"]))
        message.model_id = put_ids(message.model_id, ids)
        for option in message.loss_fn_config_v2.values():
            option.text = put_ids(option.text, ids)
        return message.SerializeToString()
    return put_ids(recorded, ids).encode()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recorded_exchanges_get_replies_of_the_recorded_form(running, file):
    """The same statuses, and the same keys in every JSON object."""
    ids: dict[str, str] = {}
    with Wire(running.url) as client:
        for number, exchange in enumerate(exchanges(file)):
            headers = {k: v for k, v in exchange["headers"].items() if k in HEADERS}
            path = put_ids(exchange["path"], ids)
            reply = client.http.request(
                exchange["method"], path, params=exchange["query"] or None, headers=headers,
                content=body_of(exchange["body"], ids),
            )  # fmt: skip
            where = f"{file.stem}:{number + 1} {exchange['method']} {path}: {reply.text[:300]}"
            assert reply.status_code == exchange["status"], where
            if isinstance(exchange["reply"], dict):
                check_proto(bytes.fromhex(exchange["reply"]["hex"]), reply.content)
            elif exchange["reply"].startswith("{"):
                recorded, found = json.loads(exchange["reply"]), reply.json()
                learn_ids(recorded, found, ids)
                if not path.endswith("client/config"):  # flags: each server has its own
                    assert recorded.keys() <= found.keys(), where
                for key in ("type", "loss_fn_output_type", "category", "base_model", "lora_rank"):
                    assert recorded.get(key) in (found.get(key), None), where
                if "metrics" in recorded:
                    ours = {name.split(":")[0] for name in found["metrics"]}
                    theirs = {name.split(":")[0] for name in recorded["metrics"]}
                    assert theirs <= ours, where
    assert ids


def check_proto(recorded: bytes, found: bytes) -> None:
    """The same outputs: as many values for as many datums, all finite."""
    for kind in ("Output", "Samples"):
        try:
            one, other = wire.parse(kind, recorded), wire.parse(kind, found)
            break
        except Exception:
            if kind == "Samples":
                raise
    if kind == "Samples":
        assert len(one.sequences) == len(other.sequences)
        return
    for theirs, ours in zip(one.loss_fn_outputs, other.loss_fn_outputs, strict=True):
        assert ours.num_datums == theirs.num_datums
        values = np.frombuffer(ours.fields["logprobs"].data, np.float32)
        assert len(values) == len(np.frombuffer(theirs.fields["logprobs"].data, np.float32))
        assert np.isfinite(values).all()
        assert (values < 0).all()
