"""Shared fixtures; pytest puts this folder (not the repository root) on ``sys.path``."""
from hypothesis import settings

# the time that one example takes says more about what else the machine does than about the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
