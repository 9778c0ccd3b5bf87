"""Training losses: target, weighting, prediction, and preservation of the subject's class."""
