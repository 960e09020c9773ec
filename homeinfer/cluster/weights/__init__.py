"""Weights between devices: what a model consists of, what of it is here, serving and fetching the rest."""
