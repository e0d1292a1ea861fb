"""From a config to objects: data, model, weights, trainer, probes.

All of it raises ConfigError at the key that is wrong, or does not fit the data.
"""
