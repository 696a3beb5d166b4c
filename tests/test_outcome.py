"""The table of answers and what they mean for events."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_outbox_worker.outcome import EVENT_OPERATIONS, classify, remedy
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.retry import is_retryable
from mlflow_outbox_worker.sink import SinkError


def answer(status: int, code: str = "", message: str = "no", **more: Any) -> SinkError:
    """What the sink raises when the store said no."""
    return SinkError(message, kind="answer", status=status, code=code, **more)


@pytest.mark.parametrize("operation", ["create_run", "log_batch", "update_run", "upload"])
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_a_busy_server_is_asked_again(status: int, operation: str) -> None:
    """Time-outs, rate limits and server errors are retried, with the pause that the server asked for."""
    outcome = classify(answer(status, retry_after=7.0), operation)
    assert ("retry", 7.0) == (outcome.kind, outcome.retry_after)


@pytest.mark.parametrize("operation", ["create_run", "log_batch", "upload"])
@pytest.mark.parametrize("kind", ["connection", "timeout"])
def test_no_answer_is_retried(kind: Any, operation: str) -> None:
    """Whether a request was sent is the caller's question; that it is repeated is certain."""
    assert "retry" == classify(SinkError("reset", kind=kind), operation).kind


@pytest.mark.parametrize("code", ["TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"])
def test_mlflows_word_for_later_is_believed_whatever_the_status(code: str) -> None:
    """Some servers give these codes with a 400."""
    assert "retry" == classify(answer(400, code), "log_batch").kind


@pytest.mark.parametrize(
    "error",
    [
        answer(401),
        answer(403, "PERMISSION_DENIED"),
        answer(407),
        answer(501),
        answer(404, "RESOURCE_DOES_NOT_EXIST"),
        answer(404),
        answer(404, "ENDPOINT_NOT_FOUND"),
        answer(400, "INVALID_PARAMETER_VALUE", "The run x must be in the 'active' state. Current state is deleted."),
        answer(400, "INVALID_PARAMETER_VALUE", "The run x must be in 'active' lifecycle_stage."),
        answer(500, "INVALID_STATE", "Could not create run under non-active experiment with ID 1."),
        answer(503, message="503: disabled due to the mlflow server running with `--no-serve-artifacts`."),
        SinkError("a login page", kind="not_mlflow", status=200),
        SinkError("redirect", kind="not_mlflow", status=302),
        SinkError("certificate has expired", kind="connection", code="TLS", sent=False),
    ],
)
@pytest.mark.parametrize("operation", ["create_run", *sorted(EVENT_OPERATIONS)])
def test_what_needs_a_person_is_parked(error: SinkError, operation: str) -> None:
    """Nothing is discarded and nothing is hammered while credentials, URL, run or experiment are wrong."""
    assert "parked" == classify(error, operation).kind
    assert not is_retryable(error)


@pytest.mark.parametrize("operation", sorted(EVENT_OPERATIONS))
@pytest.mark.parametrize("status", [400, 409, 422])
def test_a_permanent_answer_about_events_is_a_dead_letter(status: int, operation: str) -> None:
    """The request carried events, and one of them is refused for good; the reason is the answer."""
    outcome = classify(answer(status, "INVALID_PARAMETER_VALUE", "bad key"), operation)
    assert ("dead_letter", "bad key") == (outcome.kind, outcome.reason)


@pytest.mark.parametrize("operation", ["open", "create_run", "experiment_id", "find_runs", "get_run", ""])
@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_a_permanent_answer_without_events_is_parked(status: int, operation: str) -> None:
    """No event is to blame for a run that cannot be created, so none is discarded."""
    assert "parked" == classify(answer(status, "INVALID_PARAMETER_VALUE"), operation).kind


def test_a_batch_that_is_too_large_is_split_and_a_file_is_not() -> None:
    """413 says nothing about an event until it is alone."""
    assert "split" == classify(answer(413), "log_batch").kind
    assert "dead_letter" == classify(answer(413), "upload").kind


def test_an_experiment_that_exists_was_created() -> None:
    """The race for an experiment has no loser."""
    assert "already_applied" == classify(answer(400, "RESOURCE_ALREADY_EXISTS"), "create_experiment").kind


@pytest.mark.parametrize("text", ["UNIQUE constraint failed: params.key", "duplicate key value", "Duplicate entry 'x'"])
def test_a_race_for_a_row_is_repeated(text: str) -> None:
    """The loser's transaction was rolled back, and finds the winner's row the next time."""
    assert "retry" == classify(answer(400, "BAD_REQUEST", text), "log_batch").kind
    assert "dead_letter" == classify(answer(400, "BAD_REQUEST", "value too long"), "log_batch").kind


@pytest.mark.parametrize("code", ["", "INTERNAL_ERROR", "BAD_REQUEST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"])
def test_the_policy_and_the_table_agree_about_retries(code: str) -> None:
    """What is retried never depends on the operation, and every answer has an outcome."""
    for status in range(400, 600):
        kinds = {operation: classify(answer(status, code), operation).kind for operation in ("", *EVENT_OPERATIONS)}
        assert {is_retryable(answer(status, code))} == {kind == "retry" for kind in kinds.values()}, status


@pytest.mark.parametrize("operation", sorted(EVENT_OPERATIONS))
def test_a_text_that_the_database_of_a_server_never_takes_is_refused_for_good(operation: str) -> None:
    """To psycopg2's error a server answers as to a mistake of its own; a run is created without the text."""
    error = answer(500, "INTERNAL_ERROR", "500 INTERNAL_ERROR: A string literal cannot contain NUL (0x00) characters.")
    assert "dead_letter" == classify(error, operation).kind
    assert "parked" == classify(error, "create_run").kind
    assert not is_retryable(error)


def test_who_is_told_that_a_run_is_gone_is_told_what_brings_it_back() -> None:
    """The command names the outbox; other answers have no such remedy, nor has a run that never was there."""
    there = RunRecord("a" * 32, remote_id="b" * 32)
    gone = answer(404, "RESOURCE_DOES_NOT_EXIST")
    ways = "mlflow-outbox flush", "mlflow-outbox replay --again /scratch/outbox"
    assert remedy(gone, there, *ways).endswith(" mlflow-outbox replay --again /scratch/outbox")
    assert ["", ""] == [remedy(error, there, *ways) for error in (answer(401), answer(404, "ENDPOINT_NOT_FOUND"))]
    assert "" == remedy(gone, RunRecord("a" * 32), *ways)


def test_who_lacks_a_right_is_told_where() -> None:
    """The experiment is named, as far as it is known."""
    forbidden = answer(403, "PERMISSION_DENIED")
    ways = "the same command", "the same command with --again"
    said = remedy(forbidden, RunRecord("a" * 32, experiment="hers"), *ways)
    assert "in the experiment 'hers'" in said
    assert said.endswith("once it has been granted, the same command sends the run")
    assert "experiment" not in remedy(forbidden, RunRecord("a" * 32), *ways)


def test_a_param_of_another_value_is_refused_for_good_by_a_server_on_a_file_store_too() -> None:
    """It answers as for a mistake of its own; any other such answer passes."""
    said = "500 INTERNAL_ERROR: Changing param values is not allowed. Param with key='p' was already logged"
    error = SinkError(said, kind="answer", status=500, code="INTERNAL_ERROR")
    assert "dead_letter" == classify(error, "log_batch").kind
    other = SinkError("500 INTERNAL_ERROR: out of luck", kind="answer", status=500, code="INTERNAL_ERROR")
    assert "retry" == classify(other, "log_batch").kind
