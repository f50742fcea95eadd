"""verl_prefix: Prefix-RFT and its peers as a plugin of stock verl. See README.md."""

__version__ = "0.1.0"
