"""What a step costs on hardware, told by its compiler without the hardware."""
