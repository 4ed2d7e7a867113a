"""The tests, and the fake engine that a preset of theirs can name."""
