"""The differentiable primitives, one per file: registered with torch, served by a backend."""
