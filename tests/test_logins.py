"""Who is refused learns which credentials were sent, and which variables hold them; never what they are."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from commands import NOBODY, Here, offline
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy

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
