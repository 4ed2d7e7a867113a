"""The bundled demo models: four tiny GGUF files, and the programs that made them."""
