"""Writes a recipe as YAML text."""

from collections.abc import Collection, Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML


def to_yaml(settings: Mapping[str, Any], leave_out: Collection[str]) -> str:
    """Return nested settings as YAML 1.2, in their order, without the dotted keys in `leave_out`.

    A section whose keys are all left out is left out too.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    text = StringIO()
    yaml.dump(_without(settings, leave_out), text)
    return text.getvalue()


def _without(settings: Mapping[str, Any], leave_out: Collection[str], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in leave_out:
            continue
        if isinstance(value, Mapping) and value:
            value = _without(value, leave_out, f"{key}.")
            if not value:
                continue
        kept[name] = value
    return kept
