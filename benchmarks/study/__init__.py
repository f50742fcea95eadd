"""The study on the CPU testbed: settings found in a plain PyTorch stand-in, runs through stock verl, results."""
