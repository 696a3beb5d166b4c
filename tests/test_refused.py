"""Which events of a window are dead: letters and events are counted apart."""

from __future__ import annotations

import math

import pytest

from mlflow_outbox.spool.events import (
    Artifact,
    Event,
    FileFor,
    Metric,
    Metrics,
    Params,
    Request,
    RunEnded,
    RunStarted,
    Tags,
    encode,
)
from mlflow_outbox_worker.records import DeadLetter
from mlflow_outbox_worker.refused import Refused

FILE = Artifact("a", "0" * 64, 1, 1)
MODEL_FILE = FileFor("model:m", "a", "0" * 64, 1, 1)


def refusing(*parts: Event) -> Refused:
    """What was refused, with a letter for each."""
    refused = Refused()
    for part in parts:
        refused.add(part, DeadLetter("r", "R", encode(part), "no", "", 400, 1))
    return refused


@pytest.mark.parametrize(
    ("event", "parts"),
    [
        (Metric("k", math.nan, 1, 2), [Metric("k", math.nan, 1, 2)]),
        (Metrics({"k": 1.0, "l": math.inf}, 1, 2), [Metric("l", math.inf, 1, 2), Metric("k", 1.0, 1, 2)]),
        (Params({"k": "1", "l": "2"}, 5), [Params({"k": "1"}, 1), Params({"l": "2"}, 1)]),
        (Tags({"k": "1"}, 5), [Tags({"k": "1"}, 1)]),
        (RunEnded("FINISHED", 5), [RunEnded("FINISHED", 5)]),
        (FILE, [FILE]),
        (MODEL_FILE, [MODEL_FILE]),
    ],
)
def test_an_event_is_dead_when_all_of_it_was_refused(event: Event, parts: list[Event]) -> None:
    """And not before the last of its parts was."""
    assert 0 == refusing(*parts[1:]).dead([("w", event)])
    assert 1 == refusing(*parts).dead([("w", event)])
    assert len(parts) == len(refusing(*parts).letters)


@pytest.mark.parametrize(
    "other",
    [
        Metric("k", 1.0, 1, 3),
        Params({"k": "2"}, 1),
        Tags({"k": "1"}, 1),
        RunStarted(1, tags={"k": "1"}),
        Params({}, 1),
        RunEnded("FAILED", 1),
        Artifact("b", "0" * 64, 1, 1),
    ],
)
def test_what_was_not_refused_is_delivered(other: Event) -> None:
    """A likeness to something refused does not make an event dead; nor does the start of a run die with a tag."""
    refused = refusing(Metric("k", 1.0, 1, 2), Params({"k": "1"}, 1), RunEnded("FINISHED", 1), FILE)
    assert 0 == refused.dead([("w", other)])
    refused.add(Tags({"k": "1"}, 1), DeadLetter("r", "R", b"", "no", "", 400, 1))
    assert int(isinstance(other, Tags)) == refused.dead([("w", other)])


def test_a_request_is_dead_when_its_maker_says_so() -> None:
    """Its letters hold parts of it, with other ids; of two equal ones one may be refused and one not."""
    first, second = Request("log_outputs", b"{}", 1), Request("log_outputs", b"{}", 1)
    refused = refusing(Request("log_outputs", b'{"models": []}', 1))
    assert 0 == refused.dead([("w", first), ("w", second)])
    refused.add_request(first)
    assert 1 == refused.dead([("w", first), ("w", second)])
