"""Measurements of the running program. Figures that depend on the machine live here, not in the tests."""
