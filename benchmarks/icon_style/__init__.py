"""The icon-style benchmark: tune towards an unseen style and compare with its artist's own pictures."""
