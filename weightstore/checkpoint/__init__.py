"""Checkpoints on disk: safetensors files, sharded indices diffusers pipelines; to the arena and back."""
