"""Media encoders, one file each; `encoders.registry` lists them by modality and architecture."""
