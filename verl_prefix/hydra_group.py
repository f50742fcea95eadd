"""The Hydra group `prefix`: presets on the search path and the typed schema of the section."""

from __future__ import annotations

import types

SCHEMA_GROUP, SCHEMA_NAME = "prefix_schema", "base"
CONFIG_PATH = "pkg://verl_prefix.conf"


def register(hydra: types.ModuleType) -> None:
    """Import hook of `hydra`: `+prefix=NAME` then works without a search-path argument (idempotent)."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from verl_prefix.config import PrefixConfig

    class PrefixSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path) -> None:
            search_path.append(provider="verl_prefix", path=CONFIG_PATH)

    known = Plugins.instance().discover(SearchPathPlugin)
    if not any(plugin.__name__ == PrefixSearchPath.__name__ for plugin in known):
        Plugins.instance().register(PrefixSearchPath)
    ConfigStore.instance().store(group=SCHEMA_GROUP, name=SCHEMA_NAME, node=PrefixConfig)
