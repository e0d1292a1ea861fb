"""Whole runs: train, probe, evaluate, export, check data, suites; from a config to a run folder."""
