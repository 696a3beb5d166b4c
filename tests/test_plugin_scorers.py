"""Scorers and label schemas of MLflow's evaluation, which are the server's, through an outbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.plugin import entry
from plugin_world import away, deliver, tracking
from servers import MlflowServer


def a_judge(name: str) -> Any:
    """Return a judge that nobody asks."""
    from mlflow.genai.judges import make_judge

    return make_judge(name=name, instructions="Is {{ outputs }} good?", model="openai:/none")


def names() -> list[str]:
    """Return what the scorers of the experiment are called."""
    from mlflow.genai.scorers import list_scorers

    return sorted(scorer.name for scorer in list_scorers())


def test_scorers_are_registered_found_and_deleted(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """At once, and with the plain URI they are seen too."""
    from mlflow.genai.scorers import delete_scorer, get_scorer

    with tracking(f"outbox+{mlflow_server.url}", tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        for name in ("polite", "short"):
            a_judge(name).register()
        assert ["polite", "short"] == names()
        assert "Is {{ outputs }} good?" == get_scorer(name="polite").instructions
        delete_scorer(name="short", version="all")
    with tracking(mlflow_server.url, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        assert ["polite"] == names()


def test_scorers_of_an_experiment_that_began_offline_are_had_when_it_has_arrived(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Before, the call fails fast, and says why."""
    from mlflow.exceptions import MlflowException

    with away(mlflow_server, tmp_path / "outbox") as (mlflow, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run():
            mlflow.log_metric("m", 1.0)
        with pytest.raises(MlflowException, match="register_scorer needs the tracking server"):
            a_judge("polite").register()
        proxy.up()
        deliver(uri)
        a_judge("polite").register()
        assert ["polite"] == names()


def test_with_the_outbox_switched_off_scorers_are_the_server_s_all_the_same(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URI stays in the environment; nothing of the outbox is used."""
    monkeypatch.setenv("MLFLOW_OUTBOX_DISABLED", "true")
    with tracking(mlflow_server.url, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        mlflow.set_tracking_uri(f"outbox+{mlflow_server.url}")
        a_judge("polite").register()
        assert ["polite"] == names()
    assert not (tmp_path / "outbox").exists()


def test_label_schemas_are_made_and_found(mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
    """With the id of the experiment that the program knows."""
    from mlflow.genai import label_schemas

    with tracking(f"outbox+{mlflow_server.url}", tmp_path / "outbox") as mlflow:
        number = mlflow.set_experiment(experiment_name).experiment_id
        choice = label_schemas.InputCategorical(options=["good", "bad"])
        made = label_schemas.create_label_schema("quality", type="feedback", input=choice)
        found = label_schemas.get_label_schema(experiment_id=number, name="quality")
        assert (made.schema_id, ["good", "bad"]) == (found.schema_id, found.input.options)


def test_a_store_without_scorers_says_so(tmp_path: Path, experiment_name: str) -> None:
    """As without an outbox: the file store has none."""
    from mlflow.exceptions import MlflowException

    with tracking(f"outbox+{(tmp_path / 'mlruns').as_uri()}", tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with pytest.raises(MlflowException, match="Scorer registration functionality is unavailable"):
            a_judge("polite").register()


def test_scorers_and_labeling_sessions_of_databricks_are_asked_of_databricks_itself() -> None:
    """With the URI that it knows; nothing is sent yet."""
    from mlflow.genai.labeling.stores import DatabricksLabelingStore
    from mlflow.genai.scorers.registry import DatabricksStore

    found = entry.scorer_store("outbox+databricks://profile")
    assert isinstance(found, DatabricksStore)
    assert "databricks://profile" == found._tracking_uri
    assert isinstance(entry.labeling_store("outbox+databricks"), DatabricksLabelingStore)
