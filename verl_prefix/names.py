"""The plugin's names in verl's registries, as the presets and the start-up check spell them."""

#: `trainer.v1.trainer_mode` -> the trainer of verl's that it is, with prefixes
TRAINER_MODES = {"prefix_sync": "sync", "prefix_colocate_async": "colocate_async"}
AGENT_NAME = "prefix_agent"
LOSS_MODE = "prefix_rft"
