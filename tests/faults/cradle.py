"""What the process that children are forked from does before the first of them, so that each has less to do.

Only that process imports this module. A test's own process needs none of it, and would pay for it.
"""

from __future__ import annotations

import gc
import importlib

from sqlalchemy.orm import configure_mappers

# What MLflow imports when it opens its first database, beside what children run.
for _name in ("trace_analytics", "trace_rollups", "workspace_migration", "workspace_move"):
    importlib.import_module(f"mlflow.store.db.{_name}")
for _name in ("mlflow.store.workspace.sqlalchemy_store", "sqlalchemy.dialects.sqlite", "faults.workload"):
    importlib.import_module(_name)
for _name in ("mlflow_sink.calls", "mlflow_sink.database", "mlflow_sink.recorder", "child.process"):
    importlib.import_module(f"mlflow_outbox_worker.{_name}")
configure_mappers()
# A child's collector would go through half a million objects that stay, and by its marks copy the pages they are on.
gc.collect()
gc.freeze()
