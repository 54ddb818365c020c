"""Experiments: a configuration in, tables and figures out. No numerics live here."""
