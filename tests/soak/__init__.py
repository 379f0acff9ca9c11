"""Long runs that look for inputs which break the library. Small samples of them are tests."""
