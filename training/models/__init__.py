"""The model: loading it, its optimizer, and what it computes differently here."""
