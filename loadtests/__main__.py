"""`python -m loadtests`."""

from loadtests.cli import app

app()
