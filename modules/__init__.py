"""Turntable's package. Read messages, errors, presets, process, loader, assistant, live, ui, engines/worker."""
