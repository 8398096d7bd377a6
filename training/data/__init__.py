"""From files to the batches of one process: sources, tables, preparation, the plan, loaders."""
