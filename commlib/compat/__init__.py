"""Modules with the interfaces of other libraries, over commlib."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_HERE = "commlib.compat.deep_ep"
_MODULES = ("", ".buffer", ".utils")  # what code for DeepEP imports


def install() -> ModuleType:
    """Make ``import deep_ep`` find :mod:`commlib.compat.deep_ep`, in this process and from now on.

    Call it before any import of ``deep_ep``. Twice is fine. From then on an installed DeepEP that nothing has
    imported yet cannot be imported.

    Returns:
        The module.

    Raises:
        RuntimeError: another ``deep_ep`` has been imported already: code that holds it would go on using it.
    """
    ours = {f"deep_ep{tail}": importlib.import_module(_HERE + tail) for tail in _MODULES}
    for name, module in sys.modules.items():
        if name.partition(".")[0] in ("deep_ep", "deep_ep_cpp") and ours.get(name) is not module:
            place = getattr(module, "__file__", None) or "a module without a file"
            raise RuntimeError(
                f"{name} has been imported already, from {place}: call commlib.compat.install() before "
                "whatever imports DeepEP"
            )
    sys.modules.update(ours)
    return ours["deep_ep"]
