"""The tab Library: tuner files with thumbnails and facts."""
