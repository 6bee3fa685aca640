"""A cell of the experiments: one setting, one seed, one training; and its key in the ledger."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

Keys = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Setting:
    """Settings of a training, without its seed.

    Two experiments that need the same setting share its cells, because the ledger finds a cell by its content.
    """

    method: str
    """a method of the package, `none` (the base alone), or a rival of this benchmark"""
    keys: Keys = ()
    """recipe keys that differ from the common ones of `training.py`, sorted"""
    weights: str = "16-bit"
    """weights of the base: its own, or a name such as fp4-64 of `simulated.py`"""

    @classmethod
    def of(cls, method: str, weights: str = "16-bit", **keys: Any) -> "Setting":
        """Make a setting of keywords such as `adapter__rank=8` for the recipe key adapter.rank."""
        return cls(method, weights=weights).but(**keys)

    def but(self, **keys: Any) -> "Setting":
        """Return a copy with other values of some keys."""
        changed = dict(self.keys)
        for name, value in keys.items():
            changed[name.replace("__", ".")] = tuple(value) if isinstance(value, list) else value
        return Setting(self.method, tuple(sorted(changed.items())), self.weights)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a recipe key."""
        return dict(self.keys).get(key, default)

    def as_json(self) -> dict[str, Any]:
        """Return the setting as plain values."""
        return {"method": self.method, "weights": self.weights, "keys": dict(self.keys)}


@dataclass(frozen=True)
class Cell:
    """One setting and one seed. The same seed means the same rows in the same order."""

    setting: Setting
    seed: int
    size: str = "full"
    """name of the sizes in `training.SIZES`; only tests use another than full"""

    @property
    def key(self) -> str:
        """Digest of everything that decides the result."""
        content = {**self.setting.as_json(), "seed": self.seed, "size": self.size}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """Return the cell as plain values."""
        return {"key": self.key, **self.setting.as_json(), "seed": self.seed, "size": self.size}
