"""The typed parts that the mappings of a configuration describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anchorformer import connectors, integrations, selectors
from anchorformer.connectors.base import ConnectorConfig
from anchorformer.integrations.base import IntegrationConfig
from anchorformer.schema import parse, parse_plugin
from anchorformer.selectors.base import SelectorConfig
from anchorformer.tiling import Tiling


def parse_parts(selector: Mapping[str, Any], connector: Mapping[str, Any]) -> tuple[SelectorConfig, ConnectorConfig]:
    """The typed selector and connector of two plug-in mappings.

    Raises:
        UserError: unknown plug-in, unknown key or wrong type.
    """
    return (
        parse_plugin(SelectorConfig, selector, selectors.__name__, "selector"),
        parse_plugin(ConnectorConfig, connector, connectors.__name__, "connector"),
    )


def parse_integration(integration: Mapping[str, Any] | None) -> IntegrationConfig | None:
    """The typed integration of a plug-in mapping, if there is one.

    Raises:
        UserError: unknown plug-in, unknown key or wrong type.
    """
    if integration is None:
        return None
    return parse_plugin(IntegrationConfig, integration, integrations.__name__, "integration")


def parse_tiling(tiling: Mapping[str, Any]) -> Tiling:
    """The typed tiling of a configuration.

    Raises:
        UserError: unknown key, wrong type or grids that cannot be used.
    """
    return parse(Tiling, tiling, "tiling")
