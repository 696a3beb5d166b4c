"""The credentials that go with a request: what of them nobody may see, and what is said of them to whom they fail."""

from __future__ import annotations

import base64
import os
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from mlflow.environment_variables import (
    MLFLOW_TRACKING_PASSWORD,
    MLFLOW_TRACKING_TOKEN,
    MLFLOW_TRACKING_USERNAME,
)

#: Answers that a login, or another one, may change.
REFUSALS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})

#: Characters from which on a password is looked for in messages: a shorter one is a part of words, and soon guessed.
_SECRET_CHARS: Final = 4

_USER: Final = MLFLOW_TRACKING_USERNAME.name
_PASSWORD: Final = MLFLOW_TRACKING_PASSWORD.name
_TOKEN: Final = MLFLOW_TRACKING_TOKEN.name


def secrets_of(host_creds: Any) -> tuple[str, ...]:
    """Return what a request carries that nobody else may see, in each form in which an answer may repeat it."""
    user, password, token = _basic(host_creds)
    found = [secret for secret in (password, token) if len(secret) >= _SECRET_CHARS]
    basic = base64.b64encode(f"{user}:{password}".encode()).decode() if password else ""
    forms = {form for secret in found for form in (secret, quote(secret), quote(secret, safe=""))} | {basic} - {""}
    return tuple(sorted(forms, key=len, reverse=True))


def login_of(host_creds: Any) -> str:
    """Return in words what MLflow sends of credentials, and where that comes from; "" where other tools decide it.

    Args:
        host_creds: MLflow's host and credentials.
    """
    if getattr(host_creds, "use_databricks_sdk", False) or any(
        getattr(host_creds, name, None) for name in ("auth", "aws_sigv4", "client_secret")
    ):
        return ""
    user, password, token = _basic(host_creds)
    if user and password:  # in this order, as MLflow does
        return f"the user and password that were sent are those of {_source(user, password)}"
    if token:
        return f"the token that was sent is that of {_TOKEN}"
    half = _PASSWORD if user else _USER if password else ""
    missing = half or f"{_USER} and {_PASSWORD}, or {_TOKEN},"
    verb = "is" if half else "are"
    return f"MLflow was given no credentials: {missing} {verb} not set in process {os.getpid()}, which asks"


def _basic(host_creds: Any) -> tuple[str, str, str]:
    user, password, token = (getattr(host_creds, name, None) or "" for name in ("username", "password", "token"))
    return user, password, token


def _source(user: str, password: str) -> str:
    """Return where a user and password were found: the address comes first, then the environment, then the file."""
    if (os.environ.get(_USER), os.environ.get(_PASSWORD)) == (user, password):
        return f"{_USER} and {_PASSWORD}"
    from mlflow.utils.credentials import read_mlflow_creds

    found = read_mlflow_creds()
    return "~/.mlflow/credentials" if (found.username, found.password) == (user, password) else "the tracking URI"
