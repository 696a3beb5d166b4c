"""Optuna: a run for each trial, below one for the study."""

import mlflow
import optuna

mlflow.set_experiment("optuna example")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective(trial: optuna.Trial) -> float:
    """Return the value of a parabola at the trial's point."""
    with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
        x = trial.suggest_float("x", -1.0, 1.0)
        mlflow.log_params(trial.params)
        mlflow.log_metric("objective", x * x)
    return x * x


with mlflow.start_run(run_name="study") as run:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=5)
    mlflow.log_metric("best", study.best_value)
print(run.info.run_id)
