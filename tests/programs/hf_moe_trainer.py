"""commlib's Trainer for transformers, around a tiny model whose experts are spread over the ranks.

Started by torchrun: ``hf_moe_trainer.py WHERE BATCH [CHECKPOINT]``. It saves in the middle and at the end,
and with a checkpoint it goes on from there. One rank trains the model unsharded.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from hf_models import VOCAB, model_of

from commlib.integrations.transformers import Trainer, parallelize

STEPS, GLOBAL_BATCH = 4, 6


def examples(count):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (count, 12), generator=generator)
    return [{"input_ids": i, "labels": i} for i in ids]


def train(out, batch, checkpoint=None):
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.05,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    model = model_of("qwen3_moe")
    if dist.get_world_size() > 1:
        parallelize(model)
    trainer = Trainer(model, arguments, train_dataset=examples(STEPS * GLOBAL_BATCH))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if dist.get_rank() == 0:
        torch.save([entry for entry in trainer.state.log_history if "loss" in entry], out / "logs.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    gc.collect()  # DDP, before the group that it uses
    dist.destroy_process_group()
