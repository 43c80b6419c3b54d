"""``deep_ep.utils``: events, where older versions of DeepEP had them and callers look for them."""

from commlib.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
