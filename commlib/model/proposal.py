"""How many SMs should communicate: the number that makes the layer fastest. docs/model.md, "Proposal"."""

from __future__ import annotations

import math
from dataclasses import dataclass

from commlib.arguments import as_int
from commlib.model.checks import check_number
from commlib.model.hardware import Hardware
from commlib.model.prediction import Config, Operation, Prediction, predict
from commlib.model.presets import find_hardware

DEFAULT_SMS = 8  # where the device is unknown, or nothing crosses a link


@dataclass(frozen=True)
class Compute:
    """A rank's computation while, or before and after, it communicates.

    Args:
        flops: of a rank, for one dispatch and one combine.
        efficiency: the share of ``Hardware.tflops`` that it reaches on all SMs; measure yours.
    """

    flops: float
    efficiency: float

    def __post_init__(self) -> None:
        check_number("flops", self.flops)
        check_number("efficiency", self.efficiency, most=1.0)

    @staticmethod
    def swiglu(config: Config, ffn_hidden: int, efficiency: float) -> Compute:
        """Forward of SwiGLU experts: three ``hidden x ffn_hidden`` products for each of T*K rows.

        On average a rank receives T*K (token, expert) pairs.
        """
        ffn_hidden = as_int("ffn_hidden", ffn_hidden, 1)
        return Compute(6.0 * config.tokens * config.topk * config.hidden * ffn_hidden, efficiency)

    def seconds(self, hardware: Hardware, sms: int) -> float:
        """Seconds on ``sms`` of the SMs, inverse to their number."""
        if hardware.tflops is None:
            raise ValueError(f"{hardware.name}: tflops is not known, so compute cannot be weighed")
        return self.flops / (hardware.tflops * 1e12 * self.efficiency) * hardware.sms / sms


@dataclass(frozen=True)
class Proposal:
    """The result of :func:`propose`.

    Attributes:
        num_sms: SMs for communication.
        overlap: whether compute runs at the same time, on the other SMs.
        prediction: dispatch and combine with these SMs.
        compute_seconds: on the remaining SMs (overlap), or on all.
        seconds: of the layer: the longer of the two (overlap), or their sum.
        sequential_seconds: of the layer without overlap, at its own best number of SMs.
        efficiency: the longer of communication with all SMs and compute with all SMs (without overlap: their
            sum), over ``seconds``. 1: sharing SMs costs nothing.
    """

    hardware: Hardware
    config: Config
    num_sms: int
    overlap: bool
    prediction: Prediction
    compute_seconds: float
    seconds: float
    sequential_seconds: float
    efficiency: float

    @property
    def limit(self) -> str:
        """What the layer waits for, "compute" or the limit of the longer operation."""
        if self.overlap and self.compute_seconds > self.prediction.seconds:
            return "compute"
        return _longer(self.prediction).limit

    def __str__(self) -> str:
        h, p = self.hardware, self.prediction
        lines = [
            f"{self.num_sms} of the {h.sms} SMs of {h.name} for communication"
            + (", beside compute" if self.overlap else ""),
            f"  dispatch  {p.dispatch.seconds * 1e6:8.1f} us, bound by {p.dispatch.limit}",
            f"  combine   {p.combine.seconds * 1e6:8.1f} us, bound by {p.combine.limit}",
        ]
        if self.compute_seconds:
            left = h.sms - self.num_sms if self.overlap else h.sms
            lines += [
                f"  compute   {self.compute_seconds * 1e6:8.1f} us, on {left} SMs",
                f"  layer     {self.seconds * 1e6:8.1f} us, {self.efficiency:.0%} of all SMs for each",
                f"  in turn   {self.sequential_seconds * 1e6:8.1f} us, without overlap",
            ]
        return "\n".join([*lines, "  " + self._why()])

    def _why(self) -> str:
        limit = self.limit
        if limit == "compute":
            return (
                "Compute is the longer part: fewer SMs would make communication the longer one, "
                "more would only slow compute down."
            )
        if limit == "SMs":
            return "The SMs bind: with more of them communication would be faster" + (
                ", but compute slower than it." if self.overlap and self.compute_seconds else "."
            )
        if limit == "latency":
            return "There is little to move: what an operation takes anyway binds, and SMs do not help."
        return f"The {limit} binds: more SMs would not make communication faster."


