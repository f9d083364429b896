"""Shared building blocks: attention, layers, parameters, meshes and the task contract."""
