"""The paper in miniature."""
