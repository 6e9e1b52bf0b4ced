"""ONNX graphs as such: reading and writing, quantisers, edits."""
