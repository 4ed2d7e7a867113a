"""Tests that need an NVIDIA card; without one they are skipped and say so."""
