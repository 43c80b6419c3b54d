"""A performance model of dispatch and combine, in closed form. docs/model.md has its formulas by name.

from commlib.model import Config, Compute, PRESETS, predict, propose

config = Config(ranks=8, tokens=4096, hidden=7168, topk=8, experts=256)
print(predict(PRESETS["H100"], config, num_sms=16))
print(propose(PRESETS["H100"], config, Compute.swiglu(config, ffn_hidden=2048, efficiency=0.6)))
"""

from commlib.model.grouping import goes_direct
from commlib.model.hardware import Hardware
from commlib.model.prediction import Config, Operation, Prediction, Traffic, predict
from commlib.model.presets import DOCUMENTED, FITTED, PRESETS, Assumptions, find_hardware, preset
from commlib.model.proposal import Compute, Proposal, default_num_sms, propose, saturating_sms
from commlib.model.routing import UniformRouting

__all__ = [
    "DOCUMENTED",
    "FITTED",
    "PRESETS",
    "Assumptions",
    "Compute",
    "Config",
    "Hardware",
    "Operation",
    "Prediction",
    "Proposal",
    "Traffic",
    "UniformRouting",
    "default_num_sms",
    "find_hardware",
    "goes_direct",
    "predict",
    "preset",
    "propose",
    "saturating_sms",
]
