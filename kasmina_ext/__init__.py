"""Morphogenetic layers for PyTorch: seeds that grow inside a network while it trains.

==============================  ==========================================================
graft_, ungraft_                give a model seeds; take them out again
Seeds                           the handle that graft_ returns: requests, report(), plot()
GrowthController, param_groups  let seeds grow while you train
calibrate_                      fit them to an undamaged network instead, without labels
credit, removal_cost            who helped, and who would be missed
save_seeds, load_seeds          the seeds alone, in a file of kilobytes
load_seed_sets                  several such files, to switch between
fold_, absorb                   put what has grown into the model's weights
load_state_dict                 whole runs; KasminaLayer.save_checkpoint for a layer's own
KasminaLayer                    one layer, by hand
integrations                    callbacks for transformers' Trainer and for Lightning
==============================  ==========================================================

Functions that end in _ change the model in place. ``python -m kasmina_ext`` says what runs where.
"""

from kasmina_ext import compat, distributed, flags, ops, reference, telemetry
from kasmina_ext.activations import record_activations
from kasmina_ext.calibrate import CalibrationReport, calibrate_
from kasmina_ext.checkpoint import CheckpointError, CheckpointManager, CheckpointRecovery
from kasmina_ext.checkpoint.state_dict import load_state_dict
from kasmina_ext.chunking import ChunkManager
from kasmina_ext.controller import GrowthController
from kasmina_ext.credit import credit, removal_cost
from kasmina_ext.distributed import prepare_ddp
from kasmina_ext.fold import FoldError, absorb, fold_, fold_report, unfold_
from kasmina_ext.graft import graft_, ungraft_
from kasmina_ext.grafting import (
    GRAFTING_STRATEGIES,
    AlphaSchedule,
    GraftingConfig,
    GraftingContext,
    GraftingStrategy,
    GraftingStrategyFactory,
    create_grafting_strategy,
)
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer
from kasmina_ext.lifecycle import (
    ExtendedLifecycle,
    LifecycleManager,
    StateTransition,
    TransitionContext,
    TransitionRules,
    Verdict,
    explain_verdicts,
)
from kasmina_ext.optim import param_groups, reset_optimizer_state
from kasmina_ext.policy import GrowthConfig, default_policy
from kasmina_ext.seed_files import load_seeds, save_seeds
from kasmina_ext.seed_record import SeedHistory, SeedRecord
from kasmina_ext.seed_sets import SeedSets, load_seed_sets
from kasmina_ext.seeds import Seeds
from kasmina_ext.state import ExtendedStateTensor, StateVar
from kasmina_ext.telemetry import potential

__all__ = [
    "AlphaSchedule",
    "CalibrationReport",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointRecovery",
    "ChunkManager",
    "ExtendedLifecycle",
    "ExtendedStateTensor",
    "FoldError",
    "GRAFTING_STRATEGIES",
    "GraftingConfig",
    "GraftingContext",
    "GraftingStrategy",
    "GraftingStrategyFactory",
    "GrowthConfig",
    "GrowthController",
    "KasminaLayer",
    "LifecycleManager",
    "SeedHistory",
    "SeedRecord",
    "Seeds",
    "SeedSets",
    "StateTransition",
    "StateVar",
    "TransitionContext",
    "TransitionRules",
    "TritonChunkedKasminaLayer",
    "Verdict",
    "absorb",
    "calibrate_",
    "compat",
    "create_grafting_strategy",
    "credit",
    "default_policy",
    "distributed",
    "explain_verdicts",
    "flags",
    "fold_",
    "fold_report",
    "graft_",
    "load_seed_sets",
    "load_seeds",
    "load_state_dict",
    "ops",
    "param_groups",
    "potential",
    "prepare_ddp",
    "record_activations",
    "reference",
    "removal_cost",
    "reset_optimizer_state",
    "save_seeds",
    "telemetry",
    "unfold_",
    "ungraft_",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
