"""Who is refused learns which credentials were sent, and which variables hold them; never what they are."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from commands import NOBODY, Here, offline
from contents import points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.mlflow_sink import prepare
from servers import MlflowServer

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
SECRET = "5ecret-w0rd"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without credentials in the environment or at home."""
    for name in (USER, PASSWORD, TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


@pytest.mark.parametrize(
    ("status", "given", "said"),
    [
        (401, {}, f"no credentials: {USER} and {PASSWORD}, or {TOKEN}, are not set in process"),
        (401, {USER: "ada"}, f"no credentials: {PASSWORD} is not set in process"),
        (403, {USER: "ada", PASSWORD: SECRET}, f"user and password that were sent are those of {USER} and {PASSWORD}"),
        (401, {TOKEN: SECRET}, f"the token that was sent is that of {TOKEN}"),
        (403, {"MLFLOW_TRACKING_URI": f"ada:{SECRET}@"}, "password that were sent are those of the tracking URI"),
    ],
    ids=["nothing", "half", "user", "token", "uri"],
)
def test_a_refused_login_is_told_with_what_was_sent(
    status: int,
    given: dict[str, str],
    said: str,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By ``flush``, ``status`` and ``doctor``."""
    outbox = tmp_path / "outbox"
    with FaultProxy(NOBODY) as proxy:
        proxy.on(lambda _method, _path: True, faults.status(status, {}, "You are not authenticated. " * 9), times=None)
        for name, value in given.items():
            monkeypatch.setenv(name, f"http://{value}{urlsplit(proxy.url).netloc}" if name.endswith("URI") else value)
        offline(outbox, proxy.url)
        told = [here(*words, "-d", outbox) for words in (("flush", "--timeout", 30), ("status",), ("doctor",))]
    assert [4, 0, 4] == [one.code for one in told]
    for text in [f"{one.out} {one.err}" for one in told]:
        assert "".join(said.split()) in "".join(text.split())  # lines are broken as the terminal is wide
        assert SECRET not in text


def test_who_asks_a_server_by_a_name_that_it_does_not_know_is_told_so_and_nothing_of_logins(
    here: Here, tmp_path: Path
) -> None:
    """MLflow answers with a 403, which no login changes."""
    outbox = tmp_path / "outbox"
    with FaultProxy(NOBODY) as proxy:
        refusal = "Invalid Host header - possible DNS rebinding attack detected"
        proxy.on(lambda _method, _path: True, faults.status(403, {}, refusal), times=None)
        offline(outbox, proxy.url)
        told = [here(*words, "-d", outbox) for words in (("flush", "--timeout", 30), ("status",), ("doctor",))]
    for text in ["".join(f"{one.out} {one.err}".split()) for one in told]:  # lines are broken as the terminal is wide
        assert "--allowed-hostsorMLFLOW_SERVER_ALLOWED_HOSTS" in text
        assert "nocredentials" not in text


def test_a_program_that_has_mlflow_is_not_told_what_is_in_a_file_of_credentials_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What its threads will import depends on the login: that is looked for when a tracker is made."""
    prepare(NOBODY)  # which imports MLflow
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".mlflow" / "credentials"
    file.parent.mkdir()
    file.write_text(f"mlflow_tracking_password = {SECRET}")
    tracker = MLflowTracker("e", NOBODY, outbox_dir=tmp_path / "outbox", worker="thread")
    tracker.close(0)
    assert (False, False) == ("worker_not_prepared" in tracker.counters, SECRET in caplog.text)


def test_a_wrong_variable_of_mlflow_makes_no_dead_letters(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that MLflow has, for which nothing but its points is sent: they wait, and arrive once it is right."""
    outbox = tmp_path / "outbox"
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=outbox, worker="none")
    with tracker.start_run() as one:
        assert one.log_metric("loss", 1.0, step=0)
        assert 0 == here("flush", "-d", outbox, "--timeout", 60).code
        for step in range(1, 20):
            assert one.log_metric("loss", 1.0, step=step)
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "yes")
        refused = here("flush", "-d", outbox, "--timeout", 60)
        assert 4 == refused.code, refused
        assert "MLFLOW_TRACKING_INSECURE_TLS" in "".join(f"{refused.out}{refused.err}".split())
        monkeypatch.delenv("MLFLOW_TRACKING_INSECURE_TLS")
    assert 0 == here("flush", "-d", outbox, "--timeout", 60).code
    assert 20 == len(points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss"))
    tracker.close()
