"""Where the shipped recipes are: beside `src/` in a checkout, inside the package when installed from a wheel."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError


def recipe_path(name: str) -> Path:
    """Return the file of a shipped recipe. Raises ConfigError listing those there are."""
    here = Path(__file__).resolve().parent
    folders = [here / "recipes", here.parent.parent / "recipes"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
    raise ConfigError(f"there is no recipe `{name}`", hint=f"shipped recipes: {', '.join(known) or 'none'}")
