"""Modules' names: without what wrappers put into them, and patterns of them."""

from __future__ import annotations

from fnmatch import fnmatchcase

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing call what they wrap; nobody else calls anything so."""


def unwrapped_name(name: str) -> str:
    """A module's name without torch's wrappers: the same however the model is run.

    Only for those whose names say what they are; where DDP's ``module`` has to go as well,
    :func:`kasmina_ext.checkpoint.state_dict.plain_name` looks at the model.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def original_name(name: str) -> str:
    """A module's name as it was before anything was wrapped, by a KasminaLayer either."""
    return ".".join(part for part in unwrapped_name(name).split(".") if part != "base_layer")


def matches(name: str, pattern: str) -> bool:
    """As :func:`fnmatch.fnmatchcase`; a name that has a bracket in it also matches itself."""
    return name == pattern or fnmatchcase(name, pattern)
