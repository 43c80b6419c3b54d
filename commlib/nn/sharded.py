"""Experts that differ by rank: how a model knows them, and which of its parameters are theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from .sharded_gradient import divided_gradient, mark_gradients_of
from .shards import Shard, is_dtensor, register_owner


class ShardedExperts(nn.Module):
    """The experts of one rank, whatever they compute: each of its own parameters has a row for each expert.

    What trains or saves the model (DDP, :func:`commlib.nn.fully_shard_experts`, clipping, checkpoints) knows
    by this class that other ranks hold other experts. :class:`Experts` is the one that comes with commlib.

    Where other ranks hold other experts, the state dict has each parameter as a part of
    ``[num_experts, ...]``: a DTensor, ``Shard(0)`` over the ranks (docs/training.md). That needs
    ``torch.distributed``; without it the state dict has the local tensors. What is loaded may be such a
    part, all experts, or the local ones.

    Attributes:
        shard: where these experts are among all; None: no other rank holds any.
        weight_names: of parameters that are read by :meth:`local` anyway.
        reads_local: whether a subclass with a ``forward`` of its own, or more parameters than these, reads
            each parameter by :meth:`local`.
    """

    reads_local: ClassVar[bool] = False
    shard: Shard | None = None
    weight_names: tuple[str, ...] = ()

    @property
    def gradient_divisor(self) -> int:
        """What the gradients of the parameters are divided by.

        1: they are sums over the losses of all ranks. DDP and :func:`commlib.nn.fully_shard_experts` make
        it the number of ranks; then they are those of the ranks' mean loss, like all other parameters'.
        """
        return 1 if self.shard is None else self.shard.gradient_divisor

    def local(self, w: Any) -> Tensor:
        """A parameter of these experts, as their forward is to read it.

        It has the rows of this rank's experts, even where FSDP2 lends a DTensor, and divides the gradient by
        :attr:`gradient_divisor`. :meth:`Experts.compute` is given it. A subclass with a forward of its own,
        or parameters besides those of :meth:`Experts.shapes`, reads all parameters by it, and says so by
        ``reads_local = True``; otherwise whatever would set a divisor refuses it.
        """
        shard = self.shard
        if shard is None:
            return w
        local = w.to_local() if shard.as_dtensors else w
        return local if shard.gradient_divisor == 1 else divided_gradient(local, shard.gradient_divisor)

    # -- inside --------------------------------------------------------------------------------------------

    # Whatever replaces parameters (FSDP2, DTensor's distribute_module, a load with assign=True, to_empty,
    # deepcopy) calls one of the next four.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # FSDP2 would bypass it where a module does not define its own

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        shard = self.__dict__.get("shard")
        if shard is not None and param is not None:
            if is_dtensor(param) and not shard.fsdp_prepared:
                raise ValueError(
                    f"{name} of experts {shard} is to be spread over, or overwritten from, ranks that may "
                    "hold other experts. For FSDP2 call commlib.nn.fully_shard_experts(model, mesh) before "
                    "fully_shard, with the mesh of the ranks that hold the same experts"
                )
            self._adopt(param)
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt_all()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ShardedExperts:
        super()._apply(fn, recurse)
        self._adopt_all()
        return self

    def _adopt_all(self) -> None:
        if self.shard is not None:
            for param in self.parameters():  # parametrizations' as well
                if isinstance(param, nn.Parameter):  # and not something that torch.func put in its place
                    self._adopt(param)

    def _adopt(self, param: Any) -> None:
        assert self.shard is not None
        if is_dtensor(param):
            register_owner(param, self.shard)
        elif not self.shard.fsdp_prepared:  # else FSDP2 lends it for a forward
            register_owner(param, self.shard)
            mark_gradients_of(param, self.shard)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard is None or keep_vars or self.shard.mesh() is None:
            return
        self._check_savable()
        for name in (*self._parameters, *self._buffers):
            if prefix + name in destination:
                destination[prefix + name] = self.shard.to_state_dict(destination[prefix + name])

    def _check_savable(self) -> None:
        """Raise NotImplementedError where a state dict could not say which part of all experts' is here."""
        # Only the experts' own tensors, with a row for each, can be described as parts of all experts'.
        if self.shard is None:
            return
        for path, module in self.named_modules():
            saved = {k: t for k, t in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for name, t in chain(module._parameters.items(), saved.items()):
                rows = self.shard.total if self.shard.as_dtensors and is_dtensor(t) else self.shard.count
                if t is not None and (path or t.shape[:1] != (rows,)):
                    raise NotImplementedError(
                        f"{path}{'.' if path else ''}{name} {list(t.shape)} of experts {self.shard}: a state "
                        "dict can hold what is Experts' own and has a row for each expert of this rank, "
                        "nothing else (remove parametrizations; the layer may hold what all ranks share)"
                    )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        for name, own in chain(self._parameters.items(), self._buffers.items()):
            given = state_dict.get(prefix + name)
            if not isinstance(given, Tensor) or own is None:
                continue
            if self.shard is None:
                if is_dtensor(given) and not is_dtensor(own):
                    raise ValueError(
                        f"{prefix}{name} is one rank's part of all experts, which are to be loaded here: use "
                        "torch.distributed.checkpoint, or what commlib.nn.full_state_dict has gathered"
                    )
                continue
            rows = self.shard.from_state_dict(given, own)
            # An assigned tensor must not keep all experts' memory.
            kept = rows.clone() if metadata.get("assign_to_params_buffers") and rows is not given else rows
            state_dict[prefix + name] = kept
            if reason := self.shard.misfit(given):
                errors.append(f"{prefix}{name}: {reason}")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


def all_experts(module: nn.Module) -> list[ShardedExperts]:
    """All :class:`ShardedExperts` in ``module``.

    Raises:
        ValueError: it has none.
        TypeError: it is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"give the model itself, not its parameters or anything else: got {type(module).__name__}"
        )
    found = [part for part in module.modules() if isinstance(part, ShardedExperts)]
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no commlib.nn.Experts (as a MoELayer does): torch's own function "
            "does what is needed"
        )
    return found


def expert_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all :class:`ShardedExperts` in ``module``: different on every rank.

    Their gradients already hold the tokens of all ranks: never all-reduce them. Where the loss to
    minimise is the mean of the R ranks' losses, divide them by R, or let :func:`sync_gradients` do so.
    """
    for part in module.modules():
        if isinstance(part, ShardedExperts):
            yield from part.parameters()


def shared_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All other parameters of ``module``: the same on every rank; average their gradients."""
    sharded = {id(p) for p in expert_parameters(module)}
    return (p for p in module.parameters() if id(p) not in sharded)
