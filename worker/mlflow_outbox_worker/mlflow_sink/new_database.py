"""A new SQLite database is made beside its place, and gets its name when it is whole.

MLflow makes the tables of one in some hundred steps, which take seconds; SQLite keeps each of them at once, and Alembic
does not go on from the middle: "table ... already exists". A program that is killed or ends meanwhile, as a first one
that is tried may well do, takes the process that delivers along. It would leave a database into which nothing can be
delivered, ever. So what such a process leaves is a draft, which the next one removes.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import sqlalchemy.engine
from mlflow.store.db import utils as database


def make(url: sqlalchemy.engine.URL, file: Path) -> None:
    """Make the database of a URL, unless there is one, or another process is first.

    Args:
        url: the URL.
        file: its file.

    Raises:
        Exception: whatever SQLAlchemy, MLflow and the disk raise.
    """
    if os.path.lexists(file):
        return
    draft = file.with_name(f".{file.name}-{os.urandom(4).hex()}")
    try:
        engine = database.create_sqlalchemy_engine(url.set(database=str(draft)).render_as_string(hide_password=False))
        try:
            database._initialize_tables(engine)  # noqa: SLF001 - as MLflow does where it has the file to itself
        finally:
            engine.dispose()
        _name(draft, file)
    except Exception:
        if not os.path.lexists(file):  # by another process, which has removed this draft
            raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)
    _remove_drafts(file)


def _name(draft: Path, file: Path) -> None:
    try:
        os.link(draft, file)  # unlike a rename it fails where another process was first
    except FileExistsError:
        return
    except OSError:
        if not os.path.lexists(file):
            os.rename(draft, file)  # a file system without hard links


def _remove_drafts(file: Path) -> None:
    """Remove what processes have left that were killed, of a database that is there; one that lives finds that too."""
    pattern = re.compile(rf"\.{re.escape(file.name)}-[0-9a-f]{{8}}(-journal|-wal|-shm)?")
    with contextlib.suppress(OSError):
        for name in os.listdir(file.parent):
            if pattern.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(file.parent / name)
