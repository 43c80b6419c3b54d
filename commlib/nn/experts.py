"""The experts that come with commlib, and the base class of your own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import Products
from .sharded import ShardedExperts
from .shards import Shard

if TYPE_CHECKING:
    from commlib.expert_parallel import ExpertParallel


class Experts(ShardedExperts):
    """Feed-forward networks ``(silu(x @ w1) * (x @ w3)) @ w2`` (SwiGLU), stacked.

    ``w1, w3`` are ``[count, hidden, ffn_hidden]``, ``w2`` is ``[count, ffn_hidden, hidden]``.

    For another network write a subclass that names its parameters in :meth:`shapes` and uses them in
    :meth:`compute`; all that this class does for training works for it, too::

        class GeluExperts(Experts):
            def shapes(self, hidden, ffn_hidden):
                return {"w1": (hidden, ffn_hidden), "b1": (ffn_hidden,), "w2": (ffn_hidden, hidden)}

            def compute(self, x, offsets, products, w1, b1, w2):
                (inner,) = products.first(x, offsets, w1, biases=(b1,))
                return products.last(F.gelu(inner), offsets, w2)

        MoELayer(..., experts=GeluExperts)

    Expert ``first + i`` is drawn from its own generator, seeded by one number taken from PyTorch's
    default CPU generator. So after the same ``torch.manual_seed`` on every rank, experts and
    everything drawn later are the same however many ranks share them.

    Attributes:
        first, count, hidden, ffn_hidden: as given.
        weight_names: of the parameters of :meth:`shapes`.
        takes_products: whether :meth:`compute` asks for ``products``, and a ``forward`` of its own as well.

    Args:
        hidden, ffn_hidden: sizes.
        first, count: which experts these are.
        ep: the communicator whose other ranks hold the other experts; None: there are none.
        dtype, device: of the parameters.
    """

    takes_products: ClassVar[bool] = True
    _computes_by_products: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._computes_by_products = "products" in inspect.signature(cls.compute).parameters
        of_forward = inspect.signature(cls.forward).parameters
        cls.takes_products = cls._computes_by_products and "products" in of_forward

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
        self.shard = None if ep is None or ep.size == 1 else Shard(ep, first, count, ep.settings.num_experts)
        shapes = self.shapes(hidden, ffn_hidden)
        self.weight_names = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(count, *shape, dtype=dtype, device=device)))
        self.reset_parameters()

    def shapes(self, hidden: int, ffn_hidden: int) -> dict[str, tuple[int, ...]]:
        """One expert's parameters, by name; the constructor asks for them."""
        return {"w1": (hidden, ffn_hidden), "w3": (hidden, ffn_hidden), "w2": (ffn_hidden, hidden)}

    def compute(self, x: Tensor, offsets: Tensor, products: Products, **weights: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x, offsets: as ``forward`` takes them.
            products: to multiply with where rows come and go; a subclass may leave this parameter out, and
                use :func:`grouped_mm` alone. Then results are copied into the heap.
            weights: the parameters of :meth:`shapes`, ``[count, ...]``: use these, and do not read them from
                ``self``.

        Returns:
            ``[M, hidden]``. Results for padding, rows of zeros, are not used.
        """
        gate, up = products.first(x, offsets, weights["w1"], weights["w3"])
        return products.last(F.silu(gate) * up, offsets, weights["w2"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew: uniform in ``+-1/sqrt(inputs)``, as :class:`torch.nn.Linear` does.

        Inputs are an expert's rows of a matrix. Parameters of one dimension, or none, become zero.
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

    def forward(self, x: Tensor, offsets: Tensor, products: Products | None = None) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: ``[M, hidden]``, rows of expert i at ``offsets[i]:offsets[i + 1]``.
            offsets: ``[count + 1]`` integers, ``offsets[-1] == M``.
            products: what :meth:`compute` is given; by default those of rows that no dispatch has brought.

        Returns:
            ``[M, hidden]``, in the dtype of :func:`commlib.nn.grouped_mm`.
        """
        self._adopt_all()  # parameters may have been frozen, replaced or parametrized since
        weights = {name: self.local(getattr(self, name)) for name in self.weight_names}
        if not self._computes_by_products:
            return self.compute(x, offsets, **weights)  # type: ignore[arg-type]
        return self.compute(x, offsets, Products() if products is None else products, **weights)

    def extra_repr(self) -> str:
        dtype = next((p.dtype for p in self.parameters()), None)
        sizes = f"hidden={self.hidden}, ffn_hidden={self.ffn_hidden}"
        return f"first={self.first}, count={self.count}, {sizes}, dtype={dtype}"
