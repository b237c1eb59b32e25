"""Describes what the engine can do, without doing it.

This package only imports the standard library and pydantic, because the API uses it to validate, plan and describe, and
must not load torch.
"""
