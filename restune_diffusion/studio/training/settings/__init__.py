"""Settings of a run: fields, form, command, purposes."""
