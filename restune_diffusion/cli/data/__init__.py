"""`restune data inspect | caption | edit`: check, caption and edit a data folder."""
