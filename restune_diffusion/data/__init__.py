"""Training data: from a folder to cropped, captioned samples."""
