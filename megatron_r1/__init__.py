"""megatron_r1: the DeepSeek-R1 training pipeline as an extension of Megatron-Core."""

__version__ = "0.2.0.dev0"
