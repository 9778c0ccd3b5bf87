"""HTTP API: OpenAI Images and A1111, on one engine."""
