"""Tracking URIs: one place is one destination, and credentials go nowhere (I10, F93)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_outbox.destination import Destination, resolve, with_credentials
from mlflow_outbox.errors import DestinationError

SECRET = "canary"


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("http://host:5000", "http://host:5000"),
        ("http://host:5000/", "http://host:5000"),
        ("http://HOST:5000//", "http://host:5000"),
        ("HTTP://host", "http://host"),
        ("http://host:80", "http://host"),
        ("https://host:443/path/", "https://host/path"),
        ("https://host:80", "https://host:80"),
        (f"https://user:{SECRET}@host/path?token={SECRET}#{SECRET}", "https://host/path"),
        (f"http://{SECRET}@host", "http://host"),
        (f"http://user:{SECRET}%40%2F@host", "http://host"),
        ("http://[::1]:5000", "http://[::1]:5000"),
        (" http://host ", "http://host"),
        ("outbox+http://host", "http://host"),
        ("databricks", "databricks"),
        ("outbox+databricks:", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("sqlite:////abs/m.db", "sqlite:////abs/m.db"),
        ("sqlite:////abs/../m.db", "sqlite:////m.db"),
        ("sqlite+pysqlite:////abs/m.db", "sqlite:////abs/m.db"),
        ("sqlite:////a%20b/m.db", "sqlite:////a%20b/m.db"),
        ("sqlite:////a b/m.db?timeout=5", "sqlite:////a%20b/m.db"),
        (f"postgresql://user:{SECRET}@host:5432/db", "postgresql://host:5432/db"),
        (f"postgresql://user:{SECRET}#{SECRET}@host/db", "postgresql://host/db"),
        (f"postgresql://user:{SECRET}/{SECRET}@host/db", "postgresql://host/db"),
        (f"postgresql://user:{SECRET}?{SECRET}@host/db", "postgresql://host/db"),
        (f"postgresql://user:a@{SECRET}@host/db", "postgresql://host/db"),
        (f"postgresql+psycopg2://host/db?password={SECRET}&sslmode=on", "postgresql+psycopg2://host/db?sslmode=on"),
        (f"postgresql://host/db?user={SECRET}&sslmode=on", "postgresql://host/db?sslmode=on"),
        (f"mysql+pymysql://{SECRET}@host/db", "mysql+pymysql://host/db"),
        (f"mssql+pyodbc://host/db?driver=x&UID={SECRET}&Pwd={SECRET}", "mssql+pyodbc://host/db?driver=x"),
        (
            f"mssql+pyodbc:///?odbc_connect=Driver%3D%7Bx+18%7D%3BUID%3D{SECRET}%3BPWD%3D%7Ba%3B{SECRET}%7D%3BServer%3Dh%252Bg",
            "mssql+pyodbc:/?odbc_connect=Driver%3D%7Bx+18%7D%3BServer%3Dh%252Bg",
        ),
        ("file:///abs/runs", "file:///abs/runs"),
        ("file:/abs/runs", "file:///abs/runs"),
        ("file:///a%20b", "file:///a%20b"),
        ("/abs/runs/", "file:///abs/runs"),
        (Path("/abs") / "runs", "file:///abs/runs"),
    ],
)
def test_spellings_of_a_place_give_one_destination(given: str, uri: str) -> None:
    """Absolute, normal, and without what opens it."""
    found = resolve(given)
    assert uri == found.uri
    assert found == resolve(uri)
    assert found.slug == resolve(uri).slug
    assert SECRET not in found.uri + repr(found) + str(found) + found.slug + found.artifact_root


def test_relative_places_are_those_of_the_current_directory(tmp_path: Path) -> None:
    """A later change of directory changes nothing."""
    assert (tmp_path / "runs").as_uri() == resolve("runs").uri == resolve("./runs").uri == resolve("file:runs").uri
    assert f"sqlite:///{tmp_path}/m.db" == resolve("sqlite:///m.db").uri
    assert resolve("~/runs").uri == resolve(Path("~/runs").expanduser()).uri


def test_without_a_uri_it_is_the_environments_or_the_local_directory(tmp_path: Path) -> None:
    """MLflow's own default: SQLite in mlruns, unless a file store is there already."""
    for nothing in (None, "", " "):
        assert "http://host" == resolve(nothing, default="http://host").uri
    local = resolve(None, default="")
    assert (f"sqlite:///{tmp_path}/mlruns/mlflow.db", str(tmp_path / "mlruns")) == (local.uri, local.artifact_root)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("")
    assert (tmp_path / "mlruns").as_uri() == resolve(None).uri


