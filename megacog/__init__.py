"""megacog: pretraining and generation of autoregressive text-to-video transformers."""

__version__ = "0.1.0"
