"""What is trained: the recipe, the data, the loop. Runs as `accelerate launch training/run.py --config RECIPE.yaml`."""
