"""Side networks of the bypass: the chain of Res-Tuning, and forms after SHERL and LoSA."""
