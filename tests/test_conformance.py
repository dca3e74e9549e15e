"""`cookbook check`: the local backend passes; each planted misbehaviour is named, and it alone."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from cookbook_core.backend.gradient_probe import NO_ANSWER, core_problems
from cookbook_core.commands import cli
from cookbook_core.conformance import CHECKS, CORE, Row, check_service, row_text, summary
from cookbook_core.errors import RequestError
from cookbook_core.tinker import TrainingClient
from cookbook_core.types import GetServerCapabilitiesResponse, SupportedModel
from tests import faulty_services as faulty
from tests.faulty_services import done

import pytest

REFUSALS = {
    "token id outside": {"refuses an unknown input token", "refuses an unknown target token"},
    '"target_tokens"]: missing': {"refuses missing target_tokens"},
    '"target_tokens"]: length': {"refuses target_tokens too short"},
    '"weights"]: length': {"refuses weights too short"},
    "not finite": {"refuses a weight of NaN"},
    "model_input: empty": {"refuses a datum of no tokens"},
    "data: empty": {"refuses a batch of no datums"},
}
ARITHMETIC = {
    faulty.MeanOverWeights: {
        "linear in the weights",
        "positions add up",
        "opposite weights cancel",
        "negative weights",
    },
    faulty.MeanOverBatch: {"calls add up", "copies count"},
    faulty.MeanOverTokens: {"length does not matter"},
    faulty.MeanOverBoth: {
        "linear in the weights",
        "positions add up",
        "calls add up",
        "copies count",
        "opposite weights cancel",
        "negative weights",
    },
    faulty.SignFlipped: {"sign"},
    faulty.Absolute: {"opposite weights cancel"},
    faulty.BinaryWeights: {"linear in the weights"},
    faulty.LastCallOnly: {"positions add up", "calls add up", "opposite weights cancel"},
    faulty.OtherLogprobs: {"forward equals forward_backward"},
    faulty.NoLogprobs: {"forward equals forward_backward"},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory, model_folder):
    """`make(kind)`: makes clients of such a service on a random tiny model."""
    from cookbook_core.tinker import ServiceClient

    service = ServiceClient(
        device="cpu", dtype="float32", checkpoint_dir=tmp_path_factory.mktemp("checkpoints")
    )

    def of(kind: type[faulty.Service] | None = None) -> Callable[[], TrainingClient]:
        def client() -> TrainingClient:
            made = service.create_lora_training_client(
                model_folder("qwen3"), rank=8, seed=0, train_unembed=False
            ).result()
            return made if kind is None else TrainingClient(kind(made._backend))

        return client

    yield of
    service.close()


def failed(rows: Sequence[Row]) -> set[str]:
    return {row.name for row in rows if row.outcome.result == "fail"}


def test_the_local_backend_passes(make):
    for kind, below in ((None, False), (faulty.Service, True)):
        rows = list(check_service(make(kind), below=below))
        assert [row.name for row in rows] == [check.name for check in CHECKS]
        assert {(row.name, row.outcome) for row in rows if row.outcome.result != "pass"} == set()
    assert summary(rows) == f"{len(CHECKS)} pass"


@pytest.mark.parametrize("kind", ARITHMETIC, ids=lambda kind: kind.__name__)
def test_wrong_arithmetic_is_named(make, kind):
    """Read from reported norms."""
    rows = list(check_service(make(kind), CORE, below=True))
    assert failed(rows) == ARITHMETIC[kind]
    unread = {row.name for row in rows if row.outcome.result == "cannot be read"}
    without = kind in (faulty.OtherLogprobs, faulty.NoLogprobs)
    assert unread == ({check.name for check in CORE[1:]} if without else set())


@pytest.mark.parametrize("kind", [None, *ARITHMETIC], ids=lambda kind: kind and kind.__name__)
def test_the_core_without_reported_norms(make, kind):
    """Read from steps: what a remote backend runs before the first custom loss."""

    class Silent(faulty.NoNorm, kind or faulty.Service):
        pass

    problems = {problem.split(":")[0] for problem in core_problems(lambda: make(Silent)()._backend)}
    expected = ARITHMETIC.get(kind, set()) if kind else set()
    if kind is faulty.Absolute:
        expected = {*expected, "negative weights"}  # a norm has no sign, a step has
    assert problems == expected


@pytest.mark.parametrize("kind", [faulty.EpsIgnored, faulty.BetasIgnored])
def test_unreadable_gradients_are_reported(make, kind):
    (problem,) = core_problems(lambda: make(kind)()._backend)
    assert "cannot be read" in problem
    rows = list(check_service(make(kind), CORE, below=True))
    assert [row.outcome.result for row in rows] == ["cannot be read"] * len(CORE)


@pytest.mark.parametrize("error", [TimeoutError, RequestError])
def test_a_failed_request_is_no_problem_of_the_gradients(make, error):
    """Bug: it was reported as one. Here each forward from the third on fails."""

    class Failing(faulty.Service):
        calls = 0

        def forward(self, data, loss_fn):
            self.calls += 1
            if self.calls < 3:
                return super().forward(data, loss_fn)
            if error is TimeoutError:
                return Future()
            return done(lambda: (_ for _ in ()).throw(RequestError("forward", "status 503")))

    class Quiet(faulty.NoNorm, Failing):
        pass

    with pytest.raises((error, concurrent.futures.TimeoutError)):
        core_problems(lambda: make(Quiet)()._backend, timeout=0.5)


REST = CHECKS[len(CORE) :]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (faulty.CustomIsPlain, {"custom loss"}),
        (faulty.PaddingLeaks, {"ragged lengths"}),
        (faulty.Flattened, {"[N, K] targets"}),
        (faulty.FirstColumnOnly, {"[N, K] gradient"}),
        (faulty.AbsentIsZero, {"weights absent"}),
        *((faulty.lenient(words), names) for words, names in REFUSALS.items()),
        (faulty.BrokenByRefusal, {"alive after a refusal", "no gradient of what failed"}),
        (faulty.KeepsPartialGradient, {"no gradient of what failed"}),
        (faulty.StepsUnchecked, {"no step after a failure"}),
        (faulty.Overtakes, {"submission order"}),
        (faulty.ScoresWithOldWeights, {"forward sees the step"}),
        (faulty.sampling(faulty.OtherEngine), {"sampled logprobs", "saved for sampling"}),
        (faulty.sampling(faulty.AfterTopK), {"sampled logprobs, top_k"}),
        (faulty.sampling(faulty.AtTemperatureOne), {"sampled logprobs, temperature"}),
        (faulty.sampling(faulty.SeedIgnored), {"seeds"}),
        (faulty.sampling(faulty.PromptShifted), {"prompt logprobs"}),
        (faulty.SavesNothing, {"saved for sampling"}),
        (faulty.LoadsNothing, {"save and load"}),
        (faulty.LoadsNoMoments, {"save and load, optimizer"}),
    ],
)
def test_a_misbehaviour_is_named_and_nothing_else(make, kind, names):
    """Run with all checks in the modules of those that it fails."""
    modules = {check.run.__module__ for check in REST if check.name in names}
    checks = [check for check in REST if check.run.__module__ in modules]
    rows = list(check_service(make(kind), checks, below=True, timeout=20))
    assert failed(rows) == names
    assert {row.outcome.result for row in rows} == {"pass", "fail"}


def test_logprobs_of_nan_are_reported(make):
    kind = faulty.lenient("token id outside")
    checks = [check for check in REST if "unknown" in check.name]
    rows = list(check_service(make(kind), checks, below=True, timeout=20))
    assert {row.outcome.figure for row in rows} == {"accepted, with logprobs of NaN"}


def test_a_hung_check_is_abandoned(make):
    """The check after it runs, on a new client."""
    checks = [check for check in REST if check.name.startswith("refuses")]
    rows = list(check_service(make(faulty.Hangs), checks, below=True, timeout=1.0))
    (hung,) = [row for row in rows if row.outcome.result != "pass"]
    assert (hung.name, hung.outcome.figure) == ("refuses missing target_tokens", NO_ANSWER)


def test_a_service_that_stops_answering(make):
    """After a check without an answer, and none to a new client, the rest is skipped."""
    made = []

    def client() -> TrainingClient:
        made.append(TrainingClient(faulty.Silent(make()()._backend)))
        return made[-1]

    rows = list(check_service(client, REST, below=True, timeout=0.2))
    assert rows[0].outcome.figure.startswith(NO_ANSWER)
    assert {row.outcome.figure for row in rows[1:]} == {"the service no longer answers"}
    assert len(made) == 2


def test_what_is_not_offered_is_no_failure(make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    class Poor(faulty.NoSampler, faulty.Refuses2d):
        pass

    rows = list(check_service(make(Poor), REST, below=True))
    results = {row.name: row.outcome.result for row in rows}
    lacking = {name for name, result in results.items() if result == "not offered"}
    samples = {"seeds", "prompt logprobs", "saved for sampling"}
    assert lacking == samples | {name for name in results if "[N" in name or "sampled" in name}
    assert failed(rows) == set()
    assert "targets must be one-dimensional" in row_text(rows[2], 30)


# ---- the command ----------------------------------------------------------------------------


def test_command(make, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["check", "--core", "--model", model_folder("qwen3")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == [check.name for check in CORE]
    assert {line[33:37] for line in lines[1:-1]} == {"pass"}, "aligned"
    assert lines[-1] == f"{len(CORE)} pass"
    assert list(tmp_path.iterdir()) == [], "no checkpoints left behind"


def test_command_exit_codes(make, tmp_path, monkeypatch, capsys):
    class Service:
        def __init__(self, **options):
            assert options["base_url"] == "http://127.0.0.1:9"
            assert options["api_key"] == "key"

        def get_server_capabilities(self):
            return GetServerCapabilitiesResponse([SupportedModel("theirs")])

        def create_lora_training_client(self, model, **options):
            assert model == "theirs"
            return done(make(faulty.SignFlipped))

        def close(self):
            pass

    monkeypatch.setattr("cookbook_core.tinker.ServiceClient", Service)
    monkeypatch.setenv("COLUMNS", "100")
    argv = ["check", "--core", "--base_url", "http://127.0.0.1:9", "--api_key", "key"]
    assert cli.main(argv) == 1
    shown = capsys.readouterr().out
    assert "http://127.0.0.1:9, theirs\n" in shown
    assert "sign                             fail " in shown
    assert "-> Training drives the model away from what the loss asks for." in shown
    assert shown.endswith(f"{len(CORE) - 1} pass, 1 fail\n")
    monkeypatch.undo()
    assert cli.main(["check", "--model", str(tmp_path / "nowhere")]) == 2
