"""Helpers of the tests: golden data, small models, the reference, programs that are run as processes."""
