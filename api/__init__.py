"""The Python API (docs/python.md), and what it shares with the commands."""
