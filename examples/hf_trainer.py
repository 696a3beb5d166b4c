"""Hugging Face's Trainer with its MLflowCallback, on a tiny model made on the spot."""

import tempfile

import mlflow
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

mlflow.set_experiment("transformers example")
torch.manual_seed(0)


class Sentences(torch.utils.data.Dataset):
    """A few random sentences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(8) % 30, "labels": torch.tensor(number % 2)}


config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
with tempfile.TemporaryDirectory() as directory:
    arguments = TrainingArguments(
        directory,
        run_name="tiny",
        num_train_epochs=1,
        logging_steps=1,
        report_to=["mlflow"],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(BertForSequenceClassification(config), arguments, train_dataset=Sentences()).train()
run = mlflow.last_active_run()
mlflow.end_run()
print(run.info.run_id if run else "")
