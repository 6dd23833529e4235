"""Shared fixtures; pytest puts this folder (not the repository root) on ``sys.path``."""
