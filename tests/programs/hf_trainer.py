"""transformers.Trainer, with what it does by default, around a model that holds a MoELayer.

Started by torchrun; writes what was logged, and the weights at the end. Only the communicator knows of ranks.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

import commlib
from commlib.nn import MoELayer, full_state_dict

HIDDEN, EXPERTS, STEPS, BATCH = 32, 6, 3, 4


class Model(nn.Module):
    def __init__(self, ep):
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoELayer(HIDDEN, 16, EXPERTS, 2, ep)

    def forward(self, x, labels):
        y, aux = self.moe(self.before(x))
        return {"loss": (y - labels).square().mean() + 0.01 * aux.loss}


class ExpertTrainer(Trainer):
    """A Trainer whose checkpoints hold all ranks' experts."""

    def save_model(self, output_dir=None, _internal_call=False):
        weights = full_state_dict(self.model)  # on all ranks
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)


def examples(count):
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, count, HIDDEN, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def train(out):
    arguments = TrainingArguments(
        str(out / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.05,
        logging_steps=1,
        save_steps=STEPS,
        save_only_model=True,  # it would write only the first rank's optimizer state
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    ep = commlib.ExpertParallel(
        num_experts=EXPERTS, hidden=HIDDEN, topk=2, max_tokens=BATCH, dtype=torch.float32
    )
    trainer = ExpertTrainer(
        Model(ep), arguments, train_dataset=examples(STEPS * BATCH * dist.get_world_size())
    )
    trainer.train()
    weights = full_state_dict(trainer.model)
    if dist.get_rank() == 0:
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        torch.save({"weights": weights, "logs": logs}, out / "result.pt")
    ep.close()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    gc.collect()  # DDP, before the group that it uses
    dist.destroy_process_group()  # torch's gloo can abort a process that ends without
