"""Nothing lost: SIGTERM saves, `kill -9` and a restart say where to resume."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cookbook_core.commands import cli
from cookbook_core.commands.serve import Settings, serve
from tests.conftest import make_random_data
from tests.serve.running import NAME, Wire, adam, scoring

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


class Process:
    """`cookbook serve` in a process of its own."""

    def __init__(self, folder: str, checkpoints: Path) -> None:
        command = [sys.executable, "-m", "cookbook_core.commands.cli", "serve", "--port", "0",
                   "--model", f"{NAME}={folder}", "--checkpoint_dir", str(checkpoints),
                   "--device", "cpu", "--dtype", "float32"]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + self.process.communicate(timeout=10)[0]
        self.url = found[0]

    def end(self, signum: int) -> int:
        self.process.send_signal(signum)
        self.log = self.process.communicate(timeout=60)[0]
        return self.process.returncode


@pytest.fixture
def start(model_folder, tmp_path):
    made: list[Process] = []

    def one() -> Process:
        made.append(Process(model_folder("qwen3"), tmp_path / "checkpoints"))
        return made[-1]

    yield one
    for process in made:
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()


def steps(client: Wire, model: str, seqs: range) -> list[float]:
    """Two requests a step; the losses."""
    losses = []
    for seq in seqs:
        data = make_random_data(3, seed=seq)
        reply = client.call("forward_backward", scoring(model, 2 * seq - 1, data))
        losses.append(reply["metrics"]["loss:sum"])
        client.call("optim_step", adam(model, 2 * seq))
    return losses


def test_killed_and_resumed_equals_uninterrupted(start):
    one = start()
    with Wire(one.url) as client:
        whole = steps(client, client.start(), range(1, 7))
        model = client.start()
        first = steps(client, model, range(1, 4))
        saved = client.call("save_weights", {"model_id": model, "seq_id": 7, "path": "three"})
        data = make_random_data(3, seed=4)
        lost = client.promise("forward_backward", scoring(model, 9, data))  # waits for 8
    one.end(signal.SIGKILL)
    two = start()
    with Wire(two.url) as client:
        began = time.monotonic()
        for reply in (
            client.post("retrieve_future", {"request_id": lost}),
            client.post("forward_backward", scoring(model, 9, data)),
            client.post("optim_step", adam(model, 10)),
        ):
            assert reply.status_code == 404
            assert f"Resume from step 3: create_training_client_from_state_with_optimizer({saved['path']!r})" in reply.json()["detail"]  # fmt: skip # noqa: E501
        assert time.monotonic() - began < 15
        body = {"tags": [], "sdk_version": "0"}
        session = client.post("create_session", body).json()["session_id"]
        made = client.call("load_weights", {
            "session_id": session, "model_seq_id": 0, "path": saved["path"], "optimizer": True,
        })  # fmt: skip
        resumed = []
        for seq in range(4, 7):
            data = make_random_data(3, seed=seq)
            own = 2 * (seq - 3)
            reply = client.call("forward_backward", scoring(made["model_id"], own - 1, data))
            resumed.append(reply["metrics"]["loss:sum"])
            client.call("optim_step", adam(made["model_id"], own))
    assert first + resumed == whole


def test_sigterm_finishes_the_queue_and_saves_what_is_not_on_disk(start):
    one = start()
    with Wire(one.url) as client:
        model, saved = client.start(), client.start()
        steps(client, saved, range(1, 3))
        client.call("save_weights", {"model_id": saved, "seq_id": 5, "path": "two"})
        for seq in range(1, 6):
            data = make_random_data(3, seed=seq)
            client.promise("forward_backward", scoring(model, 2 * seq - 1, data))
            last = client.promise("optim_step", adam(model, 2 * seq))
        assert last
    assert one.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    two = start()
    with Wire(two.url) as client:
        listed = client.get("checkpoints").json()["checkpoints"]
        paths = {row["tinker_path"] for row in listed}
        assert paths == {f"tinker://{model}/weights/autosave-5", f"tinker://{saved}/weights/two"}
        runs = client.get("training_runs").json()["training_runs"]
        assert {run["training_run_id"] for run in runs} == {model, saved}
        assert {run["base_model"] for run in runs} == {NAME}
        gone = client.post("optim_step", adam(model, 11)).json()["detail"]
        assert "Resume from step 5" in gone


def test_a_connection_made_when_the_address_is_printed_waits(monkeypatch, model_folder, tmp_path):
    reached = []

    def connect(_, sockets):
        socket.create_connection(sockets[0].getsockname(), timeout=5).close()
        reached.append(True)

    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # this process's own
    monkeypatch.setattr("uvicorn.Server.run", connect)
    serve(Settings([model_folder("qwen3")], port=0, checkpoint_dir=str(tmp_path), device="cpu"))
    assert reached


def test_a_port_in_use_and_a_missing_model_are_one_message(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # this process's own
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for more, text in (
            (["--port", str(taken.getsockname()[1])], "cannot listen"),
            (["--port", "0", "--model", "no/such-model"], "no/such-model"),
            (["--host", "0.0.0.0"], "needs a key"),
        ):
            assert cli.main(["serve", *more]) in (1, 2)
            printed = capsys.readouterr()
            assert text in printed.err
            assert printed.out == ""
