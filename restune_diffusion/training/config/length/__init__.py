"""Length of a training run: a number of steps, of epochs, or a preset's rule on the number of images."""
