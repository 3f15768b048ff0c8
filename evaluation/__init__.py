"""The field's evaluations."""
