"""Lightning with its own MLFlowLogger."""

import os

import lightning
import torch
from lightning.pytorch.loggers import MLFlowLogger


class Line(lightning.LightningModule):
    """A line through a few points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_hyperparameters({"features": 1})

    def training_step(self, batch, _number):
        """Log and return the loss of a batch."""
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


lightning.seed_everything(0)
x = torch.linspace(0, 1, 32).reshape(-1, 1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 2 * x), batch_size=4)
logger = MLFlowLogger(
    "lightning example", run_name="line", tracking_uri=os.environ["MLFLOW_TRACKING_URI"], log_model=True
)
trainer = lightning.Trainer(
    max_epochs=3, logger=logger, log_every_n_steps=1, enable_progress_bar=False, accelerator="cpu"
)
trainer.fit(Line(), data)
print(logger.run_id)
