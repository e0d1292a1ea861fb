"""From a config to objects: data, model, weights, trainer, probes."""
