"""Output for people: tables, charts, pages."""
