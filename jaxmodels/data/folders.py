"""Where prepared data lives."""

import os
from pathlib import Path


def data_dir(configured: str | None = None) -> Path:
    """Returns the folder of prepared data.

    Args:
      configured: taken where given (`~` expanded); else $JAXMODELS_DATA_DIR, else
        ~/.cache/jaxmodels/data.
    """
    chosen = configured or os.environ.get("JAXMODELS_DATA_DIR") or "~/.cache/jaxmodels/data"
    return Path(chosen).expanduser()
