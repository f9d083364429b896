"""Published architectures that the methods stand on."""
