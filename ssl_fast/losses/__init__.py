"""The loss functions and their modules, one loss per file."""
