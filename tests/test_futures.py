"""Futures: waiting, awaiting, and unread errors."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future

from cookbook_core import tinker
from cookbook_core.backend.worker import Worker
from cookbook_core.errors import LossError, RequestError
from cookbook_core.tinker.futures import APIFuture, ClientFuture, mapped

import pytest

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def worker():
    worker = Worker("test")
    yield worker
    worker.close()


@pytest.fixture
def client(service, model_folder):
    return service.create_lora_training_client(model_folder("qwen3"), rank=2, seed=0).result()


def failing(data, logprobs):
    raise KeyError("beta")


def summed(data, logprobs):
    return -sum(lp.sum() for lp in logprobs), {}


# ---- results ------------------------------------------------------------------------------------


def test_result_result_async_await_and_coroutine(worker):
    async def run() -> list[int]:
        made = [APIFuture(worker.submit("n", lambda: 7)) for _ in range(3)]
        task = asyncio.create_task(made[2].coroutine())
        return [await made[0], await made[1].result_async(timeout=5), await task]

    assert APIFuture(worker.submit("n", lambda: 7)).result() == 7
    assert asyncio.run(run()) == [7, 7, 7]


def test_a_timeout_ends_the_waiting_not_the_request(worker):
    go = threading.Event()
    future = APIFuture(worker.submit("slow", lambda: go.wait(30)))
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)

    async def run() -> None:
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await future.result_async(timeout=0.01)

    asyncio.run(run())
    go.set()
    assert future.result() is True


def test_cancelled_before_it_starts(worker):
    go = threading.Event()
    first = worker.submit("slow", lambda: go.wait(30))
    second = APIFuture(worker.submit("never", lambda: 1))
    assert second.future().cancel()
    go.set()
    assert first.result()
    with pytest.raises(CancelledError):
        second.result()


def test_a_client_future_can_be_used_as_the_client(service, model_folder):
    client = service.create_lora_training_client(model_folder("qwen3"), rank=2, seed=0)
    assert isinstance(client, ClientFuture)
    assert client.get_info().lora_rank == 2
    assert client.result().get_info().lora_rank == 2


# ---- unread errors ------------------------------------------------------------------------------


def failed_future(label: str = "forward_backward") -> APIFuture:
    plain: Future = Future()
    future = APIFuture(plain, label)
    plain.set_exception(KeyError("the reason"))
    return future


def test_a_dropped_failure_is_logged_with_its_traceback(caplog):
    future = failed_future()
    del future
    gc.collect()
    (record,) = [r for r in caplog.records if "never read" in r.message]
    assert "forward_backward failed" in record.message
    assert record.exc_info is not None
    assert "the reason" in str(record.exc_info[1])


def test_a_failure_after_the_drop_is_logged(caplog):
    plain: Future = Future()
    future = APIFuture(plain, "sample")
    del future
    gc.collect()
    plain.set_exception(KeyError("late"))
    assert any("sample failed" in r.message for r in caplog.records)


def test_a_failure_that_was_read_is_not_logged(caplog):
    future = failed_future()
    with pytest.raises(KeyError):
        future.result()
    del future
    gc.collect()
    assert not caplog.records


def test_the_next_call_mentions_an_unread_failure(client, random_data, caplog):
    failed = client.forward_backward_custom(random_data(2), failing)
    client.forward(random_data(2), "cross_entropy").result()  # by now the first has failed
    caplog.clear()
    client.forward(random_data(2), "cross_entropy").result()
    client.forward(random_data(2), "cross_entropy").result()
    mentioned = [r for r in caplog.records if "has not been read" in r.message]
    assert len(mentioned) == 1
    assert "raised KeyError: 'beta'" in mentioned[0].message
    with pytest.raises(LossError):
        failed.result()


def test_optim_step_refuses_after_an_unread_failure(client, random_data):
    """A step with part of the gradient missing would be a silently wrong step."""
    data = random_data(2)
    client.forward_backward(data, "cross_entropy").result()
    failed = client.forward_backward_custom(data, failing)
    stepped = client.optim_step(tinker.AdamParams())
    with pytest.raises(RequestError, match=r"forward_backward before it failed.*KeyError"):
        stepped.result()
    with pytest.raises(LossError, match="raised KeyError"):
        failed.result()
    assert client.optim_step(tinker.AdamParams()).result().metrics["grad_norm"] > 0


def test_optim_step_continues_after_the_failure_was_read(client, random_data):
    data = random_data(2)
    client.forward_backward(data, "cross_entropy").result()
    with pytest.raises(LossError):
        client.forward_backward_custom(data, failing).result()
    assert client.optim_step(tinker.AdamParams()).result().metrics["grad_norm"] > 0


# ---- inside a loss ------------------------------------------------------------------------------


def test_waiting_inside_a_loss_is_refused_not_a_deadlock(client, random_data):
    data = random_data(2)
    go, later = threading.Event(), []

    def waits(data, logprobs):
        assert go.wait(30)
        return logprobs[0].sum() * later[0].result().loss, {}

    first = client.forward_backward_custom(data, waits)
    later.append(client.forward(data, "cross_entropy"))
    go.set()
    with pytest.raises(RequestError, match="inside a loss function"):
        first.result()
    assert later[0].result().loss > 0


# ---- the queue ----------------------------------------------------------------------------------


def test_grouped_requests_run_together_and_in_order(worker):
    go, batches = threading.Event(), []

    def run(items):
        batches.append(list(items))
        return [item * 10 for item in items]

    worker.submit("block", lambda: go.wait(30))
    a = [worker.submit_grouped("sample", run, i, "a") for i in range(3)]
    b = worker.submit_grouped("sample", run, 3, "b")
    c = worker.submit("other", lambda: batches.append("other"))
    d = worker.submit_grouped("sample", run, 4, "a")
    go.set()
    assert [f.result() for f in [*a, b, d]] == [0, 10, 20, 30, 40]
    assert c.done()
    assert batches == [[0, 1, 2], [3], "other", [4]]


def test_a_closed_client_is_an_error(service, model_folder, random_data):
    client = service.create_lora_training_client(model_folder("qwen3"), rank=2).result()
    service.close()
    with pytest.raises(RequestError, match="forward: this client has been closed"):
        client.forward(random_data(1), "cross_entropy")


def test_a_finished_job_is_released(worker):
    """A batch must not stay in memory until the next request comes."""

    class Batch:
        pass

    batch = Batch()
    reference = weakref.ref(batch)
    worker.submit("use", lambda batch=batch: None).result()
    del batch
    for _ in range(100):  # the future is done a moment before the thread drops it
        gc.collect()
        if reference() is None:
            break
        time.sleep(0.01)
    assert reference() is None


def test_cancelling_a_mapped_future_cancels_what_it_waits_for(worker):
    go, ran = threading.Event(), []
    worker.submit("block", lambda: go.wait(30))
    out = mapped(worker.submit("never", lambda: ran.append(1)), lambda value: value)
    assert out.cancel()
    go.set()
    worker.close()
    assert ran == []


def test_a_mentioned_failure_still_logs_its_traceback_when_dropped(client, random_data, caplog):
    failed = client.forward_backward_custom(random_data(2), failing)
    for _ in range(2):
        client.forward(random_data(2), "cross_entropy").result()
    assert any("has not been read" in r.message for r in caplog.records)
    del failed
    gc.collect()
    assert [r for r in caplog.records if r.exc_info and "never read" in r.message]


def test_awaiting_inside_a_loss_is_refused_not_a_deadlock(client, random_data):
    data = random_data(2)
    go, later = threading.Event(), []

    def waits(data, logprobs):
        assert go.wait(30)
        asyncio.run(asyncio.wait_for(later[0].result_async(), timeout=3))
        return logprobs[0].sum(), {}

    first = client.forward_backward_custom(data, waits)
    later.append(client.forward(data, "cross_entropy"))
    go.set()
    with pytest.raises(RequestError, match="inside a loss function"):
        first.result(timeout=30)


def test_a_step_that_only_follows_a_failure_that_was_read_is_not_logged(
    client, random_data, caplog
):
    """The loss's own error is logged one time: neither dropping nor later calls repeat it."""
    data = random_data(2)
    for _ in range(2):
        failed = client.forward_backward_custom(data, failing)
        stepped = client.optim_step(tinker.AdamParams())
        with pytest.raises(LossError):
            failed.result()
        client.forward(data, "cross_entropy").result()
        client.forward(data, "cross_entropy").result()
        del stepped, failed
        gc.collect()
    assert not [r for r in caplog.records if "optim_step" in r.message]
    failed = client.forward_backward_custom(data, failing)
    stepped = client.optim_step(tinker.AdamParams())
    client.forward(data, "cross_entropy").result()
    del stepped
    gc.collect()
    assert [r for r in caplog.records if r.message.startswith("optim_step failed")]
    with pytest.raises(LossError):
        failed.result()
