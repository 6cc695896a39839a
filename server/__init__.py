"""The HTTP service around `molex`: many adapters, one base, one batch."""
