"""The command that is started, and how it is supervised."""
