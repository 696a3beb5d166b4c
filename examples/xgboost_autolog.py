"""XGBoost with autologging: a metric at each round."""

import mlflow
import xgboost
from sklearn.datasets import make_classification

mlflow.set_experiment("xgboost example")
mlflow.xgboost.autolog(log_models=False, silent=True)

features, labels = make_classification(n_samples=60, n_features=4, random_state=0)
data = xgboost.DMatrix(features, label=labels)
with mlflow.start_run(run_name="boosted trees") as run:
    params = {"objective": "binary:logistic", "max_depth": 2, "nthread": 1}
    xgboost.train(params, data, num_boost_round=10, evals=[(data, "train")], verbose_eval=False)
print(run.info.run_id)
