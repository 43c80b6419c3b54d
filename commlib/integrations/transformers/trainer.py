"""A Trainer that saves and resumes models whose experts are spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers.trainer import SCHEDULER_NAME

from commlib.nn import ShardedExperts

from .parallel import gather_state_dict

_PARTS = "parts"  # in a checkpoint: what torch.distributed.checkpoint has written


class Trainer(transformers.Trainer):
    """transformers' Trainer, for a model from :func:`commlib.integrations.transformers.parallelize`.

    It trains as transformers' does (DDP, clipping), which needs nothing of commlib. Saving does: the model is
    gathered from all ranks and written as by ``save_pretrained``; weights and the optimizer's state are also
    written in parts, from which any number of ranks resumes. It treats other models as transformers' does.
    """

    model: Any  # not None here, and these are not None while it trains
    optimizer: Any
    lr_scheduler: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._is_spread():
            super().save_model(output_dir, _internal_call)
            return
        weights = gather_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_spread():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        dcp.save(self._parts(), checkpoint_id=str(Path(output_dir, _PARTS)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_spread():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not Path(resume_from_checkpoint, _PARTS).is_dir():
            raise ValueError(
                f"{resume_from_checkpoint} has no {_PARTS}/ to resume from: it was written with "
                "save_only_model=True, or by another Trainer. from_pretrained loads its weights"
            )
        # Loaded with the optimizer's state, once there is an optimizer.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_spread():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        parts = self._parts()
        dcp.load(parts, checkpoint_id=str(Path(checkpoint, _PARTS)))
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
        )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _parts(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _is_spread(self) -> bool:
        return any(isinstance(part, ShardedExperts) for part in self.model.modules())
