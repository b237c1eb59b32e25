"""Recipes of mergekit as requests for a merge."""

from app.services.mergekit.recipe import MergekitError
from app.services.mergekit.translation import fields_there, translated

__all__ = ["MergekitError", "fields_there", "translated"]
