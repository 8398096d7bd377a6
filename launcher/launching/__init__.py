"""The command that is started, and its supervision."""
