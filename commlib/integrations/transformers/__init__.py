"""Hugging Face transformers with its experts over commlib.

Importing it registers ``ep_implementation="commlib"`` for transformers' own expert parallelism::

    import commlib.integrations.transformers
    config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="commlib")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

:func:`parallelize` spreads the experts of a model that is loaded already. docs/transformers.md has both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import transformers
    from transformers.distributed.expert_parallel import EPImplementationInterface
except ImportError as error:
    raise ImportError(
        "commlib.integrations.transformers needs transformers 5.24, whose expert parallelism can be given an "
        f"implementation of others (pip install commlib-ep[transformers]): {error}"
    ) from error

from .exchange import CommlibEP
from .parallel import gather_state_dict, parallelize

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["TESTED", "CommlibEP", "Trainer", "gather_state_dict", "parallelize"]

TESTED = ("5.24",)  # major and minor numbers of transformers

if ".".join(transformers.__version__.split(".")[:2]) not in TESTED:
    transformers.logging.get_logger(__name__).warning(
        f"commlib is tested with transformers {', '.join(TESTED)}, this is {transformers.__version__}"
    )

EPImplementationInterface.register("commlib", CommlibEP)


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # takes accelerate, and seconds
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
