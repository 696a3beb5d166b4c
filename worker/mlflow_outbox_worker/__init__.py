"""The half that delivers: reads journals, talks to MLflow, and the command line."""
