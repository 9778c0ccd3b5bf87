"""`restune serve`: a server for one base and a folder of tuners."""