@pytest.mark.parametrize(
    "uri",
    [
        f"ftp://user:{SECRET}@host",
        f"ftp://user:a@{SECRET}@host",
        f"s3://bucket?token={SECRET}",
        f"http://user:{SECRET}#{SECRET}@host",
        f"http://user:12/{SECRET}@host",
        f"http://user:{SECRET}/@host",
        f"http://user:{SECRET}@",
        f"http://user:{SECRET}@host:port",
        f"http://user:{SECRET}@host:99999",
        f"http://user:{SECRET}[@host",
        f"http://user:{SECRET}\N{ACCOUNT OF}@host",
        f"postgresql://user:{SECRET}@[host/db",
        f"postgresql://user:{SECRET}@ho\N{ACCOUNT OF}st/db",
        "file://[host/runs",
        f"postgresql://user:a@{SECRET}/{SECRET}@host/db",
        f"mysql://user:a@host/{SECRET}#@host/db",
        "http://",
        "sqlite://",
        f"weird:{SECRET}@host",
        "~nobody-of-this-name/runs",
    ],
)
def test_a_uri_that_names_no_place_is_refused_without_showing_its_secret(uri: str) -> None:
    """The message says what is wrong, and nothing of what may be a password."""
    with pytest.raises(DestinationError) as caught:
        resolve(uri)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite://", "sqlite:///:memory:", "sqlite+pysqlite://", "outbox+sqlite:///:memory:"),
        *("sqlite:///file::memory:?uri=true", "sqlite:///file:m?mode=memory&uri=true"),
    ],
)
def test_a_database_in_memory_is_refused_as_one(uri: str) -> None:
    """It is gone with the program, so nothing can be delivered to it later; no file of such a name is made."""
    with pytest.raises(DestinationError, match=r"is a database in memory.*use sqlite:///path/to/mlflow\.db"):
        resolve(uri)


@pytest.mark.parametrize("uri", [5, b"http://host", ["http://host"]])
def test_what_is_neither_text_nor_path_is_refused(uri: object) -> None:
    """By the library's own error, as any other URI that is none."""
    with pytest.raises(DestinationError, match="give a text or a path"):
        resolve(uri)  # type: ignore[arg-type]


def test_the_secret_form_is_what_was_given() -> None:
    """A worker thread needs it."""
    assert f"https://user:{SECRET}@host" == resolve(f"https://user:{SECRET}@host?x=1").secret_uri
    assert f"postgresql://u:{SECRET}@host/db" == resolve(f"postgresql://u:{SECRET}@host/db").secret_uri


@pytest.mark.parametrize("password", ["a@b", "a@b:c", "@", "a@@b", "a#@b", "a?b@c", "%41@b"])
def test_a_password_with_an_at_sign_is_no_part_of_the_host(password: str) -> None:
    """SQLAlchemy would ask for a host of such a name, and the answer be logged, shown and kept."""
    from sqlalchemy.engine import make_url

    found = resolve(f"postgresql://u:{password}@host:5432/db?sslmode=on")
    assert "postgresql://host:5432/db?sslmode=on" == found.uri
    asked = make_url(found.secret_uri)
    assert ("u", password.replace("%41", "A")) == (asked.username, asked.password)
    assert ("host", 5432, "db") == (asked.host, asked.port, asked.database)


def test_credentials_of_the_environment_are_used_for_the_same_place_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever directory the worker was started."""
    stored = Destination("postgresql://host/db", str(tmp_path / "mlruns"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    uri = f"postgresql://user:{SECRET}@host/db"
    assert uri == with_credentials(stored, uri).secret_uri
    assert str(tmp_path / "mlruns") == with_credentials(stored, uri).artifact_root
    for other in (None, "", f"postgresql://user:{SECRET}@other/db", "ftp://x", "http://[host"):
        assert stored.secret_uri == with_credentials(stored, other).secret_uri


def test_slugs_are_names_that_differ_by_place() -> None:
    """Readable, short, safe as names of directories."""
    uris = ["http://host/a", "http://host/b", "https://host/a", "/" + "x" * 300, "sqlite:////tmp/ä b.db"]
    slugs = [resolve(uri).slug for uri in uris]
    assert len(uris) == len(set(slugs))
    assert all(len(slug) < 80 and slug.isascii() and slug.replace("-", "").isalnum() for slug in slugs)
    assert "http" == resolve("http://host").scheme
    assert "postgresql" == resolve("postgresql+psycopg2://host/db").scheme


def test_a_directory_whose_name_is_no_text_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As names of another encoding are, in which a program may run; the library's own error is all that it meets."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    monkeypatch.chdir(odd)
    for uri in (None, "sqlite:///a.db"):
        with pytest.raises(DestinationError, match=r"caf.*is no UTF-8"):
            resolve(uri)
