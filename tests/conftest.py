"""What every test runs under: no hub, and property tests without a deadline (the same examples every time in CI)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

from hypothesis import settings

settings.register_profile("granary", deadline=None)
settings.register_profile("granary-ci", deadline=None, derandomize=True)
settings.load_profile("granary-ci" if os.environ.get("CI") else "granary")
