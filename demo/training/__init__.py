"""Programs that make, convert and measure the demo models. Nothing here is needed to run the app."""
