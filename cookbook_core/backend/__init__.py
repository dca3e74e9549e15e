"""Backends: interface.py is the protocol; local/ runs the model here, remote/ on a service."""
