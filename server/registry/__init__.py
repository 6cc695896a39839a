"""Adapters as a resource: their files, their versions, and how a version comes to serve."""
