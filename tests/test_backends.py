"""Both device backends against the one description of what a backend does; CUDA's half is marked `gpu`."""

from backend_conformance import TestBackend, arena, backend

__all__ = ["TestBackend", "arena", "backend"]
