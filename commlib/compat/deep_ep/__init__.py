"""DeepEP's Python interface over commlib, on CPU and CUDA tensors alike.

``import commlib.compat.deep_ep as deep_ep``, or call :func:`commlib.compat.install` and leave imports alone.
docs/deepep.md says of every argument whether it means the same.
"""

from commlib.compat.deep_ep import utils
from commlib.compat.deep_ep.buffer import Buffer
from commlib.compat.deep_ep.config import Config
from commlib.compat.deep_ep.elastic import ElasticBuffer
from commlib.compat.deep_ep.errors import Refused
from commlib.compat.deep_ep.events import EventHandle, EventOverlap
from commlib.compat.deep_ep.groups import get_logical_domain_size, get_physical_domain_size
from commlib.compat.deep_ep.handles import EPHandle
from commlib.compat.deep_ep.layout import topk_idx_t

__version__ = "2.1.0"  # the DeepEP whose interface this is

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "Refused",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
    "utils",
]
