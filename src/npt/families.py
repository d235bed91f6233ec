"""`npt.families.register_family` is the name that earlier versions documented; `npt.register_family` is the same function."""

from npt.block.families import FAMILIES, Family, blocks_of, family_of, register_family, resolve_layers

__all__ = ["FAMILIES", "Family", "blocks_of", "family_of", "register_family", "resolve_layers"]
