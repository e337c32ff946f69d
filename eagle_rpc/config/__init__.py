"""Typed configuration: dataclasses, composition, cross-field checks."""

from eagle_rpc.config.schema import Config

__all__ = ["Config"]
