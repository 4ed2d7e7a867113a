"""Turntable's package. Reading order: messages, errors, presets, process, loader, assistant, live, ui, engines/worker."""
