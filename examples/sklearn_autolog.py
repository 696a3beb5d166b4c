"""scikit-learn with autologging: params, metrics and the model of one fit."""

import mlflow
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

mlflow.set_experiment("sklearn example")
mlflow.sklearn.autolog(silent=True)

features, labels = make_classification(n_samples=60, n_features=4, random_state=0)
with mlflow.start_run(run_name="logistic regression") as run:
    LogisticRegression(C=0.5).fit(features, labels)
print(run.info.run_id)
