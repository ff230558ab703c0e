"""Bridges to training frameworks; each imports its framework, so nothing here is imported by the core."""
