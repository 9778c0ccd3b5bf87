"""Settings of a training run: their definition, presets, YAML files, and what each of them affects."""
