"""How a model becomes ONNX graphs: `graphs.build`."""
