"""MLflow's own API through the outbox: ``MLFLOW_TRACKING_URI=outbox+http://host:5000`` and unchanged code.

MLflow imports these modules through its entry points (see pyproject.toml), and nothing else does, so they may import
mlflow.

* ``entry`` is what the entry points name.
* ``tracking_store`` is the store: writes become events of the journal, reads are answered in ``reads``.
* ``wrapped`` is the server's own store behind it, asked once and briefly; what the plugin does not know is delegated
  to it.
* ``ids`` knows what a provisional id has become, and what answers call a run or model.
* ``journals`` holds the journals that this process writes; ``answers`` what the server said of runs from elsewhere;
  ``mentions`` which experiments the journals on disk name.
* ``arrivals`` waits for the delivery of writes where that is asked for.
* ``links`` says where a run can be looked at.
* ``rest`` ends what a store that is not used costs.
* ``models`` and ``traces`` are the parts of the store that their names say; ``trace_rooms`` knows which traces are on
  their way, and where, and ``spans`` holds what is in them.
* ``artifacts`` stages files, and ``folders`` are what those of a run are in; ``registry_store`` delegates
  the model registry, which needs the server.
* ``codec`` writes MLflow's entities as JSON; the worker reads them back.
"""
