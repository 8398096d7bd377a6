"""From data to a recipe: what `onecurve init` looks at, which task it takes the data for, and what it writes."""
