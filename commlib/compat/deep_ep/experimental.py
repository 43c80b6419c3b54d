"""Parts of ElasticBuffer that are not about experts: refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from commlib.compat.deep_ep.errors import not_yet

_INSTEAD = {
    "engram": "it keeps no table of entries: use torch.nn.Embedding, or a store of your own",
    "pp": "use torch.distributed.send and recv",
    "agrs": "use torch.distributed.all_gather_into_tensor and reduce_scatter_tensor",
}


def _refused(name: str, part: str) -> Callable[..., NoReturn]:
    def method(*_: Any, **__: Any) -> NoReturn:
        not_yet(name, _INSTEAD[part])

    method.__name__ = name
    method.__doc__ = f"Raises NotImplementedError: {_INSTEAD[part]}."
    return method


class Experimental:
    """What DeepEP calls experimental. All raise NotImplementedError, whatever the arguments."""

    get_engram_storage_size_hint = staticmethod(_refused("get_engram_storage_size_hint", "engram"))
    engram_write = _refused("engram_write", "engram")
    engram_fetch = _refused("engram_fetch", "engram")
    get_pp_buffer_size_hint = staticmethod(_refused("get_pp_buffer_size_hint", "pp"))
    pp_set_config = _refused("pp_set_config", "pp")
    pp_send = _refused("pp_send", "pp")
    pp_recv = _refused("pp_recv", "pp")
    get_agrs_num_max_session_bytes = staticmethod(_refused("get_agrs_num_max_session_bytes", "agrs"))
    get_agrs_buffer_size_hint = staticmethod(_refused("get_agrs_buffer_size_hint", "agrs"))
    create_agrs_session = _refused("create_agrs_session", "agrs")
    destroy_agrs_session = _refused("destroy_agrs_session", "agrs")
    agrs_new_session = _refused("agrs_new_session", "agrs")
    agrs_set_config = _refused("agrs_set_config", "agrs")
    agrs_get_inplace_tensor = _refused("agrs_get_inplace_tensor", "agrs")
    all_gather = _refused("all_gather", "agrs")
