"""The HTTP API on Ray Serve: an ingress, and replicas of the engine."""
