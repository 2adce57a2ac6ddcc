"""The errors that `ntkft` raises on purpose: one sentence, both sides, the remedy."""

from __future__ import annotations


class NtkftError(Exception):
    """Base of every error that `ntkft` raises on purpose; the CLI prints it as one line."""


class InputError(NtkftError, ValueError):
    """The caller's input does not fit: the message names both sides and the remedy."""


class AssetError(NtkftError, RuntimeError):
    """A model or corpus cannot be had: the message names the asset, the place and the command to run."""
