"""The experts of one rank, and which of a model's parameters are theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gradients import divided_gradient, mark_gradients_of
from .grouped import grouped_mm
from .shards import Shard, is_dtensor, register_owner

if TYPE_CHECKING:
    from commlib import ExpertParallel


class Experts(nn.Module):
    """Feed-forward networks ``(silu(x @ w1) * (x @ w3)) @ w2`` (SwiGLU), stacked.

    ``w1, w3`` are ``[count, hidden, ffn_hidden]``, ``w2`` is ``[count, ffn_hidden, hidden]``.

    Another network is a subclass that says its parameters by :meth:`shapes` and what it does with them by
    :meth:`compute`; all that this class does for training goes for it, too::

        class GeluExperts(Experts):
            def shapes(self, hidden, ffn_hidden):
                return {"w1": (hidden, ffn_hidden), "b1": (ffn_hidden,), "w2": (ffn_hidden, hidden)}

            def compute(self, x, offsets, w1, b1, w2):
                return grouped_mm(F.gelu(grouped_mm(x, w1, offsets, b1)), w2, offsets)

        MoELayer(..., experts=GeluExperts)

    Expert ``first + i`` is drawn from a generator of its own, seeded by one number taken from
    PyTorch's default CPU generator. So after the same ``torch.manual_seed`` on every rank, experts
    and everything drawn later are the same however many ranks share them.

    Where other ranks hold other experts, the state dict says each parameter as what it is, a part of
    ``[num_experts, ...]``: a DTensor, ``Shard(0)`` over the ranks (docs/training.md). It needs
    ``torch.distributed``; without it there are the local tensors. What is loaded may be such a part, all
    experts, or the local ones.

    Attributes:
        first, count, hidden, ffn_hidden: as given.
        weight_names: of the parameters of :meth:`shapes`.
        shard: where these experts are among all; None: no other rank holds any.
        reads_local: of a subclass with a ``forward`` of its own, or parameters beside those of
            :meth:`shapes`: whether it reads each parameter by :meth:`local`.

    Args:
        hidden, ffn_hidden: sizes.
        first, count: which experts these are.
        ep: the communicator whose other ranks hold the other experts; None: there are none.
        dtype, device: of the parameters.
    """

    reads_local: ClassVar[bool] = False

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        first: int,
        count: int,
        *,
        ep: ExpertParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.first, self.count, self.hidden, self.ffn_hidden = first, count, hidden, ffn_hidden
        self.shard = None if ep is None or ep.size == 1 else Shard(ep, first, count)
        shapes = self.shapes(hidden, ffn_hidden)
        self.weight_names = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(count, *shape, dtype=dtype, device=device)))
        self.reset_parameters()

    def shapes(self, hidden: int, ffn_hidden: int) -> dict[str, tuple[int, ...]]:
        """One expert's parameters, by name; the constructor asks for them."""
        return {"w1": (hidden, ffn_hidden), "w3": (hidden, ffn_hidden), "w2": (ffn_hidden, hidden)}

    def compute(self, x: Tensor, offsets: Tensor, **weights: Tensor) -> Tensor:
        """What each expert makes of its rows.

        Args:
            x, offsets: as :meth:`forward` takes them.
            weights: the parameters of :meth:`shapes`, ``[count, ...]``: to be used as they are given, and not
                read from ``self``.

        Returns:
            ``[M, hidden]``. What it makes of padding, rows of zeros, is not used.
        """
        gate = F.silu(grouped_mm(x, weights["w1"], offsets))
        return grouped_mm(gate * grouped_mm(x, weights["w3"], offsets), weights["w2"], offsets)

    @property
    def gradient_divisor(self) -> int:
        """What the gradients of the parameters are divided by.

        1: they are sums over the losses of all ranks. DDP and :func:`commlib.nn.fully_shard_experts` make
        it the number of ranks; then they are those of the ranks' mean loss, as all other parameters'.
        """
        return 1 if self.shard is None else self.shard.gradient_divisor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew: uniform in ``+-1/sqrt(inputs)``, as :class:`torch.nn.Linear`.

        Inputs are an expert's rows of a matrix. What has one dimension, or none, becomes zero.
        """
        seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator(device="cpu")
        weights = [getattr(self, name) for name in self.weight_names]
        for i in range(len(weights[0])):
            generator.manual_seed(seed + self.first + i)
            for w in weights:
                # Drawn on the CPU in float32, so that device and dtype do not change the values.
                drawn = torch.zeros(w.shape[1:], dtype=torch.float32, device="cpu")
                if drawn.dim() > 1:
                    bound = drawn.shape[0] ** -0.5
                    drawn.uniform_(-bound, bound, generator=generator)
                w[i].copy_(drawn)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: ``[M, hidden]``, rows of expert i at ``offsets[i]:offsets[i + 1]``.
            offsets: ``[count + 1]`` integers, ``offsets[-1] == M``.

        Returns:
            ``[M, hidden]``, in the dtype of :func:`commlib.nn.grouped_mm`.
        """
        self._adopt_all()  # parameters may have been frozen, replaced or parametrized since
        weights = {name: self.local(getattr(self, name)) for name in self.weight_names}
        return self.compute(x, offsets, **weights)

    def local(self, w: Any) -> Tensor:
        """A parameter of these experts, as their forward is to read it.

        It has the rows of this rank's experts, also where FSDP2 lends a DTensor, and divides the gradient by
        :attr:`gradient_divisor`. :meth:`compute` is given it. A subclass with a forward of its own, or
        parameters beside those of :meth:`shapes`, reads all parameters by it, and says so by
        ``reads_local = True``; else what would set a divisor refuses it.
        """
        shard = self.shard
        if shard is None:
            return w
        local = w.to_local() if shard.as_dtensors else w
        return local if shard.gradient_divisor == 1 else divided_gradient(local, shard.gradient_divisor)

    def extra_repr(self) -> str:
        dtype = next((p.dtype for p in self.parameters()), None)
        sizes = f"hidden={self.hidden}, ffn_hidden={self.ffn_hidden}"
        return f"first={self.first}, count={self.count}, {sizes}, dtype={dtype}"

    # -- inside --------------------------------------------------------------------------------------------

    # Whoever replaces parameters (FSDP2, DTensor's distribute_module, a load with assign=True, to_empty,
    # deepcopy) comes by one of the next four.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # FSDP2 would go past it where a module has none of its own

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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self._adopt_all()
        return self

    def _adopt_all(self) -> None:
        if self.shard is not None:
            for param in self.parameters():  # parametrizations' as well
                if isinstance(param, nn.Parameter):  # and not what torch.func has put in its place
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
        """Raise NotImplementedError where a state dict could not say what of all experts' tensors is here."""
        # Only tensors of the experts' own, with a row for each, can be said to be parts of all experts'.
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
            # What is assigned must not keep all experts' memory.
            kept = rows.clone() if metadata.get("assign_to_params_buffers") and rows is not given else rows
            state_dict[prefix + name] = kept
            if reason := self.shard.misfit(given):
                errors.append(f"{prefix}{name}: {reason}")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


def all_experts(module: nn.Module) -> list[Experts]:
    """All :class:`Experts` in ``module``.

    Raises:
        ValueError: it has none.
        TypeError: it is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"give the model itself, not its parameters or anything else: got {type(module).__name__}"
        )
    found = [part for part in module.modules() if isinstance(part, Experts)]
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no commlib.nn.Experts (as a MoELayer does): torch's own function "
            "does what is needed"
        )
    return found


def expert_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all :class:`Experts` in ``module``: different on every rank.

    Their gradients already hold the tokens of all ranks: never all-reduce them. Where the loss to
    minimise is the mean of the R ranks' losses, divide them by R, or let :func:`sync_gradients` do so.
    """
    for part in module.modules():
        if isinstance(part, Experts):
            yield from part.parameters()


def shared_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All other parameters of ``module``: the same on every rank, average their gradients."""
    sharded = {id(p) for p in expert_parameters(module)}
    return (p for p in module.parameters() if id(p) not in sharded)
