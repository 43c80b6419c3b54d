"""Weights of one MoE layer as other libraries lay them out, and as :class:`commlib.nn.MoELayer` does.

Both directions copy, bit for bit, in the dtype given. State dicts are of the whole layer, with all experts:
``load_state_dict`` of a layer over ranks takes what it needs, and :func:`commlib.nn.full_state_dict` gathers
the weights to convert back.

E experts of size F on tokens of size H; MoELayer has ``experts.w1``, ``experts.w3`` ``[E, H, F]`` and
``experts.w2`` ``[E, F, H]``. The layouts are:

* "transformers": of its modules, since version 5: ``experts.gate_up_proj`` ``[E, 2F, H]``,
  ``experts.down_proj`` ``[E, H, F]``, ``gate.weight``; Mixtral, Qwen-MoE, DeepSeek, GLM4-MoE and most others.
* "gpt_oss": ``experts.gate_up_proj`` ``[E, H, 2F]``, whose columns are gate, up, gate, up ...,
  ``experts.down_proj`` ``[E, F, H]``, a bias of each (``_bias``), ``router.weight``, ``router.bias``; in
  MoELayer the biases are ``b1``, ``b3``, ``b2`` of :class:`commlib.nn.GptOssExperts`.
* "hub": of checkpoints on the hub: ``experts.0.gate_proj.weight`` ``[F, H]``, ``up_proj``, and ``down_proj``
  ``[H, F]`` for each expert, ``gate.weight``.
* "mixtral_hub": the same as ``experts.0.w1.weight``, ``w3`` and ``w2``.
* "torchtitan": of version 0.3: ``routed_experts.inner_experts.w1_EFD``, ``w3_EFD`` ``[E, F, H]``, ``w2_EDF``
  ``[E, H, F]``, ``router.gate.weight``, ``expert_bias_E``.

A bias for balance (``gate.e_score_correction_bias``) is ``router.balance_bias`` here, and what is under
``shared_experts.`` (a module of your own) is under ``shared.``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .shards import is_dtensor

Layout = Literal["transformers", "gpt_oss", "hub", "mixtral_hub", "torchtitan"]
State = dict[str, Tensor]


def from_layout(state: Mapping[str, Tensor], layout: Layout, prefix: str = "") -> State:
    """A layer's weights as MoELayer has them.

    Args:
        state: of the layer, or of a model with it.
        layout: see :mod:`commlib.nn.convert`.
        prefix: of the layer's names in ``state``, such as ``"model.layers.3.mlp."``; others are left alone.

    Returns:
        What ``load_state_dict`` of the layer takes; new tensors.

    Raises:
        ValueError: an unknown layout; weights that are missing, of shapes that do not fit each other, or
            unknown to the layout, quantised ones among them. The text names them.
    """
    rules = _rules(layout)
    given = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    _check_whole(given)
    made = rules.experts_from(given)
    for theirs, ours in rules.names.items():
        if theirs in given:
            made[ours] = given.pop(theirs).clone()
    for name in [name for name in given if name.startswith(_THEIR_SHARED)]:
        made[_OUR_SHARED + name.removeprefix(_THEIR_SHARED)] = given.pop(name).clone()
    if given:
        raise ValueError(
            f"layout {layout!r} has no {_listed(given)}: is it another layout, quantised, or has the layer "
            f"more than experts and a router? Layouts are {', '.join(get_args(Layout))}"
        )
    _check_sizes(made)
    return made


def to_layout(state: Mapping[str, Tensor], layout: Layout, prefix: str = "") -> State:
    """The other way: names of the layout, ``prefix`` in front.

    Args:
        state: of MoELayer, with all experts.

    Raises:
        ValueError: as :func:`from_layout`; or one rank's part of the experts.
    """
    rules = _rules(layout)
    given = dict(state)
    _check_whole(given)
    _check_sizes(given)
    made = rules.experts_to(given)
    for theirs, ours in rules.names.items():
        if ours in given:
            made[theirs] = given.pop(ours).clone()
    for name in [name for name in given if name.startswith(_OUR_SHARED)]:
        made[_THEIR_SHARED + name.removeprefix(_OUR_SHARED)] = given.pop(name).clone()
    if given:
        raise ValueError(f"layout {layout!r} has no place for {_listed(given)}")
    return {prefix + name: t for name, t in made.items()}


# -- inside --------------------------------------------------------------------------------------------------

_TOLD = 6  # names shown of a list that may be long
_THEIR_SHARED, _OUR_SHARED = "shared_experts.", "shared."
_W1, _W3, _W2 = "experts.w1", "experts.w3", "experts.w2"
_BIASES = {_W1: "experts.b1", _W3: "experts.b3", _W2: "experts.b2"}


@dataclass(frozen=True)
class _Rules:
    """Rules of a layout. Both functions remove the names that they know from what they are given.

    Attributes:
        names: of all else, theirs to ours.
    """

    experts_from: Callable[[State], State]
    experts_to: Callable[[State], State]
    names: Mapping[str, str]


def _rules(layout: str) -> _Rules:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    return _LAYOUTS[layout]


def _check_whole(state: Mapping[str, Tensor]) -> None:
    for name, t in state.items():
        if is_dtensor(t):
            raise ValueError(
                f"{name} is one rank's part of a tensor: first gather all by "
                "commlib.nn.full_state_dict(model)"
            )


def _check_sizes(state: Mapping[str, Tensor]) -> None:
    """Raise unless weights in our names fit each other."""
    missing = [name for name in (_W1, _W3, _W2) if name not in state]
    if missing:
        raise ValueError(f"{', '.join(missing)} of MoELayer missing")
    w1 = state[_W1]
    if w1.dim() != 3:
        raise ValueError(f"{_W1} must be [E, H, F], got {list(w1.shape)}")
    experts, hidden, ffn = w1.shape
    wanted = {
        _W3: [experts, hidden, ffn],
        _W2: [experts, ffn, hidden],
        _BIASES[_W1]: [experts, ffn],
        _BIASES[_W3]: [experts, ffn],
        _BIASES[_W2]: [experts, hidden],
        "router.weight": [experts, hidden],
        "router.bias": [experts],
        "router.balance_bias": [experts],
    }
    for name, shape in wanted.items():
        if name in state and list(state[name].shape) != shape:
            raise ValueError(
                f"{name} is to be {shape} beside {_W1} {list(w1.shape)}, and is {list(state[name].shape)}: "
                "is it another layout?"
            )


def _take(state: State, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{_listed(missing)} missing among {_listed(state)}")
    return [state.pop(name) for name in names]


def _listed(names: Collection[str]) -> str:
    told = [*names][:_TOLD]
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(told) + more if told else "no weights at all"


def _turned(t: Tensor) -> Tensor:
    """A copy of stacked matrices, each transposed."""
    return t.mT.clone(memory_format=torch.contiguous_format)


def _copied(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _from_stacked(state: State) -> State:
    gate_up, down = _take(state, "experts.gate_up_proj", "experts.down_proj")
    if gate_up.dim() != 3 or gate_up.shape[1] % 2:
        raise ValueError(f"experts.gate_up_proj must be [E, 2F, H], got {list(gate_up.shape)}")
    w1, w3 = (_turned(half) for half in gate_up.chunk(2, 1))
    return {_W1: w1, _W3: w3, _W2: _turned(down)}


def _to_stacked(state: State) -> State:
    w1, w3, w2 = _take(state, _W1, _W3, _W2)
    return {"experts.gate_up_proj": torch.cat([w1.mT, w3.mT], 1), "experts.down_proj": _turned(w2)}


def _from_interleaved(state: State) -> State:
    gate_up, down = _take(state, "experts.gate_up_proj", "experts.down_proj")
    bias, down_bias = _take(state, "experts.gate_up_proj_bias", "experts.down_proj_bias")
    made = {_W2: _copied(down), _BIASES[_W2]: _copied(down_bias)}
    for i, name in enumerate((_W1, _W3)):
        made |= {name: _copied(gate_up[..., i::2]), _BIASES[name]: _copied(bias[..., i::2])}
    return made


def _to_interleaved(state: State) -> State:
    w1, w3, w2 = _take(state, _W1, _W3, _W2)
    b1, b3, b2 = _take(state, *(_BIASES[name] for name in (_W1, _W3, _W2)))
    return {
        "experts.gate_up_proj": torch.stack([w1, w3], -1).flatten(-2),
        "experts.gate_up_proj_bias": torch.stack([b1, b3], -1).flatten(-2),
        "experts.down_proj": _copied(w2),
        "experts.down_proj_bias": _copied(b2),
    }


def _one_by_one(gate: str, up: str, down: str, names: Mapping[str, str]) -> _Rules:
    """Rules where each expert has tensors of its own."""
    ours = {gate: _W1, up: _W3, down: _W2}

    def experts_from(state: State) -> State:
        numbers = {int(found[1]) for name in state if (found := re.match(r"experts\.(\d+)\.", name))}
        if not numbers:
            raise ValueError(
                f"experts.0.{gate}.weight missing among {', '.join(state) or 'no weights at all'}"
            )
        experts = range(max(numbers) + 1)
        stacks = {
            name: _take(state, *(f"experts.{i}.{theirs}.weight" for i in experts))
            for theirs, name in ours.items()
        }
        return {name: torch.stack([t.mT for t in stack]) for name, stack in stacks.items()}

    def experts_to(state: State) -> State:
        stacks = dict(zip(ours, _take(state, *ours.values()), strict=True))
        experts = range(len(stacks[gate]))
        return {
            f"experts.{i}.{theirs}.weight": _turned(stacks[theirs][i]) for i in experts for theirs in ours
        }

    return _Rules(experts_from, experts_to, names)


_TITAN = "routed_experts.inner_experts."


def _from_titan(state: State) -> State:
    weights = _take(state, f"{_TITAN}w1_EFD", f"{_TITAN}w3_EFD", f"{_TITAN}w2_EDF")
    return {name: _turned(t) for name, t in zip((_W1, _W3, _W2), weights, strict=True)}


def _to_titan(state: State) -> State:
    weights = map(_turned, _take(state, _W1, _W3, _W2))
    return dict(zip((f"{_TITAN}w1_EFD", f"{_TITAN}w3_EFD", f"{_TITAN}w2_EDF"), weights, strict=True))


_GATE = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.balance_bias"}
_LAYOUTS = {
    "transformers": _Rules(_from_stacked, _to_stacked, _GATE),
    "gpt_oss": _Rules(
        _from_interleaved,
        _to_interleaved,
        {"router.weight": "router.weight", "router.bias": "router.bias"},
    ),
    "hub": _one_by_one("gate_proj", "up_proj", "down_proj", _GATE),
    "mixtral_hub": _one_by_one("w1", "w3", "w2", _GATE),
    "torchtitan": _Rules(
        _from_titan,
        _to_titan,
        {"router.gate.weight": "router.weight", "expert_bias_E": "router.balance_bias"},
    ),
}
