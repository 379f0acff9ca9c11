"""Text from a runtime: sessions, the decode loop, sampling, streamed text, snapshots."""
