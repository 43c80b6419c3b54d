"""A model with a MoELayer for tests of training: its batches, its losses, the unsharded model beside it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import commlib
from commlib.nn import MoELayer

HIDDEN, FFN, TOPK, TOKENS = 32, 16, 2, 12
EXPERT_NAMES = ("w1", "w3", "w2")


class Model(nn.Module):
    """Linear, MoELayer, linear. Weights depend on the seed alone, not on the ranks."""

    def __init__(self, num_experts, ep, /, *, recompute=None, seed=3, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoELayer(HIDDEN, FFN, num_experts, TOPK, ep, **options)
        self.after = nn.Linear(HIDDEN, HIDDEN)
        self.recompute = recompute  # None, or the kind of checkpoint: "reentrant", "not reentrant"

    def forward(self, x):
        x = self.before(x)
        if self.recompute is None:
            y, aux = self._layer(x)
        else:
            y, aux = checkpoint(self._layer, x, use_reentrant=self.recompute == "reentrant")
        return self.after(x + y).float().square().mean() + 0.1 * aux

    def _layer(self, x):
        y, aux = self.moe(x)
        return y, aux.loss


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(TOKENS + rank, HIDDEN, generator=generator)


def connect(experts, group=None, dtype=torch.float32, device="cpu"):
    shape = dict(num_experts=experts, hidden=HIDDEN, topk=TOPK, max_tokens=32)
    return commlib.ExpertParallel(group, dtype=dtype, device=device, timeout=30.0, **shape)


def train(model, optimizer, rank, steps, clip, autocast=None):
    """One rank's steps; its losses. ``clip(model)`` after each backward."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(batch(rank, step))
        loss.backward()
        clip(model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_unsharded(model, optimizer, ranks, steps, max_norm, autocast=None):
    """The same steps on all ranks' batches; losses by step and rank."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append([])
        for rank in range(ranks):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(batch(rank, step))
            (loss / ranks).backward()
            losses[-1].append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return losses


def unsharded_gradients(num_experts, ranks, /, **options):
    """Of the mean of the ranks' losses, by name."""
    return gradients_of(Model(num_experts, None, **options), ranks)


def gradients_of(whole, ranks):
    """The same, of an unsharded model."""
    for rank in range(ranks):
        (whole(batch(rank, 0)) / ranks).backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def check_gradients(model, wanted, rows=slice(None)):
    """Gradients of the same names, with these rows of experts'."""
    for name, p in model.named_parameters():
        want = wanted[name.removeprefix("module.")]
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        whole = grad.shape == want.shape
        torch.testing.assert_close(
            grad.as_subclass(torch.Tensor), want if whole else want[rows], rtol=1e-4, atol=1e-6
        )


def rows_of(model):
    experts = model.moe.experts
    return slice(experts.first, experts.first + experts.count)


def full(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
