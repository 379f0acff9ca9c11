"""Checks of a machine: compiler, torch, CUDA, ONNX Runtime."""
