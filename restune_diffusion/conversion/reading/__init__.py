"""What a file of another program contains: the file in a folder, the kind of a key, the meaning of a setting."""
