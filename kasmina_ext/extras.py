"""Optional packages: what to install when one is missing."""

from __future__ import annotations


def missing_extra(user: str, package: str, extra: str) -> ImportError:
    """The error of ``user``, who needs ``package``; to be raised from the one that the import raised."""
    return ImportError(f"{user} needs {package}: pip install kasmina_ext[{extra}]")
