"""Morphogenetic layers for PyTorch: seeds that grow inside a network while it trains."""

from kasmina_ext import flags, ops, reference, telemetry
from kasmina_ext.grafting import AlphaSchedule, GraftingStrategy
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle, LifecycleManager, StateTransition, TransitionContext
from kasmina_ext.state import ExtendedStateTensor, StateVar
from kasmina_ext.telemetry import potential

__all__ = [
    "AlphaSchedule",
    "ExtendedLifecycle",
    "ExtendedStateTensor",
    "GraftingStrategy",
    "KasminaLayer",
    "LifecycleManager",
    "StateTransition",
    "StateVar",
    "TransitionContext",
    "TritonChunkedKasminaLayer",
    "flags",
    "ops",
    "potential",
    "reference",
    "telemetry",
]
__version__ = "0.1.0"
