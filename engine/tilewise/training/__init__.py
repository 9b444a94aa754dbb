"""Training: schedules. Optimisers and losses are torch's own."""

from .schedules import inverse_square_root

__all__ = ["inverse_square_root"]
