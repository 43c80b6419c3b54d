"""Gradients of parameters that are one rank's part of longer ones: their scale, and norms over all ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from commlib.startup.group import gather_numbers

from .shards import Shard


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


def divided_gradient(w: Tensor, divisor: int) -> Tensor:
    """``w``, whose gradient is divided."""
    return _DividedGradient.apply(w, divisor)


class ShardedGradient(Tensor):
    """The gradient of a parameter that is one rank's part of a longer one.

    A function that looks at all gradients to decide about all parameters has to see all ranks' parts;
    otherwise it decides differently on each rank, and replicated parameters diverge. So these include the
    other ranks:

    * the norms of ``torch.nn.utils.clip_grad_norm_`` and ``get_total_norm``;
    * the search for infinities of ``torch.amp.GradScaler``.

    They are then collective. Everything else works as with any tensor, on this rank's part; scaling a
    ShardedGradient gives another.
    """

    shard: Shard

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.linalg.vector_norm:
                return cls._norm(*args, **kwargs)
            if function is torch._foreach_norm:
                return cls._norms(*args, **kwargs)
            result = function(*args, **kwargs)
            if function is torch._amp_foreach_non_finite_check_and_unscale_:
                cls._any_infinity(*args, **kwargs)
            elif function in _SCALINGS and type(result) is Tensor:
                scaled = [a for a in args if isinstance(a, cls) and a.shape == result.shape]
                return marked(result, scaled[0].shard) if scaled else result
        return result

    @classmethod
    def _norm(cls, x: Tensor, ord: float = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, cls) or dim is not None:
            return torch.linalg.vector_norm(x, ord, dim, *args, **kwargs)
        flat = x.as_subclass(Tensor).flatten() if x.numel() else x.new_zeros(1)  # it may have no experts
        return norm_over_ranks(torch.linalg.vector_norm(flat, ord, None, *args, **kwargs), ord, x.shard)

    @classmethod
    def _norms(cls, tensors: Any, ord: float = 2, **kwargs: Any) -> list[Tensor]:
        """One gather for all gradients of each communicator."""
        filled = [t if t.numel() else t.new_zeros(1) for t in tensors]
        norms = list(torch._foreach_norm(filled, ord, **kwargs))
        places: dict[Any, list[int]] = defaultdict(list)
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, cls):
                places[tensor.shard.ranks].append(i)
        for mine in places.values():
            local = torch.stack([norms[i] for i in mine])
            everywhere = norm_over_ranks(local, ord, tensors[mine[0]].shard)
            for i, norm in zip(mine, everywhere.unbind(), strict=True):
                norms[i] = norm
        return norms

    @classmethod
    def _any_infinity(cls, tensors: Any, found: Tensor, *_: Any, **__: Any) -> None:
        for shard in {t.shard.ranks: t.shard for t in tensors if isinstance(t, cls)}.values():
            found.copy_(gather_numbers(shard.ranks.group, found.reshape(1)).amax().reshape(found.shape))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


_SCALINGS = {
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__),
    *(torch.nan_to_num, Tensor.nan_to_num, torch.clamp, Tensor.clamp),
}


def marked(gradient: Tensor, shard: Shard) -> ShardedGradient:
    """The same gradient, marked with the shard that it is a part of."""
    known = gradient.as_subclass(ShardedGradient)
    known.shard = shard
    return known


def mark_gradients_of(param: nn.Parameter, shard: Shard) -> None:
    """Make each accumulated gradient of a parameter a ShardedGradient. Twice is fine."""
    hooks = (param._post_accumulate_grad_hooks or {}).values()
    if param.requires_grad and not any(isinstance(hook, _Marker) for hook in hooks):
        param.register_post_accumulate_grad_hook(_Marker(shard))


class _Marker:
    """Called when a gradient has been accumulated."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def __call__(self, param: Tensor) -> None:
        if type(param.grad) is Tensor:
            param.grad = marked(param.grad, self.shard)


def norm_over_ranks(norms: Tensor, order: float, shard: Shard) -> Tensor:
    """Norms over all ranks, from those of each rank: the same bits on every rank."""
    gathered = gather_numbers(shard.ranks.group, norms.reshape(-1))
    return torch.linalg.vector_norm(gathered, order, dim=0).reshape(norms.shape)
