"""The base of both buffers: an owner of communicators, until it is destroyed."""

from __future__ import annotations

import torch

from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import Refused, require
from commlib.devices import cuda


class Owner:
    """A buffer, of either interface.

    Attributes:
        explicitly_destroy: :meth:`destroy` may be called.
        runtime: holds the communicators; None once destroyed.
    """

    explicitly_destroy: bool
    runtime: Communicators | None

    def destroy(self) -> None:
        """Finish what is under way and close the communicators. Twice is fine.

        Raises:
            Refused: the buffer was made without explicitly_destroy.
        """
        require(self.explicitly_destroy, "destroy needs a buffer made with explicitly_destroy=True")
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            runtime.close()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """A stream of the buffer, on which results are finished. CUDA only.

        Raises:
            RuntimeError: there is no GPU.
        """
        cuda.require()
        return self._runtime().stream(torch.device("cuda", torch.cuda.current_device()))

    def _runtime(self) -> Communicators:
        if self.runtime is None:
            raise Refused("the buffer has been destroyed")
        return self.runtime
