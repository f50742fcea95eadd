"""The plugin's names in verl's registries, as the presets and the start-up check spell them."""

TRAINER_MODE = "prefix_sync"
AGENT_NAME = "prefix_agent"
LOSS_MODE = "prefix_rft"
