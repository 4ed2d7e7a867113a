"""Stand-ins that let the ExLlama libraries run without a card. PYTHONPATH has to name this folder and v2 or v3."""
