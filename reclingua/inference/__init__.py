"""From a checkpoint to its answers: ranked items, or scores of users and items."""