def propose(
    hardware: Hardware, config: Config, compute: Compute | None = None, *, overlap: bool = True
) -> Proposal:
    """The smallest number of communication SMs with which the layer (dispatch, experts, combine) is fastest.

    Args:
        compute: what runs beside communication; None: nothing competes with it, and the answer is the number
            of SMs from which on they no longer limit.
        overlap: compute and communication run at the same time on disjoint SMs (two micro-batches, or
            chunks); False: one after the other, each on as many SMs as it wants.

    Raises:
        ValueError: as predict; or compute is given, and the hardware has one SM, or unknown tflops.
    """
    together = overlap and compute is not None
    if together and hardware.sms < 2:
        raise ValueError(f"{hardware.name} has {hardware.sms} SM: nothing is left for compute beside it")
    most = hardware.sms - together
    predictions = {n: predict(hardware, config, n) for n in range(1, most + 1)}
    compute_all = compute.seconds(hardware, hardware.sms) if compute else 0.0

    def layer_seconds(n: int) -> float:
        if together and compute is not None:
            return max(predictions[n].seconds, compute.seconds(hardware, hardware.sms - n))
        return predictions[n].seconds + compute_all

    num_sms = min(predictions, key=layer_seconds)  # the first of equals, which is the smallest
    fastest = predict(hardware, config, hardware.sms).seconds
    ideal = max(fastest, compute_all) if together else fastest + compute_all
    seconds = layer_seconds(num_sms)
    return Proposal(
        hardware=hardware,
        config=config,
        num_sms=num_sms,
        overlap=together,
        prediction=predictions[num_sms],
        compute_seconds=compute.seconds(hardware, hardware.sms - num_sms * together) if compute else 0.0,
        seconds=seconds,
        sequential_seconds=fastest + compute_all,
        efficiency=ideal / seconds,
    )


def saturating_sms(hardware: Hardware, config: Config) -> int:
    """The number from which on SMs limit neither dispatch nor combine; at most the hardware's."""
    one = predict(hardware, config, 1)
    return min(hardware.sms, max(_saturating(one.dispatch), _saturating(one.combine)))


def _saturating(with_one_sm: Operation) -> int:
    parts = with_one_sm.parts
    other = max(parts["link"], parts["network"], parts["memory"])
    return max(1, math.ceil(parts["SMs"] / other - 1e-9))


def _longer(prediction: Prediction) -> Operation:
    return max(prediction.combine, prediction.dispatch, key=lambda op: op.seconds)


def default_num_sms(
    *,
    name: str,
    sms: int,
    ranks: int,
    max_tokens: int,
    hidden: int,
    itemsize: int,
    topk: int,
    experts: int,
    ranks_on_device: int = 1,
    hardware: Hardware | None = None,
) -> int:
    """How many SMs of a GPU should communicate when the user does not say.

    Enough not to be the limit where rows cross a link (:func:`saturating_sms`), at most half of this rank's
    share of the GPU. 8, or that half, where the GPU is unknown or its ranks share it.

    Args:
        name, sms: of the device, as in ``commlib.cuda.properties``.
        ranks: of one node.
        max_tokens, hidden, topk, experts: as for ExpertParallel.
        itemsize: bytes of an element.
        ranks_on_device: in-process ranks on this GPU.
        hardware: None: as ``commlib bench --calibrate`` measured it on this machine, else the preset.

    Raises:
        ValueError: the file of measured values cannot be used.
    """
    most = max(1, sms // (2 * ranks_on_device))
    known = hardware or find_hardware(name)
    if known is None or known.link_gbps is None or ranks <= ranks_on_device:
        return min(DEFAULT_SMS, most)
    dtype = {1: "fp8", 2: "bf16", 4: "fp32", 8: "fp64"}.get(itemsize)
    if dtype is None:
        raise ValueError(f"itemsize must be 1, 2, 4 or 8, got {itemsize}")
    config = Config(ranks, max_tokens, hidden, topk, experts, dtype, dtype, ranks_per_device=ranks_on_device)
    return min(saturating_sms(known, config), most)
