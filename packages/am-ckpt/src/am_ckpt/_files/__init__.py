"""What files and folders of checkpoints hold. Nothing here imports torch."""
