"""What the engine can do, described without doing it.

Standard library and pydantic only: the API imports this package to validate, plan and describe, and must not pay for
torch.
"""
