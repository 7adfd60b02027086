"""Which module computes: the operators, or the reference where the compiled kernels are switched off or missing."""

from __future__ import annotations

from types import ModuleType

import torch

from kasmina_ext import flags, ops, reference, reference_calibration, reference_lifecycle


def blend_ops(device: torch.device, dtype: torch.dtype, enabled: bool = True) -> ModuleType:
    """Home of ``chunked_forward`` and ``reconstruction_loss`` for activations of this device and dtype."""
    return ops if enabled and flags.triton_kernels and flags.has_kernel(device, dtype) else reference


def lifecycle_ops(device: torch.device, enabled: bool = True) -> ModuleType:
    """Home of ``state_update`` and ``lifecycle_step``."""
    return ops if enabled and flags.triton_kernels and flags.has_kernel(device, torch.float32) else reference_lifecycle


def calibration_ops(device: torch.device, dtype: torch.dtype, enabled: bool = True) -> ModuleType:
    """Home of ``pair_moments`` for activations of this device and dtype."""
    return ops if enabled and flags.triton_kernels and flags.has_kernel(device, dtype) else reference_calibration
