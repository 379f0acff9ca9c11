"""Bundles on disk: their files, manifest and weights, and the checks of them."""
