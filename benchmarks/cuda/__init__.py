"""Acceptance suite for a GPU: what holds on the CPU, checked on CUDA, and the limits of time and memory."""
