"""The small reasoning model that ships with Strop, and how it was made."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import ModelError


def model_path() -> Path:
    """Return the folder of the shipped model, which any loader takes as an ordinary model folder.

    Raises:
        ModelError: the package was installed without it.
    """
    folder = Path(str(files(__name__) / "model"))
    if not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"the demo model is missing from {folder}",
            hint="reinstall strop, or rebuild the model with `python -m strop.demo.build FOLDER`",
        )
    return folder
