"""Hugging Face transformers with its experts over commlib.

Importing it registers ``ep_implementation="commlib"`` for transformers' own expert parallelism::

    import commlib.integrations.transformers
    config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="commlib")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

:func:`parallelize` spreads the experts of a model already loaded. docs/transformers.md describes both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commlib.integrations.versions import require

require("transformers", "5.24", "5.25")

from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: E402

from .exchange import CommlibEP  # noqa: E402
from .parallel import gather_state_dict, parallelize  # noqa: E402

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["CommlibEP", "Trainer", "gather_state_dict", "parallelize"]

EPImplementationInterface.register("commlib", CommlibEP)


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # importing it needs accelerate, and takes seconds
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
