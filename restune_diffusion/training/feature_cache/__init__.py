"""Cache of the base's features on disk; bypass tuners train from it without running the U-Net."""
