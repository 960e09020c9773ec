"""homeinfer: language models too big for any one machine at home, on all of them together."""

__version__ = "0.1.0"
