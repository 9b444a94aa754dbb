"""What models learn from. Nothing here knows a model."""
