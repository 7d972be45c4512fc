"""What a training run calls: save, load, and Hugging Face folders from and into live modules. Needs torch."""
