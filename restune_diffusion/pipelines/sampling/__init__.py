"""Images from settings, for the command line and the studio: options, records and contact sheets."""
