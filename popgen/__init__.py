"""popgen: likelihood-based generative models and representation learning, configured by Gin."""

__version__ = "0.1.0"
