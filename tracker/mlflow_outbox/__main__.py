"""``python -m mlflow_outbox``: the command line, for where the console script is not on the PATH."""

import sys

from mlflow_outbox import delivery

if __name__ == "__main__":
    sys.exit(delivery.command_line())
