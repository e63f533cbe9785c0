"""What an adapter or a checkpoint is: names, shapes, scales, sizes, health and spectra, with no merge at hand."""
