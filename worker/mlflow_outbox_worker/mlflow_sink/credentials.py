"""The credentials that go with a request: what of them nobody may see, and what is said of them to whom they fail."""

from __future__ import annotations

import base64
import configparser
import contextlib
import os
import re
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import quote

from mlflow.environment_variables import (
    MLFLOW_TRACKING_PASSWORD,
    MLFLOW_TRACKING_TOKEN,
    MLFLOW_TRACKING_USERNAME,
)
from mlflow.exceptions import MlflowException

from mlflow_outbox.interrupts import forward
from mlflow_outbox_worker.mlflow_sink.boundary import clean
from mlflow_outbox_worker.sink import SinkError

#: Answers that a login, or another one, may change.
REFUSALS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})

#: Characters from which on a password is looked for in messages: a shorter one is a part of words, and soon guessed.
_SECRET_CHARS: Final = 4

#: Headers whose values nobody else may see, whoever adds them.
_SECRET_HEADERS: Final = re.compile(r"auth|token|secret|key|cookie", re.IGNORECASE)

#: How characters are encoded that are no Unicode, as the environment may have some.
_ANY: Final = "surrogatepass"

_USER: Final = MLFLOW_TRACKING_USERNAME.name
_PASSWORD: Final = MLFLOW_TRACKING_PASSWORD.name
_TOKEN: Final = MLFLOW_TRACKING_TOKEN.name


def found(find: Callable[[], Any]) -> Any:
    """Return MLflow's host and credentials.

    Where MLflow cannot find them, it says so by the same errors as of a wrong value, for which no event is to blame.

    Args:
        find: MLflow's function.

    Raises:
        SinkError: a variable of the environment, or the file of credentials, is not as MLflow reads it.
        MlflowException: they cannot be had now.
    """
    try:
        return find()
    except (configparser.Error, UnicodeDecodeError) as error:
        forward(error)
        # Its words may hold a line of the file, and with it the password.
        what = f"MLflow cannot read ~/.mlflow/credentials ({type(error).__name__})"
        said = f"{what}; it begins with [mlflow], and a % in it is written as %%"
    except (MlflowException, ValueError) as error:
        forward(error)
        if isinstance(error, MlflowException) and error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        said = clean(error)
    msg = f"no request can be made: {said}"
    raise SinkError(msg, kind="not_mlflow", sent=False)


def fit_in_a_header(host_creds: Any) -> bool:
    """Return whether a login can be sent as it is: HTTP's headers are Latin-1; user and password are encoded as UTF-8.

    Of what the environment has in another encoding Python makes characters that are in neither.
    """
    user, password, token = _basic(host_creds)
    try:
        str(token).encode("latin-1")
        f"{user}{password}".encode()
    except UnicodeError:
        return False
    return True


def secrets_of(host_creds: Any) -> tuple[str, ...]:
    """Return what a request carries that nobody else may see, in each form in which an answer may repeat it."""
    user, password, token = _basic(host_creds)
    # Libraries show what they do not take as Python would write it: of a token with a line break at its end, say.
    written = (form for secret in (password, token) for form in (secret, secret.strip(), repr(secret)[1:-1]))
    found = [form for form in written if len(form.strip()) >= _SECRET_CHARS]
    basic = base64.b64encode(f"{user}:{password}".encode(errors=_ANY)).decode() if password else ""
    quoted = {quote(secret, safe, errors=_ANY) for secret in found for safe in ("/", "")}
    forms = {*found, *quoted, basic} - {""}
    return tuple(sorted(forms, key=len, reverse=True))


def with_sent(secrets: tuple[str, ...], response: Any) -> tuple[str, ...]:
    """Return secrets, and those that others have added to a request: requests' ~/.netrc, a plugin of MLflow's.

    Args:
        secrets: of MLflow's credentials.
        response: to the request.
    """
    headers = getattr(getattr(response, "request", None), "headers", None) or {}
    found = set(secrets)
    for text in (str(value) for name, value in headers.items() if _SECRET_HEADERS.search(str(name))):
        kind, _, login = text.partition(" ")
        user = password = ""
        if kind == "Basic":
            with contextlib.suppress(ValueError):
                user, _, password = base64.b64decode(login).decode("latin-1").partition(":")
        found.update(secrets_of(SimpleNamespace(username=user, password=password, token=login)))
        found.update(secrets_of(SimpleNamespace(token=text)))
    return tuple(sorted(found, key=len, reverse=True))


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

    held = read_mlflow_creds()
    return "~/.mlflow/credentials" if (held.username, held.password) == (user, password) else "the tracking URI"
