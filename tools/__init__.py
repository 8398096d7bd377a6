"""Programs that test and measure the project: they are no part of what is installed."""
