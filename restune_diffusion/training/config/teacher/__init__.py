"""Settings of distillation from a teacher, and their fit with the settings of the data."""
