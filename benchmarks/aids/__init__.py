"""Generalization aids on the icon-style benchmark: PACE's consistency, and bypasses after SHERL and LoSA."""
