"""The commands `mimo-train` and `mimo`."""
