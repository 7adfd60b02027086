"""Morphogenetic layers for PyTorch: seeds that grow inside a network while it trains."""

from kasmina_ext import ops, reference

__all__ = ["ops", "reference"]
__version__ = "0.1.0"
