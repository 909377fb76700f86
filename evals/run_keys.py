"""Keys of a run's configuration that decide nothing of what it trains: the one list for all who compare runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NOT_DECISIVE = (
    "run", "resume", "output_root", "log", "checkpoint", "watchdog", "eval", "health", "tracker", "profile",
    "hardware.threads", "data.cache_dir", "data.feature_cache", "data.shards",
)  # fmt: skip
"""What names, saves, watches or shows a run, says where caches and copies of the data lie, or deals out threads."""


def is_within(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of these, or lies below one."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def without(config: Mapping[str, Any], keys: Collection[str], at: str = "") -> dict[str, Any]:
    """A nested configuration without these dotted keys and what is below them."""
    return {
        key: without(value, keys, f"{at}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items() if not is_within(f"{at}{key}", keys)
    }  # fmt: skip
