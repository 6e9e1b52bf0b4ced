"""Accuracy that needs Polygraphy, ONNX Runtime or torch: on the machine that compiles."""
