"""The harnesses of the field."""
