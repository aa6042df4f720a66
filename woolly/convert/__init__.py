"""Hugging Face folders and safetensors files: opened as checkpoints, and GGUF and safetensors files written of them."""
