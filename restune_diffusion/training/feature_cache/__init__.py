"""Cache of the base's features on disk, from which bypass tuners train without the U-Net."""
