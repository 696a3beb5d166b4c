"""Keras with a callback of one's own that logs each epoch to MLflow."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import mlflow
import numpy as np

mlflow.set_experiment("keras example")
keras.utils.set_random_seed(0)


class ToMlflow(keras.callbacks.Callback):
    """Log what Keras reports at the end of each epoch."""

    def on_epoch_end(self, epoch, logs=None):
        """Log the epoch's metrics."""
        mlflow.log_metrics({key: float(value) for key, value in (logs or {}).items()}, step=epoch)


x = np.linspace(0, 1, 32).reshape(-1, 1)
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
model.compile(optimizer="sgd", loss="mse")
with mlflow.start_run(run_name="line") as run:
    mlflow.log_params({"epochs": 3})
    model.fit(x, 2 * x, epochs=3, verbose=0, callbacks=[ToMlflow()])
print(run.info.run_id)
