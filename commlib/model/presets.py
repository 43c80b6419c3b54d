"""Constants of H800, H100, H200 and B200, each with its source. docs/model.md, "Constants"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from commlib.model.hardware import Hardware

MEASURED_FOLDER = Path("~/.config/commlib")


@dataclass(frozen=True)
class Assumptions:
    """Constants that no datasheet has. docs/model.md, "Constants", derives each.

    Attributes:
        link: share of the nominal link rate; None: the documented one of each GPU.
        network: share of the nominal network rate.
        sm_gbps: rows that one SM moves, in dispatch and in combine.
        latency_us: of one operation.
        sources: where they come from, by their names here.
    """

    link: float | None
    network: float
    sm_gbps: float
    latency_us: float
    sources: Mapping[str, str]


# Numbers of rows of bench/published.csv, counted from 1.
FITTED_ROWS = {"link": 1, "network": 7, "latency_us": 9, "sm_gbps": 27}
FITTED = Assumptions(
    link=0.69,
    network=0.90,
    sm_gbps=28.5,
    latency_us=29.0,
    sources={
        "link": "fitted on row 1: DeepEP V1, H800, dispatch, throughput, EP 8",
        "network": "fitted on row 7: DeepEP V1, H800, dispatch, throughput, EP 64",
        "sm_gbps": "ASSUMED until measured; fitted on row 27: DeepEP V2, SM100, dispatch, EP 8, 24 SMs",
        "latency_us": "fitted on row 9: DeepEP V1, H800, dispatch, latency, EP 8",
    },
)
DOCUMENTED = Assumptions(
    link=None,
    network=1.0,
    sm_gbps=45.0,
    latency_us=0.0,
    sources={
        "network": "line rate",
        "sm_gbps": "ASSUMED until measured; what DeepEP V2 plans with: deep_ep/utils/envs.py",
        "latency_us": "none is documented",
    },
)


@dataclass(frozen=True)
class _Datasheet:
    """Rates in GB/s; link and network: one direction."""

    sms: tuple[int, str]
    memory: tuple[float, str]
    link: tuple[float, str]
    link_documented: tuple[float, str]
    network: tuple[float, str]
    tflops: tuple[float, str]


_WHITEPAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"
_INSIGHTS = "arXiv 2505.09343, section 4.3"
_HOPPER_SMS = (132, f"{_WHITEPAPER}; H800 and H200 have the same chip")
_HOPPER_TFLOPS = (989.4, f"{_WHITEPAPER}, without sparsity; H800 and H200 have the same chip")
_NVLINK4 = (450.0, "NVIDIA H100 and H200 datasheets: 900 GB/s, both directions together")
_NVLINK4_MEASURED = (374.5, "749 GB/s on H100, both directions together: github.com/NVIDIA/nccl/issues/1264")
_DGX_NIC = (50.0, "400 Gb/s for each GPU: NVIDIA DGX BasePOD reference architecture, Core Components")

_DATASHEETS = {
    "H800": _Datasheet(
        sms=_HOPPER_SMS,
        memory=(3350.0, "nominal; as H100"),
        link=(200.0, _INSIGHTS),
        link_documented=(160.0, f"{_INSIGHTS}: about 160 can be achieved; DeepEP docs/legacy.md: ~160"),
        network=(50.0, f"{_INSIGHTS}: 400 Gb/s for each GPU; DeepEP docs/legacy.md: ~50"),
        tflops=_HOPPER_TFLOPS,
    ),
    "H100": _Datasheet(
        sms=_HOPPER_SMS,
        memory=(3350.0, "nominal; NVIDIA H100 datasheet, SXM"),
        link=_NVLINK4,
        link_documented=_NVLINK4_MEASURED,
        network=_DGX_NIC,
        tflops=_HOPPER_TFLOPS,
    ),
    "H200": _Datasheet(
        sms=_HOPPER_SMS,
        memory=(4800.0, "nominal; NVIDIA H200 datasheet, SXM"),
        link=_NVLINK4,
        link_documented=_NVLINK4_MEASURED,
        network=_DGX_NIC,
        tflops=_HOPPER_TFLOPS,
    ),
    "B200": _Datasheet(
        sms=(148, "as the driver reports: github.com/pytorch/ao/pull/4002"),
        memory=(7670.0, "nominal; bus width and clock of the driver: github.com/pytorch/ao/pull/4002"),
        link=(900.0, "NVIDIA DGX B200 user guide: 14.4 TB/s, both directions together, of 8 GPUs"),
        link_documented=(749.0, f"H100's share of nominal taken over. {_NVLINK4_MEASURED[1]}"),
        network=_DGX_NIC,
        tflops=(2250.0, "NVIDIA Blackwell Architecture Technical Brief, HGX B200, without sparsity"),
    ),
}


def preset(name: str, assumptions: Assumptions = FITTED) -> Hardware:
    """A GPU with its datasheet's values and these assumptions.

    Raises:
        ValueError: there is no such preset; the text lists them.
    """
    if name not in _DATASHEETS:
        raise ValueError(f"no preset {name!r}: there are {', '.join(_DATASHEETS)}")
    sheet, sources = _DATASHEETS[name], assumptions.sources
    link, link_source = sheet.link_documented
    if assumptions.link is not None:
        link = assumptions.link * sheet.link[0]
        link_source = _share(assumptions.link, sources["link"], sheet.link)
    return Hardware(
        name=name,
        sms=sheet.sms[0],
        memory_gbps=sheet.memory[0],
        link_gbps=link,
        network_gbps=assumptions.network * sheet.network[0],
        dispatch_sm_gbps=assumptions.sm_gbps,
        combine_sm_gbps=assumptions.sm_gbps,
        latency_us=assumptions.latency_us,
        tflops=sheet.tflops[0],
        sources={
            "sms": sheet.sms[1],
            "memory_gbps": sheet.memory[1],
            "link_gbps": link_source,
            "network_gbps": _share(assumptions.network, sources["network"], sheet.network),
            "dispatch_sm_gbps": sources["sm_gbps"],
            "combine_sm_gbps": sources["sm_gbps"],
            "latency_us": sources["latency_us"],
            "tflops": sheet.tflops[1],
        },
    )


def _share(share: float, why: str, nominal: tuple[float, str]) -> str:
    return f"{share:.2f} ({why}) of {nominal[0]:g} ({nominal[1]})"


PRESETS: Mapping[str, Hardware] = {name: preset(name) for name in _DATASHEETS}


def measured_path(name: str) -> Path:
    """Where ``commlib bench --calibrate`` writes its measurements of a device of that name."""
    return MEASURED_FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def preset_for(name: str) -> Hardware | None:
    """The preset for a device's name: "NVIDIA H100 80GB HBM3" is H100. PCIe, NVL: none."""
    words = set(re.findall(r"[A-Za-z0-9]+", name))
    found = words & PRESETS.keys()
    return PRESETS[found.pop()] if len(found) == 1 and not words & {"PCIe", "NVL"} else None


def find_hardware(name: str) -> Hardware | None:
    """A device's values by its name: those measured on this machine, else the preset, else None.

    Raises:
        ValueError: the file of measured values cannot be used.
    """
    path = measured_path(name).expanduser()
    return Hardware.load(path) if path.exists() else preset_for(name)
