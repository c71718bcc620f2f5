"""A Lightning module with token selection: patch the model once, pass `selection=` in training_step.

    pip install lightning && python examples/lightning_module.py

The loss is the mean of the kept tokens of each micro-batch. The model here is tiny and random.
"""

from __future__ import annotations

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import tokensel
from tokensel.data import encode_rows
from tokensel.testing import make_model, make_rows, make_tokenizer


class SelectiveModule(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, method: tokensel.SelectionMethod) -> None:
        super().__init__()
        self.model = model
        tokensel.apply_to(model)  # here, so that a strategy wraps the patched model
        self.selection = tokensel.Selection(method, history=tokensel.AdapterOff(model))

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        output = self.model(**batch, selection=self.selection)
        self.log("loss", output.loss)
        self.log("kept_share", (output.weights > 0).sum() / output.response.sum().clamp(min=1))
        return output.loss

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.selection.step()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["selection"] = self.selection.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.selection.load_state_dict(checkpoint["selection"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


text = make_rows(64, seed=0)
tokenizer = make_tokenizer(text)
rows, _ = encode_rows(text, tokenizer, max_length=256)
loader = DataLoader(rows, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"))
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
module = SelectiveModule(
    get_peft_model(make_model(tokenizer, seed=0), lora), tokensel.methods.get("sstoken", gamma=0.5, rho=0.6)
)
trainer = lightning.Trainer(
    max_epochs=2, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(module, loader)
print({name: float(value) for name, value in trainer.callback_metrics.items()})
