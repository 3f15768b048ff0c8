"""The field's own measures: what published tables are made of."""
