"""`restune queue`: training runs that start one after another."""
