"""LightGBM with autologging: a metric at each round."""

import lightgbm
import mlflow
from sklearn.datasets import make_classification

mlflow.set_experiment("lightgbm example")
mlflow.lightgbm.autolog(log_models=False, silent=True)

features, labels = make_classification(n_samples=60, n_features=4, random_state=0)
data = lightgbm.Dataset(features, label=labels)
with mlflow.start_run(run_name="boosted trees") as run:
    params = {"objective": "binary", "num_leaves": 4, "verbose": -1, "num_threads": 1}
    lightgbm.train(params, data, num_boost_round=10, valid_sets=[data], valid_names=["train"])
print(run.info.run_id)
