"""Tests. They mirror the tree; tests of the whole stand at the top."""
